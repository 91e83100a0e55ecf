"""Measures the product: `python -m coser.evaluate VERB`; `--help` lists the verbs, each has its own."""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch

from coser import evaluate_differences, evaluate_mixers, evaluate_prompts, evaluate_surface, evaluate_table
from coser.agreement import cross_render_psnr
from coser.cameras import ELEVATION, Cameras
from coser.caption_states import captions_of, encode_captions
from coser.data.assets import Asset, list_assets, load_mesh
from coser.data.dataset import held_out_views, list_rings
from coser.devices import add_dtype_option, choose_device, dtype_asked_for
from coser.held_out_loss import held_out_losses
from coser.latents import encode_rings
from coser.metrics import psnr, render_mesh, silhouette_iou, ssim
from coser.models.autoencoder import ViewAutoencoder
from coser.pipeline import CoSERPipeline
from coser.rasterizer import render
from coser.reconstruction import reconstruct
from coser.train_autoencoder import autoencoder_figures, reconstruct_views

NOVEL_ELEVATIONS = (0.0, 20.0, 45.0)


@dataclass(frozen=True)
class ReconstructionScore:
    """One asset, rendered, reconstructed and looked at from where no view was.

    psnr (dB, on white) and ssim: at the views' elevation, halfway between them. iou_*: of the silhouettes at that
    elevation, halfway between the azimuths of the views. cross: odd/even cross-render PSNR of the input views.
    """

    id: str
    object: str
    seconds: float
    faces: int
    watertight: bool
    psnr: float
    ssim: float
    iou_0: float
    iou_20: float
    iou_45: float
    cross: float


def evaluate_reconstruction(assets: Iterable[Asset], num_views: int = 12, elevation: float = ELEVATION, size: int = 256,
                            novel_views: int = 4, **options) -> Iterator[ReconstructionScore]:
    """Renders each asset's ring, reconstructs it (`options` go there) and yields how its novel views compare."""
    ring = Cameras.orbit(num_views, elevation)
    between = (torch.arange(novel_views).double() * num_views / novel_views).floor() * 360 / num_views + 180 / num_views
    novel = Cameras.look_at_origin(between, elevation)
    resolution = {name: value for name, value in options.items() if name == "resolution"}
    for asset in assets:
        vertices, faces, colors = load_mesh(asset)
        views = render(vertices, faces, colors, ring, size)
        began = time.perf_counter()
        mesh = reconstruct(views, ring, **options)
        seconds = time.perf_counter() - began
        truth, seen = render(vertices, faces, colors, novel, size), render_mesh(mesh, novel, size)
        pictures = seen.on_background(), truth.on_background()
        overlap = []
        for height in NOVEL_ELEVATIONS:
            around = Cameras.look_at_origin(between, height)
            overlap.append(silhouette_iou(render_mesh(mesh, around, size).masks,
                                          render(vertices, faces, colors, around, size, shade=False).masks).mean())
        yield ReconstructionScore(asset.id, asset.object, seconds, len(mesh.faces), mesh.is_watertight,
                                  float(psnr(*pictures).mean()), float(ssim(*pictures).mean()), *map(float, overlap),
                                  float(cross_render_psnr(views, ring, **resolution).median()))


def _reconstruction(arguments: argparse.Namespace) -> None:
    assets = list_assets(arguments.assets, arguments.split, limit=arguments.limit)
    names = [f.name for f in fields(ReconstructionScore)][2:]
    print(f"{'object':24}", *(f"{n:>10}" for n in names))
    scores = []
    for score in evaluate_reconstruction(assets, arguments.num_views, arguments.elevation, arguments.size,
                                         resolution=arguments.resolution, max_faces=arguments.max_faces,
                                         texture_size=arguments.texture_size or None):
        scores.append(asdict(score))
        print(f"{(score.object or score.id)[:24]:24}", *(f"{float(scores[-1][n]):10.3f}" for n in names), flush=True)
    if len(scores) > 1:
        columns = {n: [float(s[n]) for s in scores] for n in names}
        tenths = {n: statistics.quantiles(values, n=10, method="inclusive") for n, values in columns.items()}
        for label, row in (("median", {n: statistics.median(values) for n, values in columns.items()}),
                           ("worst tenth", {n: tenths[n][-1 if n in ("seconds", "faces") else 0] for n in names})):
            print(f"{label:24}", *(f"{row[n]:10.3f}" for n in names))
    print(f"{len(scores)} assets, watertight: {sum(s['watertight'] for s in scores)}")
    if arguments.json:
        with open(arguments.json, "w", encoding="utf-8") as file:
            json.dump(scores, file, indent=1)


def _autoencoder(arguments: argparse.Namespace) -> None:
    model = ViewAutoencoder.from_pretrained(arguments.checkpoint / "vae", dtype=dtype_asked_for(arguments))
    views = held_out_views(list_rings(arguments.renders), arguments.per_ring)
    figures = autoencoder_figures(reconstruct_views(model, views), views)
    print(f"{len(views)} views:", ", ".join(f"{name} {value:.4f}" for name, value in figures.items()))


def _loss(arguments: argparse.Namespace) -> None:
    pipeline = CoSERPipeline.from_pretrained(arguments.checkpoint).to(dtype_asked_for(arguments))
    rings, cache = list_rings(arguments.renders, arguments.limit), arguments.renders / "latents"
    latents, elevations = encode_rings(pipeline.vae, arguments.checkpoint / "vae", rings, cache)
    texts = encode_captions(pipeline, captions_of(rings), cache)
    figures = held_out_losses(pipeline.unet, rings, latents, elevations, texts)
    print(f"{len(rings)} rings:", ", ".join(f"{name} {value:.4f}" for name, value in figures.items()))


def parser() -> argparse.ArgumentParser:
    """The command line: one verb a thing to measure."""
    top = argparse.ArgumentParser(prog="python -m coser.evaluate", description=__doc__)
    verbs = top.add_subparsers(required=True)
    verb = verbs.add_parser("reconstruction", help="rendered views of held-out assets => mesh => novel views")
    verb.add_argument("--assets", required=True, help="folder of assets (packed, or GLB/glTF/OBJ files)")
    verb.add_argument("--split", default=None, help="only this split of a packed folder, such as val")
    verb.add_argument("--limit", type=int, default=None, help="that many of the assets, spread evenly")
    verb.add_argument("--num-views", type=int, default=12)
    verb.add_argument("--elevation", type=float, default=ELEVATION)
    verb.add_argument("--size", type=int, default=256, help="pixels a side of the views")
    verb.add_argument("--resolution", type=int, default=128)
    verb.add_argument("--max-faces", type=int, default=10_000)
    verb.add_argument("--texture-size", type=int, default=1024, help="pixels a side; 0 for vertex colours alone")
    verb.add_argument("--json", default=None, help="file for the scores of every asset")
    verb.set_defaults(run=_reconstruction)
    verb = verbs.add_parser("autoencoder", help="held-out rendered views => latents => views")
    verb.add_argument("--renders", type=Path, required=True, help="folder written by coser.data.render")
    verb.add_argument("--checkpoint", type=Path, default=evaluate_prompts.SMALL, help="pipeline folder")
    verb.add_argument("--per-ring", type=int, default=2, help="views of each ring, spread evenly")
    add_dtype_option(verb)
    verb.set_defaults(run=_autoencoder)
    verb = verbs.add_parser("loss", help="the flow's loss on held-out rings, at several levels of noise")
    verb.add_argument("--renders", type=Path, required=True, help="folder written by coser.data.render")
    verb.add_argument("--checkpoint", type=Path, default=evaluate_prompts.SMALL, help="pipeline folder")
    verb.add_argument("--limit", type=int, help="the first so many rings")
    add_dtype_option(verb)
    verb.set_defaults(run=_loss)
    verb = verbs.add_parser(evaluate_prompts.VERB, help="prompts => views => mesh, and a contact sheet")
    evaluate_prompts.add_options(verb)
    verb.set_defaults(run=evaluate_prompts.run)
    verb = verbs.add_parser(evaluate_mixers.VERB, help="the same seed with each mixer switched off")
    evaluate_mixers.add_options(verb)
    verb.set_defaults(run=evaluate_mixers.run)
    verb = verbs.add_parser(evaluate_table.VERB, help="all figures of quality, beside true and shuffled renders")
    evaluate_table.add_options(verb)
    verb.set_defaults(run=evaluate_table.run)
    verb = verbs.add_parser(evaluate_differences.VERB, help="what tables of the same prompts differ in")
    evaluate_differences.add_options(verb)
    verb.set_defaults(run=evaluate_differences.run)
    verb = verbs.add_parser(evaluate_surface.VERB, help="surfaces and textures against the true assets and baselines")
    evaluate_surface.add_options(verb)
    verb.set_defaults(run=evaluate_surface.run)
    return top


def main(arguments: list[str] | None = None) -> None:
    options = parser().parse_args(arguments)
    try:
        choose_device(getattr(options, "device", None))
        options.run(options)
    except (ValueError, OSError, ImportError) as error:
        sys.exit(f"coser: {error}")


if __name__ == "__main__":
    main()
