"""The flow's loss on rings that no training saw, level by level: it decides between checkpoints of one autoencoder."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

import torch
from torch import Tensor

from coser.cameras import Cameras
from coser.caption_states import CaptionStates, CaptionTable
from coser.data.dataset import Ring, RingBatch, step_generator
from coser.flow import flow_loss
from coser.models.unet import MultiviewUNet

LEVELS = (0.3, 0.6, 0.85, 0.97, 0.995)
VIEW_COUNTS = (4, 6, 12)  # taken in turn by the rings whose length they divide


@torch.no_grad()
def held_out_losses(unet: MultiviewUNet, rings: Sequence[Ring], latents: Sequence[Tensor], elevations: Sequence[float],
                    texts: CaptionStates | CaptionTable) -> dict[str, float]:
    """The flow's mean squared error over rings, with their first captions: `loss_<level>` at each of LEVELS.

    latents: per ring [V,C,h,w]; elevations in degrees. `loss` is the mean over the levels. Noise depends on a ring's
    place in the list alone, so that checkpoints are asked the same.
    """
    figures: dict[str, list[float]] = {f"loss_{level}": [] for level in LEVELS}
    for i, (ring, clean, elevation) in enumerate(zip(rings, latents, elevations)):
        num_views = VIEW_COUNTS[i % len(VIEW_COUNTS)] if len(clean) % VIEW_COUNTS[-1] == 0 else len(clean)
        clean = clean[::len(clean) // num_views][None].float()
        batch = RingBatch(clean, Cameras.orbit(num_views, elevation), [ring.captions[0]])
        embeds = texts.batch(batch.captions, unet.device, unet.dtype)
        for level in LEVELS:
            loss = flow_loss(unet, batch, embeds, step_generator(7, i), levels=torch.tensor([level]))
            figures[f"loss_{level}"].append(float(loss))
    means = {name: statistics.mean(values) for name, values in figures.items()}
    return {"loss": statistics.mean(means.values())} | means
