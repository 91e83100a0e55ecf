"""Train the denoiser on latents of rendered rings."""

from __future__ import annotations

import argparse
import copy
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import DPMSolverMultistepScheduler
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from coser.cameras import Cameras
from coser.data.dataset import LatentRings, Ring, RingBatch, list_rings, step_generator
from coser.data.render import load_ring
from coser.models.autoencoder import ViewAutoencoder
from coser.models.text_encoder import SentenceTextEncoder, sentence_encoder_folder
from coser.models.unet import MultiviewUNet
from coser.optimizer import MasterOptimizer
from coser.pipeline import CoSERPipeline, PromptEmbeds
from coser.train_loop import Log, Options, train_loop
from coser.views import picture_grid, views_to_uint8

VERB = "denoiser"


def unet_config(channels: tuple[int, ...], layers: int, heads: tuple[int, ...], latent_channels: int = 16) -> dict:
    """A UNet2DConditionModel for 16x16 latents: convolutions alone at 16x16, attention from 8x8 tokens down."""
    depth = len(channels)
    return dict(sample_size=16, in_channels=latent_channels, out_channels=latent_channels, block_out_channels=channels,
                layers_per_block=layers, cross_attention_dim=384, attention_head_dim=heads, use_linear_projection=True,
                norm_num_groups=8, down_block_types=("DownBlock2D",) + ("CrossAttnDownBlock2D",) * (depth - 1),
                up_block_types=("CrossAttnUpBlock2D",) * (depth - 1) + ("UpBlock2D",))


PRESETS = {
    "small": dict(model=dict(unet=unet_config((128, 192, 192), 1, (4, 6, 6)), pooled_dim=384, mixer_ratio=0.34,
                             scan_ratio=0.67),
                  views_per_batch=36, view_counts=(4, 6, 8, 12), lr=6e-4),
    "tiny": dict(model=dict(unet=unet_config((16, 16), 1, (1, 1), 4), pooled_dim=384, mixer_head_size=16,
                            scan_head_size=16, scan_state_size=8),
                 views_per_batch=4, view_counts=(2, 4), lr=1e-3),
}
SHIFT = 3.0  # of the noise level when sampling: N views are redundant, so the signal survives more noise
TRAINING_SHIFT = 5.0  # a little more than when sampling: what is decided early is decided for all views
DROP_TEXT = 0.1
DROP_MIXER = 0.1  # of the steps, for each mixer: switching one off when sampling stays meaningful
SAMPLE_PROMPTS = ("a red barrel", "a green pine tree", "a yellow taxi", "a wooden chair", "a brown treasure chest",
                  "a grey castle tower")


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--autoencoder", type=Path, required=True, help="trained autoencoder's folder (.../vae)")
    parser.add_argument("--views-per-batch", type=int, help="views a step, else the preset's")
    parser.add_argument("--view-counts", type=int, nargs="+", help="ring sizes drawn in training, else the preset's")
    parser.add_argument("--min-kind-count", type=int, default=1, help="only kinds of objects with so many assets")
    parser.add_argument("--start", type=Path, help="pipeline folder whose UNet to start from instead of random weights")
    parser.add_argument("--ema", type=float, default=0.999, help="decay of the averaged weights")


def noise_levels(count: int, generator: torch.Generator, shift: float = TRAINING_SHIFT) -> Tensor:
    """Noise levels in [0,1), uniform and then shifted towards noise: [count].

    The logit-normal levels of Esser et al. 2024 (section 3.1) leave out the ends: shifted by 3 they put 0.9 % of the
    training beyond .97 and 9 % beyond .92, where a sampler takes its first two and five of 20 steps and text and
    azimuth alone must decide the shape. Trained so, the model read shapes off the noise, in each view another.
    """
    uniform = torch.rand(count, generator=generator)
    return shift * uniform / (1 + (shift - 1) * uniform)


def small_scheduler(shift: float = SHIFT) -> DPMSolverMultistepScheduler:
    """The sampler of flow-trained models: DPM-Solver++ (2M) on shifted flow sigmas."""
    return DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift,
                                       num_train_timesteps=1000)


def load_tokenizer() -> PreTrainedTokenizerFast:
    """MiniLM's tokenizer, from the installed package; checkpoints carry a copy."""
    return PreTrainedTokenizerFast(tokenizer_file=str(sentence_encoder_folder() / "tokenizer.json"), unk_token="[UNK]",
                                   pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]", mask_token="[MASK]")


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
        pooled = padded.sum(1) / mask.sum(1, keepdim=True)
        return PromptEmbeds(padded.to(device, dtype), mask.to(device), pooled.to(device, dtype))


@torch.no_grad()
def encode_captions(pipeline: CoSERPipeline, captions: list[str]) -> CaptionStates:
    """The text states of different captions."""
    unique, states = sorted(set(captions) | {""}), {}
    for i in range(0, len(unique), 64):
        embeds = pipeline.encode_prompt(unique[i:i + 64])
        for caption, state, mask in zip(unique[i:i + 64], embeds.states, embeds.mask):
            states[caption] = state[mask].half().cpu()
    return CaptionStates(states)


@torch.no_grad()
def encode_rings(vae: ViewAutoencoder, vae_folder: Path, rings: list[Ring],
                 cache: Path) -> tuple[list[Tensor], list[float]]:
    """Normalised latents [V,C,h,w] float16 and elevation (degrees) of every ring; kept in `cache` for the next start.

    The cache is added to when rings are new and made anew when the autoencoder is another one.
    """
    weights = hashlib.sha256((vae_folder / "diffusion_pytorch_model.safetensors").read_bytes()).hexdigest()
    cache.mkdir(parents=True, exist_ok=True)
    tensors: dict[str, Tensor] = {}
    for file in sorted(cache.glob(f"{weights[:16]}-*.safetensors")):
        tensors |= load_file(file)
    fresh: dict[str, Tensor] = {}
    for i, ring in enumerate(rings, 1):
        if ring.path.stem not in tensors:
            views, cameras = load_ring(ring.path)
            latents = vae.views_to_latents(views.to(vae.device))
            fresh[ring.path.stem] = latents.half().cpu().contiguous()
            fresh[f"{ring.path.stem}/elevation"] = cameras.elevations.mean().reshape(1)
        if fresh and (len(fresh) >= 400 or i == len(rings)):
            save_file(fresh, cache / "writing")  # under its name only when whole: a killed run leaves no half file
            (cache / "writing").rename(cache / f"{weights[:16]}-{len(tensors):06d}.safetensors")
            tensors |= fresh
            fresh = {}
            print(f"latents: {i}/{len(rings)} rings", flush=True)
    return [tensors[r.path.stem] for r in rings], [float(tensors[f"{r.path.stem}/elevation"]) for r in rings]


def flow_loss(unet: MultiviewUNet, batch: RingBatch, embeds: PromptEmbeds, generator: torch.Generator,
              mixers: tuple[str, ...] | None = None, levels: Tensor | None = None) -> Tensor:
    """Mean squared error of the predicted flow (noise - clean) at noise levels [B], drawn where not given; a scalar."""
    levels = noise_levels(len(batch.latents), generator) if levels is None else levels
    noise = torch.randn(batch.latents.shape, generator=generator)
    clean, noise = batch.latents.to(unet.device), noise.to(unet.device)
    sigma = levels.to(unet.device)[:, None, None, None, None]
    noisy = (1 - sigma) * clean + sigma * noise
    predicted = unet(noisy.to(unet.dtype), levels.to(unet.device) * 1000, embeds.states, batch.cameras,
                     pooled=embeds.pooled, attention_mask=embeds.mask, mixers=mixers)
    return (predicted.float() - (noise - clean)).square().mean()


def drop_mixers(mixers: tuple[str, ...], generator: torch.Generator, share: float = DROP_MIXER) -> tuple[str, ...]:
    """Leaves out each mixer with probability `share`."""
    keep = torch.rand(len(mixers), generator=generator) >= share
    return tuple(m for m, k in zip(mixers, keep.tolist()) if k)


def run(options: argparse.Namespace, loop: Options) -> None:
    """The whole training from parsed options."""
    preset = PRESETS[options.preset]
    dtype = getattr(torch, options.dtype)
    torch.manual_seed(options.seed)
    stored_vae = ViewAutoencoder.from_pretrained(options.autoencoder, dtype=torch.float16)
    vae = copy.deepcopy(stored_vae).to(options.device, dtype, memory_format=torch.channels_last).eval()
    unet = MultiviewUNet(**preset["model"])
    if options.start:
        start_from(unet, options.start)
    unet = unet.to(options.device, dtype, memory_format=torch.channels_last)
    pipeline = CoSERPipeline(vae=vae, text_encoder=SentenceTextEncoder(), tokenizer=load_tokenizer(), unet=unet,
                             scheduler=small_scheduler()).to(options.device)
    pipeline.set_progress_bar_config(disable=True)
    rings = list_rings(options.renders, options.limit, options.min_kind_count)
    held_out = list_rings(options.held_out)[:48]
    cache = options.renders / "latents"
    latents, elevations = encode_rings(vae, options.autoencoder, rings, cache)
    if options.data_on_device:
        latents = [entry.to(options.device) for entry in latents]
    batches = LatentRings(rings, latents, elevations, options.seed, tuple(options.view_counts or preset["view_counts"]),
                          options.views_per_batch or preset["views_per_batch"], DROP_TEXT)
    held_latents, held_elevations = encode_rings(vae, options.autoencoder, held_out, cache)
    texts = encode_captions(pipeline, [c for r in rings + held_out for c in r.captions + r.short_captions])
    optimizer = MasterOptimizer(unet, lr=options.lr or preset["lr"], ema_decay=options.ema, use_muon=options.muon)
    print(f"denoiser: {sum(p.numel() for p in unet.parameters()) / 1e6:.2f} M parameters, {options.dtype} on "
          f"{options.device}, {len(rings)} rings of {batches.ring_length} views, "
          f"{len(texts.states)} captions", flush=True)

    def loss_of_step(step: int) -> tuple[Tensor, dict]:
        batch = batches(step)
        generator = step_generator(options.seed + 1, step)
        mixers = drop_mixers(tuple(unet.config.mixers), generator)
        embeds = texts.batch(batch.captions, unet.device, unet.dtype)
        return flow_loss(unet, batch, embeds, generator, mixers), {"num_views": len(batch.cameras)}

    @torch.no_grad()
    def evaluate(step: int, log: Log) -> None:
        unet.eval()
        figures: dict[str, list[float]] = {}
        for i, (ring, clean, elevation) in enumerate(zip(held_out, held_latents, held_elevations)):
            num_views = (4, 6, 12)[i % 3] if len(clean) % 12 == 0 else len(clean)
            clean = clean[::len(clean) // num_views][None].float()
            batch = RingBatch(clean, Cameras.orbit(num_views, elevation), [ring.captions[0]])
            embeds = texts.batch(batch.captions, unet.device, unet.dtype)
            for level in (0.3, 0.6, 0.85, 0.97, 0.995):
                loss = flow_loss(unet, batch, embeds, step_generator(7, i), levels=torch.tensor([level]))
                figures.setdefault(f"loss_{level}", []).append(float(loss))
        means = {k: float(np.mean(v)) for k, v in figures.items()}
        log(step=step, held_out=True, loss=float(np.mean(list(means.values()))), **means)
        rows = []
        for prompt in SAMPLE_PROMPTS:
            generator = torch.Generator().manual_seed(0)
            result = pipeline(prompt, num_views=8, num_inference_steps=16, generator=generator)
            rows.append(views_to_uint8(result.views))
        picture_grid(np.concatenate(rows), 8).save(loop.run / f"samples-{step:06d}.png")
        unet.train()

    def save_weights(folder: Path) -> None:
        save_pipeline(pipeline, stored_vae, optimizer.averaged_copy(unet), folder)

    (loop.run / "options.json").parent.mkdir(parents=True, exist_ok=True)
    chosen = {k: str(v) for k, v in vars(options).items() if k != "run_verb"}
    (loop.run / "options.json").write_text(json.dumps(chosen, indent=1))
    train_loop(optimizer, loss_of_step, save_weights, evaluate, loop)


def start_from(unet: MultiviewUNet, folder: Path) -> None:
    """Gives `unet` the weights of the pipeline in `folder`. Raises ValueError when that one is of another shape."""
    try:
        unet.load_state_dict(load_file(folder / "unet" / "diffusion_pytorch_model.safetensors"))
    except RuntimeError as error:  # torch names the weights that differ
        raise ValueError(f"start must be a pipeline whose UNet is of the preset's shape, got {folder}") from error


def save_pipeline(pipeline: CoSERPipeline, vae: ViewAutoencoder, unet: MultiviewUNet, folder: Path) -> None:
    """Writes the pipeline with `vae` and `unet` in the place of its own, in their dtype, as safetensors."""
    copied = CoSERPipeline(vae=vae, text_encoder=pipeline.text_encoder, tokenizer=pipeline.tokenizer, unet=unet,
                           scheduler=pipeline.scheduler)
    copied.save_pretrained(folder)
