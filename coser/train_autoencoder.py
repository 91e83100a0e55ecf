"""Train the autoencoder on rendered views."""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from coser.data.dataset import Prefetched, Ring, ViewBatches, held_out_views, list_rings
from coser.models.autoencoder import ViewAutoencoder, decoded_views
from coser.optimizer import MasterOptimizer, learning_rate
from coser.peers import Peers, train_together
from coser.train_loop import Log, Options, train_loop
from coser.views import ViewSet, depths_to_uint8, picture_grid, views_to_channels, views_to_uint8

VERB = "autoencoder"
PRESETS = {
    "small": dict(model={}, batch_size=16, lr=1e-3, muon_lr=3e-3),
    "tiny": dict(model=dict(latent_channels=4, channels=(16, 16, 16), encoder_blocks=(1, 1, 1),
                            decoder_blocks=(1, 1, 1)),
                 batch_size=2, lr=1e-3, muon_lr=3e-3),
}
OBJECT_WEIGHT = 4.0  # most pixels are background: unweighted, the model collapses to it
DEPTH_WEIGHT = 4.0
HUE_WEIGHT, COARSE_WEIGHT = 2.0, 1.0
# The three figures a view is judged by, each taken over its object alone: small and thin objects count as much as large
VIEW_COLOR_WEIGHT, VIEW_COVERAGE_WEIGHT, VIEW_DEPTH_WEIGHT = 0.02, 1.2, 1.6
# of the step at half coverage, where a silhouette's edge lies: plain errors of coverage left it too small
COVERAGE_SHARPNESS = 12.0
KL_WEIGHT = 1e-5  # keeps the raw latents near unit scale


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--batch-size", type=int, help="views a step, else the preset's")
    parser.add_argument("--latent-channels", type=int, help="of the autoencoder, else the preset's")
    parser.add_argument("--processes", type=int, default=1, help="that share every batch and the processor's threads: "
                        "as many as there are cores are the quickest")
    parser.add_argument("--freeze-encoder", action="store_true",
                        help="train the decoder only: existing latents stay valid")
    # the decoder must forgive the denoiser's errors
    parser.add_argument("--noise", type=float, default=0.05, help="on latents while training, in standard deviations "
                        "of each channel; a view gets up to twice as much")
    parser.add_argument("--start", type=Path, help="autoencoder folder to start from instead of random weights; its "
                        "decoder may have fewer residual blocks than the preset's")
    parser.add_argument("--relist-every", type=int, help="look for new rings every so many steps: for a folder that is "
                        "still being rendered into. Resuming is then exact only once all rings are there")
    # the loss works at full size: 0.45 s of a step's 1.3 s on one core, 0.12 s when fused (both beside another job)
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=False,
                        help="compile the loss; needs a C++ compiler")


def reconstruction_loss(predicted: Tensor, target: Tensor) -> Tensor:
    """Distance between channels [B,5,H,W] in [0,1], a scalar.

    Weighted L1 and squared error, hue, gradients, coarse means. Hue and coarse means are there because brightness and
    edges alone leave a grey model for thousands of steps. Then, for each view, what it is judged by over its own
    object: the logarithm of the colour's squared error (PSNR), the IoU of what is at least half covered (its step
    softened), the depth's mean error.
    """
    covered = F.max_pool2d(target[:, 3:4], 5, stride=1, padding=2) > 0  # the object and a rim around it
    weight = torch.where(covered, OBJECT_WEIGHT, 1.0)
    weight = weight / weight.mean()
    error = (predicted - target) * predicted.new_tensor([1, 1, 1, 1, DEPTH_WEIGHT])[:, None, None]
    hue = error[:, :3] - error[:, :3].mean(1, keepdim=True)
    inside = (target[:, 3] > 0.5).to(error)
    area = inside.sum((1, 2)).clamp_min(1)
    squared = (error[:, :3].square().mean(1) * inside).sum((1, 2)) / area
    covers = torch.sigmoid(COVERAGE_SHARPNESS * (predicted[:, 3] - 0.5))
    both = (covers * inside).sum((1, 2))
    iou = both / (covers.sum((1, 2)) + inside.sum((1, 2)) - both).clamp_min(1)
    loss_of_view = (VIEW_COLOR_WEIGHT * (squared / 1e-4).log1p() + VIEW_COVERAGE_WEIGHT * (1 - iou)
                    + VIEW_DEPTH_WEIGHT / DEPTH_WEIGHT * (error[:, 4].abs() * inside).sum((1, 2)) / area)
    loss = (weight * (error.abs() + 2 * error.square())).mean() + HUE_WEIGHT * (weight * hue.abs()).mean()
    for _ in range(2):
        across, down = error[..., 1:] - error[..., :-1], error[..., 1:, :] - error[..., :-1, :]
        loss = loss + 0.5 * (across.abs().mean() + down.abs().mean())
        error = F.avg_pool2d(error, 2)
    coarse_weight = F.avg_pool2d(weight, 16)
    return loss + COARSE_WEIGHT * (coarse_weight * F.avg_pool2d(error, 4).abs()).mean() + loss_of_view.mean()


def autoencoder_figures(predicted: ViewSet, target: ViewSet) -> dict[str, float]:
    """RGB PSNR over the object (dB), alpha IoU, and the depth's median error (units of the object's radius).

    Nan where there is nothing to measure on: an object, or one where the prediction has one, too.
    """
    inside = target.masks > 0.5
    squared = (predicted.views - target.views).square().mean(1, keepdim=True)
    nothing = torch.tensor([torch.nan])
    psnr = torch.stack([-10 * torch.log10(s[m].mean().clamp_min(1e-10)) for s, m in zip(squared, inside) if m.any()]
                       or [nothing])
    both, either = inside & (predicted.masks > 0.5), inside | (predicted.masks > 0.5)
    valid = both & (predicted.depths > 0)
    error = (predicted.depths - target.depths).abs()
    medians = torch.stack([e[v].median() for e, v in zip(error, valid) if v.any()] or [nothing])
    iou = both.sum((1, 2, 3)) / either.sum((1, 2, 3)).clamp_min(1)
    return {"psnr": float(psnr.mean()), "alpha_iou": float(iou.mean()),
            "depth_error": float(medians.median()), "depth_error_mean": float(medians.mean())}


@torch.no_grad()
def reconstruct_views(model: ViewAutoencoder, views: ViewSet, batch: int = 32) -> ViewSet:
    """Views through the autoencoder and back, without needing latent statistics."""
    parts = []
    for i in range(0, len(views), batch):
        channels = views_to_channels(views[i:i + batch]).to(model.device)
        parts.append(decoded_views(model.decode(model.encode(channels))).to("cpu"))
    return ViewSet.cat(parts)


@torch.no_grad()
def latent_statistics(model: ViewAutoencoder, batches: ViewBatches, count: int = 20) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of each raw latent channel over `count` batches."""
    raw = torch.cat([model.encode(batches(10_000_000 + i)).float() for i in range(count)])
    return raw.mean((0, 2, 3)).tolist(), raw.std((0, 2, 3)).tolist()


def run(options: argparse.Namespace, loop: Options) -> None:
    """The whole training from parsed options."""
    train_together(train, options.processes, options.device, options, loop)


def train(options: argparse.Namespace, loop: Options, peers: Peers) -> None:
    """`run` as one of its processes."""
    preset = PRESETS[options.preset]
    torch.manual_seed(options.seed)
    chosen = {} if options.latent_channels is None else {"latent_channels": options.latent_channels}
    model, start = ViewAutoencoder(**preset["model"] | chosen), {}
    if options.start:  # parts that the folder's autoencoder lacks keep their fresh weights
        start = load_file(options.start / "diffusion_pytorch_model.safetensors")
        started = ViewAutoencoder.load_config(options.start)
        model.load_shallower(start, tuple(started["decoder_blocks"]))
    exact = {name: p.detach().clone() for name, p in model.named_parameters()} if options.start else {}
    model = model.to(options.device, getattr(torch, options.dtype), memory_format=torch.channels_last)
    if options.freeze_encoder:
        if not options.start:
            raise ValueError("freeze_encoder needs start: a random encoder must not stay as it is")
        model.encoder.requires_grad_(False)
        model.register_to_config(latent_mean=started["latent_mean"], latent_std=started["latent_std"])
    lr = learning_rate(preset, options.muon, options.lr)
    optimizer = MasterOptimizer(model, lr=lr, use_muon=options.muon, peers=peers, start=exact)

    def rings_so_far() -> list[Ring]:
        return list_rings(options.renders, options.limit)

    batch_size = options.batch_size or preset["batch_size"]
    share = peers.share(batch_size)
    batches = ViewBatches(rings_so_far(), batch_size, options.seed, options.device, options.data_on_device,
                          rings_so_far if options.relist_every else None, options.relist_every or 1)
    upcoming = Prefetched(lambda step: batches(step, share))
    distance = torch.compile(reconstruction_loss) if options.compile else reconstruction_loss
    if peers.first:  # it alone evaluates
        held_out = held_out_views(list_rings(options.held_out))
        print(f"autoencoder: {sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters, {options.dtype} on "
              f"{options.device}, {len(batches.rings)} training rings, {len(held_out)} held-out views", flush=True)

    def loss_of_step(step: int) -> tuple[Tensor, dict]:
        target = upcoming(step)
        latents = model.encode(target)
        penalty = KL_WEIGHT * latents.float().square().mean()
        generator = torch.Generator(latents.device).manual_seed(options.seed * 1_000_003 + step)
        drawn = dict(generator=generator, device=latents.device)
        noise = torch.randn(batch_size, *latents.shape[1:], dtype=torch.float32, **drawn)
        amount = 2 * options.noise * torch.rand(batch_size, 1, 1, 1, **drawn)
        spread = latents.detach().float().std((0, 2, 3), keepdim=True)
        noisy = latents + ((noise * amount)[share] * spread).to(latents.dtype)
        loss = distance(model.decode(noisy), target)
        small = model.decode_preview(latents.detach())
        loss = loss + (small - F.avg_pool2d(target, target.shape[-1] // small.shape[-1])).abs().mean()
        return loss + penalty, {"latent_rms": latents.detach().float().square().mean().sqrt()}

    def evaluate(step: int, log: Log) -> None:
        decoded = reconstruct_views(model, held_out)
        log(step=step, held_out=True, **autoencoder_figures(decoded, held_out))
        pick = np.linspace(0, len(held_out) - 1, 12).astype(int)
        rows = [f(v)[pick] for v in (held_out, decoded) for f in (views_to_uint8, depths_to_uint8)]
        picture_grid(np.concatenate(rows), 12).save(loop.run / f"views-{step:06d}.png")

    def save_weights(folder: Path) -> None:
        if model.config.latent_std is None or not options.freeze_encoder:
            mean, std = latent_statistics(model, batches)
            model.register_to_config(latent_mean=mean, latent_std=std)
        averaged = optimizer.averaged_copy(model)
        if options.freeze_encoder:  # as it was, not as the computation's dtype rounded it
            averaged.load_state_dict({k: v for k, v in start.items() if k.startswith("encoder.")}, strict=False)
        averaged.save_pretrained(folder / "vae")

    train_loop(optimizer, loss_of_step, save_weights, evaluate, loop, peers=peers)
