"""Text states of all captions of a training, made once and kept in a file."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from coser.data.dataset import Ring
from coser.pipeline import CoSERPipeline, PromptEmbeds
from coser.whole_files import whole_file


@dataclass(frozen=True)
class CaptionStates:
    """Text states of all captions of a run, so that the encoder runs once: caption -> [L,384] float16."""

    states: dict[str, Tensor]

    def batch(self, captions: list[str], device, dtype: torch.dtype) -> PromptEmbeds:
        """Captions => padded states, mask and means."""
        states = [self.states[c] for c in captions]
        length = max(len(s) for s in states)
        padded = torch.zeros(len(states), length, states[0].shape[1])
        mask = torch.zeros(len(states), length, dtype=torch.bool)
        for i, s in enumerate(states):
            padded[i, :len(s)], mask[i, :len(s)] = s, True
        return _embeds(padded, mask, device, dtype)

    def on(self, device) -> "CaptionTable":
        """The same as one table on `device`."""
        rows = {caption: i for i, caption in enumerate(self.states)}
        lengths = torch.tensor([len(s) for s in self.states.values()])
        padded = torch.nn.utils.rnn.pad_sequence(list(self.states.values()), batch_first=True)
        return CaptionTable(rows, padded.to(device), lengths)


@dataclass(frozen=True)
class CaptionTable:
    """The text states of a run on its device: row of each caption, states [R,L,384] float16, tokens of each row [R]."""

    rows: dict[str, int]
    padded: Tensor
    lengths: Tensor

    def batch(self, captions: list[str], device, dtype: torch.dtype) -> PromptEmbeds:
        """As CaptionStates.batch, without states that travel."""
        rows = torch.tensor([self.rows[c] for c in captions])
        lengths = self.lengths[rows]
        length = int(lengths.max())
        mask = (torch.arange(length) < lengths[:, None]).to(self.padded.device)
        return _embeds(self.padded[rows.to(self.padded.device), :length].float(), mask, device, dtype)


def _embeds(padded: Tensor, mask: Tensor, device, dtype: torch.dtype) -> PromptEmbeds:
    """States [B,L,D], zero where mask [B,L] is, => with their means."""
    pooled = padded.sum(1) / mask.sum(1, keepdim=True)
    return PromptEmbeds(padded.to(device, dtype), mask.to(device), pooled.to(device, dtype))


def captions_of(rings: list[Ring]) -> list[str]:
    """All that a training may say of these rings."""
    return [c for r in rings for c in r.captions + r.short_captions]


@torch.no_grad()
def encode_captions(pipeline: CoSERPipeline, captions: list[str], cache: Path | None = None) -> CaptionStates:
    """The text states of different captions; kept in the folder `cache`, where given, for the next start."""
    unique = set(captions) | {""}
    name = f"captions-{pipeline.text_encoder.config.sha256[:16]}-{str(pipeline.unet.dtype).removeprefix('torch.')}"
    name += f"-by-{str(pipeline.text_encoder.dtype).removeprefix('torch.')}"  # in which the states differ, too
    states = {} if cache is None else _load_captions(cache / f"{name}.safetensors")
    missing = sorted(unique - states.keys())
    for i in range(0, len(missing), 64):
        embeds = pipeline.encode_prompt(missing[i:i + 64])
        for caption, state, mask in zip(missing[i:i + 64], embeds.states, embeds.mask):
            states[caption] = state[mask].half().cpu()
    if missing and cache is not None:
        cache.mkdir(parents=True, exist_ok=True)
        tensors = {"states": torch.cat(list(states.values())), "lengths": torch.tensor([*map(len, states.values())])}
        with whole_file(cache / f"{name}.safetensors") as writing:
            save_file(tensors, writing, {"captions": json.dumps(list(states))})
    return CaptionStates({caption: states[caption] for caption in sorted(unique)})


def _load_captions(path: Path) -> dict[str, Tensor]:
    """Caption => states, of a file that encode_captions wrote; nothing where there is none."""
    if not path.is_file():
        return {}
    with safe_open(path, "pt") as file:
        captions = json.loads(file.metadata()["captions"])
        return dict(zip(captions, file.get_tensor("states").split(file.get_tensor("lengths").tolist())))
