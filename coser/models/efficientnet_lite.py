"""EfficientNet-Lite, a small classifier's trunk that others have trained on ImageNet: what the judge may see with.

Tan and Le 2019 without squeeze-and-excitation and with ReLU6 ("EfficientNet-Lite", Google 2020). Parameters bear the
names that timm gives its `tf_efficientnet_lite*`, so their `model.safetensors` load as they are.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from huggingface_hub import snapshot_download
from safetensors.torch import load_file
from torch import Tensor, nn

FEATURES = 1280  # channels of what comes out
STRIDE = 32  # pixels a side that one place of it stands for
MEAN, STD = 127 / 255, 128 / 255  # of the pictures it was trained on
STAGES = (  # expansion, channels, kernel, stride, blocks
    (1, 16, 3, 1, 1), (6, 24, 3, 2, 2), (6, 40, 5, 2, 2), (6, 80, 3, 2, 3), (6, 112, 5, 1, 3), (6, 192, 5, 2, 4),
    (6, 320, 3, 1, 1))
SCALES = {"tf_efficientnet_lite0": (1.0, 1.0), "tf_efficientnet_lite1": (1.0, 1.1),
          "tf_efficientnet_lite2": (1.1, 1.2), "tf_efficientnet_lite3": (1.2, 1.4),
          "tf_efficientnet_lite4": (1.4, 1.8)}  # name: of widths and of numbers of blocks
FILES = ("config.json", "model.safetensors")


def rounded(channels: float, unit: int = 8) -> int:
    """The nearest multiple of `unit`, or the next where that would lose more than a tenth."""
    near = max(unit, int(channels + unit / 2) // unit * unit)
    return near + unit if near < 0.9 * channels else near


class SamePad(nn.Conv2d):
    """A convolution without bias, padded as TensorFlow does: what a stride leaves over goes to the right and bottom."""

    def __init__(self, channels: int, out: int, kernel: int = 1, stride: int = 1, groups: int = 1):
        super().__init__(channels, out, kernel, stride, groups=groups, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        pads = []
        for size in (x.shape[-1], x.shape[-2]):
            stride, kernel = self.stride[0], self.kernel_size[0]
            missing = max((math.ceil(size / stride) - 1) * stride + kernel - size, 0)
            pads += [missing // 2, missing - missing // 2]
        return super().forward(F.pad(x, pads) if any(pads) else x)


class DepthwiseSeparable(nn.Module):
    """Looks around channel by channel, and mixes them (Howard et al. 2017, figure 2)."""

    def __init__(self, channels: int, out: int, kernel: int, stride: int):
        super().__init__()
        self.adds = channels == out and stride == 1
        self.conv_dw, self.bn1 = SamePad(channels, channels, kernel, stride, channels), norm(channels)
        self.conv_pw, self.bn2 = SamePad(channels, out), norm(out)

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv_pw(F.relu6(self.bn1(self.conv_dw(x)))))
        return x + out if self.adds else out


class InvertedResidual(nn.Module):
    """Widens, looks around channel by channel, and narrows again (Sandler et al. 2018, figure 3)."""

    def __init__(self, channels: int, out: int, expansion: int, kernel: int, stride: int):
        super().__init__()
        wide = channels * expansion
        self.adds = channels == out and stride == 1
        self.conv_pw, self.bn1 = SamePad(channels, wide), norm(wide)
        self.conv_dw, self.bn2 = SamePad(wide, wide, kernel, stride, wide), norm(wide)
        self.conv_pwl, self.bn3 = SamePad(wide, out), norm(out)

    def forward(self, x: Tensor) -> Tensor:
        wide = F.relu6(self.bn1(self.conv_pw(x)))
        out = self.bn3(self.conv_pwl(F.relu6(self.bn2(self.conv_dw(wide)))))
        return x + out if self.adds else out


def norm(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, eps=1e-3)


class EfficientNetLite(nn.Module):
    """Pictures [N,3,S,S] in [0,1] => features [N,1280,S/32,S/32], never below 0.

    name: one of SCALES. Its statistics stay what training on ImageNet left: `train` does not change them.
    """

    def __init__(self, name: str):
        super().__init__()
        if name not in SCALES:
            raise ValueError(f"name must be one of {', '.join(SCALES)}, got {name!r}")
        width, depth = SCALES[name]
        channels = 32
        self.conv_stem, self.bn1 = SamePad(3, channels, 3, 2), norm(channels)
        stages = []
        for i, (expansion, out, kernel, stride, count) in enumerate(STAGES):
            out = rounded(out * width)
            blocks = []
            for b in range(count if i in (0, len(STAGES) - 1) else math.ceil(count * depth)):
                step = 1 if b else stride
                blocks.append(DepthwiseSeparable(channels, out, kernel, step) if expansion == 1
                              else InvertedResidual(channels, out, expansion, kernel, step))
                channels = out
            stages.append(nn.Sequential(*blocks))
        self.blocks = nn.Sequential(*stages)
        self.conv_head, self.bn2 = SamePad(channels, FEATURES), norm(FEATURES)
        self.eval()

    def train(self, mode: bool = True) -> EfficientNetLite:
        return super().train(False)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu6(self.bn1(self.conv_stem((x - MEAN) / STD)))
        return F.relu6(self.bn2(self.conv_head(self.blocks(x))))


def load_efficientnet_lite(source: str) -> tuple[str, dict[str, Tensor]]:
    """The name and the trunk's weights of a folder, or of a hub id like "timm/tf_efficientnet_lite0.in1k".

    The folder holds timm's files: config.json with the "architecture", and model.safetensors. Raises ValueError where
    it does not, or names another architecture. The network is asked only where no folder bears the name.
    """
    folder = Path(source)
    if not folder.is_dir():
        try:
            folder = Path(snapshot_download(source, allow_patterns=list(FILES)))
        except (OSError, ValueError) as error:  # the hub's own say at length what was tried
            raise ValueError(f"backbone must be a folder, or a hub id that can be reached, got {source!r}") from error
    if missing := [name for name in FILES if not (folder / name).is_file()]:
        raise ValueError(f"{source} must hold {' and '.join(FILES)}, got none of the name {missing[0]}")
    name = json.loads((folder / FILES[0]).read_text()).get("architecture")
    if name not in SCALES:
        raise ValueError(f"the architecture in {source} must be one of {', '.join(SCALES)}, got {name!r}")
    weights = load_file(folder / FILES[1])
    return name, {k: v for k, v in weights.items() if not k.startswith("classifier.")}
