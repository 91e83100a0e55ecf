"""The rectified flow that the small model is trained on and sampled with: noise levels, their weights, the loss."""

from __future__ import annotations

import torch
from diffusers import DPMSolverMultistepScheduler
from torch import Tensor

from coser.data.dataset import RingBatch
from coser.models.unet import MultiviewUNet
from coser.pipeline import PromptEmbeds

SHIFT = 3.0  # of the noise level when sampling: N views are redundant, so the signal survives more noise
TRAINING_SHIFT = 5.0  # a little more than when sampling: what is decided early is decided for all views
LEVELS, WEIGHTINGS = ("uniform", "logit-normal"), ("flow", "clean", "min-snr")
MAX_SNR = 5.0  # of min-SNR: levels with less noise count no more than this one


def noise_levels(count: int, generator: torch.Generator, shift: float = TRAINING_SHIFT,
                 levels: str = "uniform") -> Tensor:
    """Noise levels in [0,1), uniform or logit-normal and then shifted towards noise: [count].

    In any order, one of each of `count` parts that are as likely as another: a step then never happens to see little
    noise alone, and its gradient varies less (as in Kingma et al. 2021, appendix I.1).

    The logit-normal levels of Esser et al. 2024 (section 3.1) leave out the ends: shifted by 3 they put 0.9 % of the
    training beyond .97 and 9 % beyond .92, where a sampler takes its first two and five of 20 steps and text and
    azimuth alone must decide the shape. Trained so, the model read shapes off the noise, in each view another.
    """
    drawn = (torch.randperm(count, generator=generator) + torch.rand(count, generator=generator)) / count
    if levels == "logit-normal":
        drawn = torch.special.ndtri(drawn).sigmoid()
    return shift * drawn / (1 + (shift - 1) * drawn)


def level_weights(levels: Tensor, weighting: str) -> Tensor:
    """What the flow's squared error at each noise level counts, [B] => [B].

    "flow": 1. "clean": the square of the level, which makes it the squared error of the clean latents. "min-snr": that
    times the signal-to-noise ratio, of which no more than 5 counts (Hang et al. 2023, section 3.4).
    """
    if weighting == "flow":
        return torch.ones_like(levels)
    snr = ((1 - levels) / levels.clamp_min(1e-3)).square()
    return levels.square() * (snr.clamp_max(MAX_SNR) if weighting == "min-snr" else 1.0)


def small_scheduler(shift: float = SHIFT) -> DPMSolverMultistepScheduler:
    """The sampler of flow-trained models: DPM-Solver++ (2M) on shifted flow sigmas."""
    return DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift,
                                       num_train_timesteps=1000)


def flow_loss(unet: MultiviewUNet, batch: RingBatch, embeds: PromptEmbeds, generator: torch.Generator,
              mixers: tuple[str, ...] | None = None, levels: Tensor | None = None,
              weighting: str = "flow", share: slice = slice(None)) -> Tensor:
    """Mean squared error of the predicted flow (noise - clean) at noise levels [B], drawn where not given; a scalar.

    weighting: see `level_weights`. share: which of the batch's samples are asked, where other processes ask the others;
    each gets the noise that it would get among all. On a GPU the noise is drawn there, from the generator's seed: a
    processor takes as long for it as the GPU for all.
    """
    levels = noise_levels(len(batch.latents), generator) if levels is None else levels
    if unet.device.type == "cuda":
        generator = torch.Generator(unet.device).manual_seed(generator.initial_seed())
    noise = torch.randn(batch.latents.shape, generator=generator, device=generator.device)
    clean, noise, levels = batch.latents[share].to(unet.device), noise[share].to(unet.device), levels[share]
    sigma = levels.to(unet.device)[:, None, None, None, None]
    noisy = (1 - sigma) * clean + sigma * noise
    predicted = unet(noisy.to(unet.dtype), levels.to(unet.device) * 1000, embeds.states[share], batch.cameras,
                     pooled=embeds.pooled[share] if unet.config.pooled_dim else None,
                     attention_mask=embeds.mask[share], mixers=mixers)
    errors = (predicted.float() - (noise - clean)).square().mean((1, 2, 3, 4))
    return (level_weights(levels, weighting).to(errors) * errors).mean()
