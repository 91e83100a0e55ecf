"""Measures what a checkpoint draws: prompts => views => mesh, with figures a prompt and a contact sheet to look at."""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont

from coser.agreement import cross_render_psnr
from coser.cameras import Cameras
from coser.consistency import CONSISTENCY, fused_views
from coser.devices import add_dtype_option, dtype_asked_for
from coser.metrics import psnr, render_mesh, sharpness, silhouette_iou
from coser.pipeline import GUIDANCE_RESCALE, CoSERPipeline, MultiviewStep
from coser.questions import read_prompts
from coser.reconstruction import QUICK, Mesh, reconstruct
from coser.symmetry import Symmetries
from coser.views import ViewSet, views_to_uint8
from coser.vocabulary import load_vocabulary, sentence_embedder, usual_symmetries

VERB = "prompts"
SMALL = Path(__file__).parent / "checkpoints" / "small"
SHEET_VIEWS, SHEET_TILE, LABEL_HEIGHT = 6, 128, 20


@dataclass(frozen=True)
class PromptScore:
    """One prompt, drawn and reconstructed.

    cross: median odd/even cross-render PSNR (dB on white). own_psnr, own_iou: the mesh of all views seen from their own
    cameras against the views. coverage: share of the pictures that the object takes. sharpness: see
    `coser.metrics.sharpness`, median over the views. seconds: prompt to mesh.
    """

    prompt: str
    seconds: float
    faces: int
    watertight: bool
    cross: float
    own_psnr: float
    own_iou: float
    coverage: float
    sharpness: float


def evaluate_prompts(pipeline: CoSERPipeline, prompts: Iterable[str], seed: int = 0,
                     symmetries: Symmetries = Symmetries({}),
                     **arguments) -> Iterator[tuple[PromptScore, MultiviewStep, Mesh]]:
    """Draws each prompt from the same seed (`arguments` go to the pipeline) and yields its score, views and mesh."""
    for prompt in prompts:
        began = time.perf_counter()
        result = pipeline(prompt, generator=torch.Generator().manual_seed(seed), symmetry=symmetries.of_prompt(prompt),
                          **arguments)
        views, cameras = result.views.to("cpu"), result.cameras.to("cpu")
        mesh = reconstruct(views, cameras, drawn=True, **QUICK)
        seconds = time.perf_counter() - began
        seen = render_mesh(mesh, cameras, views.views.shape[-1])
        own_psnr = psnr(seen.on_background(), views.on_background())
        score = PromptScore(prompt, seconds, len(mesh.faces), mesh.is_watertight,
                            float(cross_render_psnr(views, cameras).median()), float(own_psnr.mean()),
                            float(silhouette_iou(seen.masks, views.masks).mean()), float(views.masks.mean()),
                            float(sharpness(views).median()))
        yield score, result, mesh


def sheet_row(drawn: ViewSet, mesh: Mesh | None) -> np.ndarray:
    """Evenly spaced views, then the mesh from the front and from behind at another height: uint8 [tiles,S,S,3].

    White in the place of a mesh that there is not.
    """
    views = drawn.to("cpu")[torch.arange(SHEET_VIEWS) * len(drawn) // SHEET_VIEWS]
    pictures, size = views_to_uint8(views), views.views.shape[-1]
    turned = np.full_like(pictures[:2], 255)
    if mesh is not None:
        turned = views_to_uint8(render_mesh(mesh, Cameras.look_at_origin([45.0, 225.0], 30.0), size))
    pictures = np.concatenate([pictures, turned])
    small = F.interpolate(torch.from_numpy(pictures).permute(0, 3, 1, 2).float(), (SHEET_TILE, SHEET_TILE), mode="area")
    return small.round().to(torch.uint8).permute(0, 2, 3, 1).numpy()


def contact_sheet(rows: list[tuple[str, np.ndarray]], columns: int = 2) -> Image.Image:
    """Labelled rows of pictures, `columns` rows side by side."""
    tiles = len(rows[0][1])
    width, height = tiles * SHEET_TILE, SHEET_TILE + LABEL_HEIGHT
    sheet = Image.new("RGB", (columns * width + (columns - 1) * 16, -(-len(rows) // columns) * height), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(14)
    for i, (label, pictures) in enumerate(rows):
        x, y = i % columns * (width + 16), i // columns * height
        draw.text((x + 4, y + 2), label, fill=(60, 60, 60), font=font)
        sheet.paste(Image.fromarray(np.concatenate(list(pictures), axis=1)), (x, y + LABEL_HEIGHT))
    return sheet


def add_sampling_options(parser: argparse.ArgumentParser) -> None:
    """How a checkpoint draws, in every evaluation that lets it."""
    parser.add_argument("--checkpoint", type=Path, default=SMALL, help="pipeline folder")
    parser.add_argument("--num-views", type=int, default=12)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--guidance-scale", type=float, default=4.0)
    parser.add_argument("--guidance-rescale", type=float, default=GUIDANCE_RESCALE)
    parser.add_argument("--skip-guidance-scale", type=float, default=0.0)
    parser.add_argument("--redraw", type=float, default=0.0)
    parser.add_argument("--seed", type=int, default=0)
    add_dtype_option(parser)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")


def sampling_arguments(options: argparse.Namespace) -> dict[str, float]:
    """What `add_sampling_options` say to `CoSERPipeline`."""
    return dict(num_views=options.num_views, num_inference_steps=options.steps,
                guidance_scale=options.guidance_scale, guidance_rescale=options.guidance_rescale,
                skip_guidance_scale=options.skip_guidance_scale, redraw=options.redraw)


def load_pipeline(options: argparse.Namespace) -> CoSERPipeline:
    """`--checkpoint`, in `--dtype` on `--device`."""
    return CoSERPipeline.from_pretrained(options.checkpoint, dtype=dtype_asked_for(options)).to(options.device)


def add_drawing_options(parser: argparse.ArgumentParser) -> None:
    """What every evaluation of prompts in a text file takes."""
    add_sampling_options(parser)
    parser.add_argument("--prompts", type=Path, required=True, help="text file, a prompt a line")
    parser.add_argument("--sheet", type=Path, help="where the contact sheet goes (PNG or WebP)")
    parser.add_argument("--json", type=Path, help="file for all scores")


def add_symmetry_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--symmetry", choices=("none", "auto"), default="none", help="none, as the app draws, or what "
                        "the prompt's kind of object usually has")


def symmetries_asked_for(options: argparse.Namespace, pipeline: CoSERPipeline) -> Symmetries:
    """What `--symmetry` means for `--checkpoint`."""
    if options.symmetry == "none":
        return Symmetries({})
    vocabulary = load_vocabulary(options.checkpoint, sentence_embedder(pipeline))
    return usual_symmetries(options.checkpoint, pipeline, vocabulary)


def add_options(parser: argparse.ArgumentParser) -> None:
    add_drawing_options(parser)
    parser.add_argument("--consistency", type=float, default=CONSISTENCY,
                        help="share of the fused object (default %(default)s, the app's)")
    add_symmetry_option(parser)


def run(options: argparse.Namespace) -> None:
    pipeline, prompts = load_pipeline(options), read_prompts(options.prompts)
    names = ["seconds", "faces", "watertight", "cross", "own_psnr", "own_iou", "coverage", "sharpness"]
    print(f"{'prompt':28}", *(f"{n:>10}" for n in names))
    scores, rows, symmetries = [], [], symmetries_asked_for(options, pipeline)
    for prompt in prompts:
        try:
            (score, result, mesh), = evaluate_prompts(
                pipeline, [prompt], options.seed, symmetries, consistency=options.consistency, fuse=fused_views,
                **sampling_arguments(options))
        except ValueError as error:  # a prompt whose views show no surface must not cost the others their figures
            print(f"{prompt[:28]:28} {error}", flush=True)
            rows.append((f"{prompt}: no surface", np.full((SHEET_VIEWS + 2, SHEET_TILE, SHEET_TILE, 3), 255, np.uint8)))
            continue
        scores.append(asdict(score))
        rows.append((score.prompt, sheet_row(result.views, mesh)))
        print(f"{score.prompt[:28]:28}", *(f"{float(scores[-1][n]):10.3f}" for n in names), flush=True)
    if scores:
        print(f"{'median':28}", *(f"{statistics.median(float(s[n]) for s in scores):10.3f}" for n in names))
    print(f"{len(prompts)} prompts, meshes: {len(scores)}, watertight: {sum(s['watertight'] for s in scores)}")
    if options.sheet:
        contact_sheet(rows).save(options.sheet, optimize=True)
    if options.json:
        options.json.write_text(json.dumps(scores, indent=1) + "\n", encoding="utf-8")
