"""Train the denoiser on latents of rendered rings."""

from __future__ import annotations

import argparse
import copy
import functools
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from coser.auxiliary_losses import Overheard, depths_of, dispersive_loss
from coser.average import UNET
from coser.caption_states import CaptionStates, captions_of, encode_captions
from coser.data.dataset import (LatentRings, Prefetched, Ring, RingBatch, check_view_counts, list_rings,
                                step_generator)
from coser.flow import LEVELS, TRAINING_SHIFT, WEIGHTINGS, flow_loss, level_weights, noise_levels, small_scheduler
from coser.held_out_loss import held_out_losses
from coser.latents import encode_rings, encoded_rings, latent_size, ring_length
from coser.models.autoencoder import ViewAutoencoder
from coser.models.block import MIXERS, NEEDS_WEIGHTS, MultiviewTransformerBlock
from coser.models.resnet import ResnetBlock
from coser.models.text_encoder import SentenceTextEncoder, load_tokenizer
from coser.models.unet import SAME_SHAPES, MultiviewUNet
from coser.optimizer import MasterOptimizer, learning_rate
from coser.peers import Peers, train_together
from coser.pipeline import CoSERPipeline, PromptEmbeds
from coser.throughput import Throughput, rate_here
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
                  views_per_batch=36, view_counts=(4, 6, 8, 12), lr=6e-4, muon_lr=2e-3),
    # for comparisons of many short trainings: 40 to 60 views a second on one core without AMX
    "mini": dict(model=dict(unet=unet_config((32, 64, 96), 1, (1, 2, 3)), pooled_dim=384, mixer_head_size=32,
                            scan_head_size=32),
                 views_per_batch=36, view_counts=(4, 6, 12), lr=1e-3, muon_lr=4e-3),
    "tiny": dict(model=dict(unet=unet_config((16, 16), 1, (1, 1), 4), pooled_dim=384, mixer_head_size=16,
                            scan_head_size=16, scan_state_size=8),
                 views_per_batch=4, view_counts=(2, 4), lr=1e-3, muon_lr=4e-3),
}
DROP_TEXT = 0.1
DROP_MIXER = 0.1
HELD_OUT_RINGS = 48  # enough for held-out losses that move by the weights and not by chance
GRAPHS = 256  # of a compiled part: one for each of its shapes, which come of view counts and places in the UNet
SAMPLE_PROMPTS = ("a red barrel", "a green pine tree", "a yellow taxi", "a wooden chair", "a brown treasure chest",
                  "a grey castle tower")
SAMPLE = dict(num_views=8, num_inference_steps=16)  # how each is drawn


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--autoencoder", type=Path, required=True, help="trained autoencoder's folder (.../vae)")
    parser.add_argument("--views-per-batch", type=int, help="views a step, else the preset's")
    parser.add_argument("--view-counts", type=int, nargs="+", help="ring sizes drawn in training, else those of "
                        "the preset that divide the rendered rings")
    parser.add_argument("--min-kind-count", type=int, default=1, help="only kinds of objects with so many assets")
    parser.add_argument("--elevations", type=float, nargs="+", metavar="DEGREES", help="only rings seen from these: the "
                        "app draws at 20 unless told otherwise")
    parser.add_argument("--balance", type=float, default=0.5, help="of kinds: 0 draws every ring as often as another, 1 "
                        "every kind")
    parser.add_argument("--start", type=Path, help="pipeline folder whose UNet to start from instead of random weights")
    parser.add_argument("--encoded-only", action="store_true", help="train on the rings that have latents already")
    parser.add_argument("--mirror", action=argparse.BooleanOptionalAction, default=False,
                        help="train on the mirror images of all rings, too")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=False, help="compile the UNet's "
                        "parts, for each view count anew; needs a C++ compiler, on CUDA Triton")
    parser.add_argument("--processes", type=int, default=1, help="that share every batch and the processor's threads: "
                        "as many as there are cores are the quickest")
    parser.add_argument("--ema", type=float, default=0.999, help="decay of the averaged weights")
    parser.add_argument("--model", type=json.loads, default={}, metavar="JSON", help="arguments of MultiviewUNet in "
                        "place of the preset's; those below \"unet\" join the preset's")
    parser.add_argument("--samples", action=argparse.BooleanOptionalAction, default=True, help="draw some prompts with "
                        "each evaluation")
    parser.add_argument("--levels", choices=LEVELS, default="uniform", help="noise levels, before they are shifted")
    parser.add_argument("--training-shift", type=float, default=TRAINING_SHIFT, help="of noise levels, towards noise")
    parser.add_argument("--drop-mixers", type=float, default=DROP_MIXER, metavar="SHARE", help="of the steps in which "
                        "each mixer is left out, so that switching one off when sampling stays meaningful")
    parser.add_argument("--correspondence", type=float, default=0.0, metavar="WEIGHT", help="of the loss that tells "
                        "the trajectory attention, from rendered depths, which tokens show the same place")
    parser.add_argument("--dispersion", type=float, default=0.0, metavar="WEIGHT", help="of the loss that keeps the "
                        "middle block's features of different objects apart")
    parser.add_argument("--weighting", choices=WEIGHTINGS, default="flow", help="what a noise level counts: the same "
                        "for errors of the flow, or for those of the clean latents, or min-SNR-5")


def drop_mixers(mixers: tuple[str, ...], generator: torch.Generator, share: float = DROP_MIXER) -> tuple[str, ...]:
    """Leaves out each mixer with probability `share`."""
    keep = torch.rand(len(mixers), generator=generator) >= share
    return tuple(m for m, k in zip(mixers, keep.tolist()) if k)


def view_counts_of(options: argparse.Namespace, ring_length: int) -> tuple[int, ...]:
    """The ring sizes asked for; else those of the preset that divide a rendered ring, all of them where none does."""
    usual = PRESETS[options.preset]["view_counts"]
    return tuple(options.view_counts or [n for n in usual if ring_length % n == 0] or usual)


def compile_parts(unet: MultiviewUNet, backend: str = "inductor") -> None:
    """Compiles, in place and when first called, residual blocks, feed-forwards and the mixers with many small steps.

    Parts rather than the whole: which mixers are left out differs from step to step, and each choice would be another
    whole. Shapes are fixed (dynamic=False), so that each view count has graphs of its own.
    """
    torch._dynamo.config.recompile_limit = max(GRAPHS, torch._dynamo.config.recompile_limit)
    for part in unet.modules():
        if isinstance(part, ResnetBlock):
            part.compile(dynamic=False, backend=backend)
        elif isinstance(part, MultiviewTransformerBlock):
            part.ff.compile(dynamic=False, backend=backend)
            for mixer in ("glance", "rectification"):
                if hasattr(part, mixer):
                    getattr(part, mixer).compile(dynamic=False, backend=backend)


def small_pipeline(options: argparse.Namespace, vae: ViewAutoencoder | None, size: int = 16) -> CoSERPipeline:
    """The pipeline to train on the options' device, in their dtype, which will draw latents of `size` a side.

    vae may be missing while only text is encoded.
    """
    dtype = getattr(torch, options.dtype)
    model = PRESETS[options.preset]["model"]
    latent = {} if vae is None else dict.fromkeys(("in_channels", "out_channels"), vae.config.latent_channels)
    two_d = model["unet"] | options.model.get("unet", {}) | latent | {"sample_size": size}
    started = config_to_go_on_with(options.start) if options.start else {}
    unet = MultiviewUNet(**model | started | options.model | {"unet": two_d})
    if options.start:
        start_from(unet, options.start)
    unet = unet.to(options.device, dtype, memory_format=torch.channels_last)
    pipeline = CoSERPipeline(vae=vae, text_encoder=SentenceTextEncoder(), tokenizer=load_tokenizer(), unet=unet,
                             scheduler=small_scheduler()).to(options.device)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@dataclass(frozen=True)
class TrainingData:
    """What a training reads: rings with their latents and elevations (degrees), the same held out, and all captions."""

    rings: list[Ring]
    latents: list[Tensor]
    elevations: list[float]
    held_out: list[Ring]
    held_latents: list[Tensor]
    held_elevations: list[float]
    texts: CaptionStates


def cache_folder(options: argparse.Namespace) -> Path:
    return options.renders / "latents"


def load_autoencoder(options: argparse.Namespace) -> tuple[ViewAutoencoder, ViewAutoencoder]:
    """The options' autoencoder as it is stored, and as it computes."""
    stored = ViewAutoencoder.from_pretrained(options.autoencoder, dtype=torch.float16)
    computing = copy.deepcopy(stored).to(options.device, getattr(torch, options.dtype),
                                         memory_format=torch.channels_last)
    return stored, computing.eval()


def rings_to_train_on(options: argparse.Namespace) -> list[Ring]:
    """Those the options ask for, whether encoded or not, and of whichever elevation."""
    rings = list_rings(options.renders, options.limit, options.min_kind_count, subjects=True)
    return rings + [ring.mirror() for ring in rings] if options.mirror else rings


def encode_together(options: argparse.Namespace, vae: ViewAutoencoder, peers: Peers) -> None:
    """Every process encodes its share of the rings; once this returns, the latents of all of them are in files."""
    if peers.size > 1 and not options.encoded_only:
        mine = rings_to_train_on(options)[peers.rank::peers.size]
        encoded_rings(vae, options.autoencoder, mine, cache_folder(options))
        peers.wait()


def prepare(options: argparse.Namespace, pipeline: CoSERPipeline, until: float = math.inf) -> TrainingData:
    """Encodes what is not encoded yet, rings and captions, and loads it: the next start finds all of it in files.

    until: a reading of time.perf_counter() at which encoding the rings to train on stops; the others are left out.
    """
    rings = rings_to_train_on(options)
    held_out = list_rings(options.held_out)[:HELD_OUT_RINGS]
    cache = cache_folder(options)
    held_latents = encode_rings(pipeline.vae, options.autoencoder, held_out, cache)
    tensors = encoded_rings(pipeline.vae, options.autoencoder, [] if options.encoded_only else rings, cache, until)
    rings = [r for r in rings if r.key in tensors]
    if not rings:
        raise ValueError(f"{cache} holds no latents of {options.renders} by {options.autoencoder} yet")
    elevations = {r.key: float(tensors[f"{r.key}/elevation"]) for r in rings}
    if options.elevations:
        rings = [r for r in rings if any(abs(elevations[r.key] - asked) < 0.5 for asked in options.elevations)]
        if not rings:
            there = ", ".join(f"{e:g}" for e in sorted(set(elevations.values())))
            raise ValueError(f"elevations must be among those of the rings, {there}, got {options.elevations}")
    latents = [tensors[r.key] for r in rings]
    elevations = [elevations[r.key] for r in rings]
    texts = encode_captions(pipeline, captions_of(rings + held_out), cache)
    return TrainingData(rings, latents, elevations, held_out, *held_latents, texts)


def run(options: argparse.Namespace, loop: Options) -> None:
    """The whole training from parsed options."""
    train_together(train, options.processes, options.device, options, loop)


def train(options: argparse.Namespace, loop: Options, peers: Peers) -> None:
    """`run` as one of its processes."""
    preset = PRESETS[options.preset]
    torch.manual_seed(options.seed)
    stored_vae, vae = load_autoencoder(options)
    first = list_rings(options.renders)[0]
    check_view_counts(view_counts_of(options, ring_length(first)), ring_length(first))  # before hours of encoding
    pipeline = small_pipeline(options, vae, latent_size(first))
    encode_together(options, vae, peers)
    with peers.first_goes_ahead():
        unet, data = pipeline.unet, prepare(options, pipeline)
    rings, held_out, texts, latents = data.rings, data.held_out, data.texts, data.latents
    if options.data_on_device:
        latents, texts = torch.stack(latents).to(options.device), texts.on(options.device)
    batches = LatentRings(rings, latents, data.elevations, options.seed, view_counts_of(options, len(latents[0])),
                          options.views_per_batch or preset["views_per_batch"], DROP_TEXT,
                          depths_of(rings) if options.correspondence else None, peers.size, options.balance)
    overheard = Overheard(unet) if options.correspondence or options.dispersion else None
    lr = learning_rate(preset, options.muon, options.lr)
    optimizer = MasterOptimizer(unet, lr=lr, ema_decay=options.ema, use_muon=options.muon, peers=peers,
                                start=load_file(options.start / UNET) if options.start else {})
    if options.compile:
        compile_parts(unet)
    say = functools.partial(print, flush=True) if peers.first else lambda line: None
    say(f"denoiser: {sum(p.numel() for p in unet.parameters()) / 1e6:.2f} M parameters, {options.dtype} on "
          f"{options.device}, {len(rings)} rings of {batches.ring_length} views, "
        f"{len(data.texts.states)} captions")
    peers.wait()  # a rate that others share is measured while they use the machine, too
    meter = Throughput(unet.device, unet.dtype, peers.size * rate_here(unet.device, unet.dtype))
    say(f"plain {options.dtype} matmul: {meter.matmul:.3f} TFLOP/s, all processes together")

    def batch_of_step(step: int) -> tuple[RingBatch, PromptEmbeds]:
        batch = batches(step)
        return batch, texts.batch(batch.captions, unet.device, unet.dtype)

    upcoming = Prefetched(batch_of_step)
    drawn = noise_levels(100_000, step_generator(0, 0), options.training_shift, options.levels)
    usual_weight = float(level_weights(drawn, options.weighting).mean())

    def loss_of_step(step: int) -> tuple[Tensor, dict]:
        batch, embeds = upcoming(step)
        generator = step_generator(options.seed + 1, step)
        # by draws of their own: models with more or fewer modules then see the same noise
        mixers = drop_mixers(tuple(unet.config.mixers), step_generator(options.seed + 2, step), options.drop_mixers)
        samples, num_views = batch.latents.shape[:2]
        meter.did(samples * num_views, samples * sample_flop(meter, unet, batch, embeds, mixers))
        levels = noise_levels(samples, generator, options.training_shift, options.levels)
        asked = levels, options.weighting, peers.share(samples)
        figures = {"num_views": num_views}
        if overheard is None:
            return flow_loss(unet, batch, embeds, generator, mixers, *asked) / usual_weight, figures
        overheard.forget()  # also what was heard while operations were counted
        loss = flow_loss(unet, batch, embeds, generator, mixers, *asked) / usual_weight
        figures["flow"] = float(loss.detach())
        if options.correspondence:
            extra = overheard.correspondence(batch.depths[peers.share(samples)].to(unet.device))
            loss, figures["correspondence"] = loss + options.correspondence * extra, float(extra.detach())
        if options.dispersion:
            extra = dispersive_loss(overheard.middle, num_views)
            loss, figures["dispersion"] = loss + options.dispersion * extra, float(extra.detach())
        overheard.forget()
        return loss, figures

    @torch.no_grad()
    def evaluate(step: int, log: Log) -> None:
        unet.eval()
        log(step=step, held_out=True, **held_out_losses(unet, held_out, data.held_latents, data.held_elevations, texts))
        rows = []
        for prompt in SAMPLE_PROMPTS if options.samples else ():
            generator = torch.Generator().manual_seed(0)
            result = pipeline(prompt, generator=generator, **SAMPLE)
            rows.append(views_to_uint8(result.views))
        if rows:
            picture_grid(np.concatenate(rows), SAMPLE["num_views"]).save(loop.run / f"samples-{step:06d}.png")
        unet.train()

    def save_weights(folder: Path) -> None:
        save_pipeline(pipeline, stored_vae, optimizer.averaged_copy(unet), folder)

    if peers.first:
        (loop.run / "options.json").parent.mkdir(parents=True, exist_ok=True)
        chosen = {k: str(v) for k, v in vars(options).items() if k != "run_verb"}
        (loop.run / "options.json").write_text(json.dumps(chosen, indent=1))
    train_loop(optimizer, loss_of_step, save_weights, evaluate, loop, meter, peers)


def sample_flop(meter: Throughput, unet: MultiviewUNet, batch: RingBatch, embeds: PromptEmbeds,
                mixers: tuple[str, ...]) -> int:
    """Operations of a step, forwards and backwards, for one of the batch's samples.

    Counted once for a view count and set of mixers, on the first sample that has them; all samples cost the same but
    for the length of their texts. Leaves the parameters without gradients.
    """
    def work() -> None:
        one = RingBatch(batch.latents[:1], batch.cameras, batch.captions[:1])
        text = PromptEmbeds(embeds.states[:1], embeds.mask[:1], embeds.pooled[:1])
        flow_loss(unet, one, text, torch.Generator().manual_seed(0), mixers).backward()
        unet.zero_grad(set_to_none=True)

    return meter.flop_once((len(batch.cameras), mixers), work)


def config_to_go_on_with(folder: Path) -> dict[str, Any]:
    """What of the config of the pipeline's UNet in `folder` goes on with its weights.

    mixers: the method's own and any others that it has, so that all of its weights have their place. And what no
    weight's shape tells, as SAME_SHAPES. Raises ValueError when there is no pipeline.
    """
    try:
        config = MultiviewUNet.load_config(folder / "unet", local_files_only=True)
    except OSError as error:
        raise ValueError(f"start must be a pipeline's folder, with unet/config.json in it, got {folder}") from error
    same = {name: config[name] for name in SAME_SHAPES if name in config}
    return same | {"mixers": tuple(dict.fromkeys((*MIXERS, *config.get("mixers", ()))))}


def start_from(unet: MultiviewUNet, folder: Path) -> None:
    """Gives `unet` the weights of the pipeline in `folder`.

    Mixers that one lacks keep their own weights, silent at first: so a model of single views is inflated. Raises
    ValueError when it is of another shape, or has weights that `unet` has not.
    """
    refusal = f"start must be a pipeline whose UNet is of the preset's shape, got {folder}"
    try:
        found = unet.load_state_dict(load_file(folder / UNET), strict=False)
    except RuntimeError as error:  # torch names the weights that differ
        raise ValueError(refusal) from error
    lacking = [name for name in found.missing_keys if not set(name.split(".")) & set(NEEDS_WEIGHTS)]
    if lacking or found.unexpected_keys:
        raise ValueError(f"{refusal}: weights differ, such as {(lacking + found.unexpected_keys)[0]}")


def save_pipeline(pipeline: CoSERPipeline, vae: ViewAutoencoder, unet: MultiviewUNet, folder: Path) -> None:
    """Writes the pipeline with `vae` and `unet` in the place of its own, in their dtype, as safetensors."""
    copied = CoSERPipeline(vae=vae, text_encoder=pipeline.text_encoder, tokenizer=pipeline.tokenizer, unet=unet,
                           scheduler=pipeline.scheduler)
    copied.save_pretrained(folder)
