"""ViewAutoencoder: RGB, alpha and depth of a view in one latent, sixteen times smaller on a side, and back."""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils.accelerate_utils import apply_forward_hook
from torch import Tensor, nn

from coser.views import ViewSet, channels_to_views, nearness_to_depths, views_to_channels

VIEW_CHANNELS = 5  # premultiplied RGB, alpha, nearness
RIM_WINDOW = 5  # pixels; where a rim has nothing within
PATCH = 4  # the outermost factor of four is a pixel shuffle: no work is done at full resolution


# The network sees and puts out decorrelated features: brightness, two hue axes, coverage, and nearness as its
# difference from a middling one. Hues and depth vary far less than coverage does; at their own size they are learnt
# last (measured: a model fed with plain channels was still grey after 13,000 views, and gained 3 dB within 3,000 once
# hues were enlarged).
HUE_GAIN, DEPTH_GAIN_IN, DEPTH_GAIN_OUT, MIDDLE = 3.0, 4.0, 2.0, 0.52
COLOR_AXES = torch.tensor([[3**-0.5, 3**-0.5, 3**-0.5], [2**-0.5, 0, -(2**-0.5)], [6**-0.5, -2 * 6**-0.5, 6**-0.5]])
COLOR_GAINS = torch.tensor([1.0, HUE_GAIN, HUE_GAIN])[:, None]


def channels_to_features(channels: Tensor) -> Tensor:
    """Channels [B,5,H,W] in [0,1] => what the network sees, about [-2,2].

    Brightness, two hues, alpha, relative nearness.
    """
    color, alpha, nearness = channels.split((3, 1, 1), 1)
    color = torch.einsum("kc,bchw->bkhw", (COLOR_AXES * COLOR_GAINS).to(channels), color * 2 - 1)
    return torch.cat([color, alpha * 2 - 1, DEPTH_GAIN_IN * (nearness - MIDDLE * alpha)], 1)


def features_to_channels(features: Tensor) -> Tensor:
    """What the network puts out => channels [B,5,H,W].

    Hues and depth are enlarged here too: not the inverse of the other.
    """
    color, alpha, nearness = features.split((3, 1, 1), 1)
    color = torch.einsum("kc,bkhw->bchw", (COLOR_AXES * COLOR_GAINS).to(features), color) / 2 + 0.5
    alpha = alpha / 2 + 0.5
    return torch.cat([color, alpha, MIDDLE * alpha + DEPTH_GAIN_OUT / 2 * nearness], 1)


def decoded_views(channels: Tensor) -> ViewSet:
    """What the network puts out, as channels [B,5,H,W] => ViewSet, its rims' depths taken from the pixels within.

    Nearness comes out softer than coverage, so that their ratio is too far in the outermost pixel: by .14 on average
    over held-out views, .4 and more at times (docs/training.md, "Depth at the rims"), and meshes reached below their
    objects. The mean of the neighbours within is off by .05; where there are none, a window's sums are compared.
    """
    views = channels_to_views(channels)
    shown = (views.masks >= 0.5).float()
    within = -F.max_pool2d(-shown, 3, 1, 1)
    near, total = (F.avg_pool2d(part, 3, 1, 1) for part in (views.depths * within, within))
    masks, nearness = F.avg_pool2d(channels[:, 3:].float().clamp(0, 1), RIM_WINDOW, 1, RIM_WINDOW // 2).split(1, 1)
    of_rim = torch.where(total > 0, near / total.clamp_min(1e-6), nearness_to_depths(nearness, masks))
    return replace(views, depths=shown * torch.where(within > 0, views.depths, of_rim))


class ResidualBlock(nn.Module):
    """x + conv(silu(norm(conv(silu(norm(x)))))), [B,C,H,W] => [B,C,H,W]."""

    def __init__(self, channels: int):
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(channels // 16, channels), nn.GroupNorm(channels // 16, channels)
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        nn.init.zeros_(self.conv2.weight)
        nn.init.zeros_(self.conv2.bias)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        return x + self.conv2(F.silu(self.norm2(h)))


class ViewAutoencoder(ModelMixin, ConfigMixin):
    """Five channels [B,5,H,W] in [0,1] <=> latents [B,C,H/16,W/16], each latent channel near zero mean, unit variance.

    channels: widths at 1/4, 1/8 and 1/16 of the side. encoder_blocks, decoder_blocks: residual blocks at each of the
    three. latent_mean, latent_std: statistics of the raw latents on the training set, measured when training ends; they
    make `views_to_latents` give normalised latents.
    """

    @register_to_config
    def __init__(self, latent_channels: int = 16, channels: tuple[int, ...] = (64, 128, 192),
                 encoder_blocks: tuple[int, ...] = (1, 1, 2), decoder_blocks: tuple[int, ...] = (3, 4, 4),
                 latent_mean: tuple[float, ...] | None = None, latent_std: tuple[float, ...] | None = None):
        super().__init__()
        c4, c8, c16 = channels
        patch_channels = VIEW_CHANNELS * PATCH**2
        self.encoder = nn.Sequential(
            nn.PixelUnshuffle(PATCH), nn.Conv2d(patch_channels, c4, 3, padding=1),
            *(ResidualBlock(c4) for _ in range(encoder_blocks[0])), nn.Conv2d(c4, c8, 2, stride=2),
            *(ResidualBlock(c8) for _ in range(encoder_blocks[1])), nn.Conv2d(c8, c16, 2, stride=2),
            *(ResidualBlock(c16) for _ in range(encoder_blocks[2])),
            nn.GroupNorm(c16 // 16, c16), nn.SiLU(), nn.Conv2d(c16, latent_channels, 3, padding=1))
        self.decoder = nn.Sequential(
            nn.Conv2d(latent_channels, c16, 3, padding=1), *(ResidualBlock(c16) for _ in range(decoder_blocks[2])),
            nn.Conv2d(c16, 4 * c8, 1), nn.PixelShuffle(2), *(ResidualBlock(c8) for _ in range(decoder_blocks[1])),
            nn.Conv2d(c8, 4 * c4, 1), nn.PixelShuffle(2), *(ResidualBlock(c4) for _ in range(decoder_blocks[0])),
            nn.GroupNorm(c4 // 16, c4), nn.SiLU(), nn.Conv2d(c4, patch_channels, 3, padding=1), nn.PixelShuffle(PATCH))
        # a few per cent of the decoder's work: what is shown while denoising
        self.preview = nn.Sequential(
            nn.Conv2d(latent_channels, c8, 3, padding=1), nn.SiLU(), nn.Conv2d(c8, c8, 3, padding=1), nn.SiLU(),
            nn.Conv2d(c8, patch_channels, 1), nn.PixelShuffle(PATCH))
        for name in ("mirror_weight", "mirror_bias"):  # of `set_mirror`; no part of the weights
            self.register_buffer(name, None, persistent=False)

    def load_shallower(self, state: dict[str, Tensor], decoder_blocks: tuple[int, ...]) -> None:
        """Takes the weights of an autoencoder whose decoder has at most as many blocks at each size, `decoder_blocks`.

        What it lacks stays as it is: blocks, which follow those it has, are silent when fresh, so that views are decoded
        as before. Raises ValueError where it has more.
        """
        if any(theirs > ours for theirs, ours in zip(decoder_blocks, self.config.decoder_blocks)):
            raise ValueError(f"these weights are of a decoder with {tuple(decoder_blocks)} residual blocks at its sizes; "
                             f"this one has {tuple(self.config.decoder_blocks)}, and none can be left out")
        with torch.device("meta"):
            theirs = list(ViewAutoencoder(**dict(self.config) | {"decoder_blocks": decoder_blocks}).decoder)
        places = {}  # of their modules in this decoder
        for place, module in enumerate(self.decoder):
            if len(places) < len(theirs) and type(module) is type(theirs[len(places)]):
                places[str(len(places))] = place
        taken = {}
        for key, value in state.items():
            part, *rest = key.split(".")
            taken[f"decoder.{places[rest[0]]}.{'.'.join(rest[1:])}" if part == "decoder" else key] = value
        self.load_state_dict(taken, strict=False)

    @apply_forward_hook
    def encode(self, channels: Tensor) -> Tensor:
        """[B,5,H,W] in [0,1], H and W multiples of 16 => raw latents [B,C,H/16,W/16] in the weights' dtype."""
        shape = channels.shape
        assert shape[1] == VIEW_CHANNELS and shape[2] % 16 == 0 == shape[3] % 16, shape
        features = channels_to_features(channels.float()).to(self.dtype)
        return self.encoder(features.contiguous(memory_format=torch.channels_last))

    @apply_forward_hook
    def decode(self, raw_latents: Tensor) -> Tensor:
        """Raw latents [B,C,h,w] => float32 [B,5,16h,16w], about [0,1].

        The last step is float32: in bfloat16 nearness would come in steps of .004, a third of what depth may err by.
        """
        return features_to_channels(self.decoder(raw_latents.contiguous(memory_format=torch.channels_last)).float())

    @apply_forward_hook
    def decode_preview(self, raw_latents: Tensor) -> Tensor:
        """Raw latents [B,C,h,w] => a rough float32 [B,5,4h,4w], about [0,1]."""
        return features_to_channels(self.preview(raw_latents.contiguous(memory_format=torch.channels_last)).float())

    def _statistics(self, like: Tensor) -> tuple[Tensor, Tensor]:
        if self.config.latent_std is None:
            raise ValueError("this autoencoder has no latent statistics yet; measure them at the end of its training")
        return tuple(torch.tensor(v, device=like.device, dtype=torch.float32)[:, None, None]
                     for v in (self.config.latent_mean, self.config.latent_std))

    def views_to_latents(self, views: ViewSet) -> Tensor:
        """ViewSet of N views => normalised latents [N,C,H/16,W/16], float32."""
        mean, std = self._statistics(views.views)
        return (self.encode(views_to_channels(views)).float() - mean) / std

    def latents_to_views(self, latents: Tensor) -> ViewSet:
        """Normalised latents [N,C,h,w] => ViewSet of N views at 16h x 16w, float32."""
        mean, std = self._statistics(latents)
        return decoded_views(self.decode((latents.float() * std + mean).to(self.dtype)))

    def latents_to_preview(self, latents: Tensor) -> ViewSet:
        """Normalised latents [N,C,h,w] => a rough ViewSet of N views at 4h x 4w, float32.

        For watching, not for meshes.
        """
        mean, std = self._statistics(latents)
        return channels_to_views(self.decode_preview((latents.float() * std + mean).to(self.dtype)))

    def set_mirror(self, weight: Tensor, bias: Tensor) -> None:
        """Takes the map of `mirror_latents`: weight [C,C,3,3] and bias [C], of normalised latents that were flipped."""
        self.mirror_weight, self.mirror_bias = weight.to(self.device, self.dtype), bias.to(self.device, self.dtype)

    def mirror_latents(self, latents: Tensor) -> Tensor:
        """Normalised latents [N,C,h,w] => about those of the same views from left to right, float32.

        Patches are not coded alike from both sides, so flipping alone will not do. By a linear map where `set_mirror`
        gave one, else by way of the views themselves, which takes far longer.
        """
        if self.mirror_weight is None:
            return self.views_to_latents(self.latents_to_views(latents).mirrored())
        flipped = F.pad(latents.float().flip(-1), (1, 1, 1, 1), mode="replicate")
        return F.conv2d(flipped, self.mirror_weight.float(), self.mirror_bias.float())
