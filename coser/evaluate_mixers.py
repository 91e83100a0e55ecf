"""The same seed with each mixer switched off: what they do to a trained checkpoint's views, in figures and pictures."""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass

import numpy as np
import torch

from coser.agreement import cross_render_psnr
from coser.evaluate_prompts import add_drawing_options, contact_sheet, load_pipeline, sampling_arguments, sheet_row
from coser.metrics import sharpness
from coser.pipeline import CoSERPipeline, MultiviewStep
from coser.questions import read_prompts

VERB = "mixers"


@dataclass(frozen=True)
class MixerScore:
    """One prompt, drawn without fusing, with some mixers switched off ("none": all work).

    cross: median odd/even cross-render PSNR (dB on white); 0 where half of the views show nothing. coverage: share of
    the pictures that the object takes. sharpness: median over the views. apart: mean absolute difference to the views
    of all mixers, 0..1. seconds: of drawing.
    """

    switched_off: str
    prompt: str
    cross: float
    coverage: float
    sharpness: float
    apart: float
    seconds: float


def variants(mixers: tuple[str, ...]) -> dict[str, tuple[str, ...]]:
    """What is switched off, in words => the mixers that work: none off, each one off, all off."""
    each = {name: tuple(m for m in mixers if m != name) for name in mixers}
    return {"none": mixers} | each | {"all": ()}


def evaluate_mixers(pipeline: CoSERPipeline, prompts: Iterable[str], seed: int = 0,
                    **arguments) -> Iterator[tuple[MixerScore, MultiviewStep]]:
    """Draws each prompt with each variant from the same noise (`arguments` go to the pipeline)."""
    for prompt in prompts:
        whole = None
        for name, mixers in variants(tuple(pipeline.unet.config.mixers)).items():
            began = time.perf_counter()
            step = pipeline(prompt, generator=torch.Generator().manual_seed(seed), mixers=mixers, **arguments)
            seconds = time.perf_counter() - began
            views, cameras = step.views.to("cpu"), step.cameras.to("cpu")
            pictures = views.on_background()
            whole = pictures if whole is None else whole
            try:
                cross = float(cross_render_psnr(views, cameras).median())
            except ValueError:
                cross = 0.0
            yield MixerScore(name, prompt, cross, float(views.masks.mean()), float(sharpness(views).median()),
                             float((pictures - whole).abs().mean()), seconds), step


def markdown(scores: list[dict]) -> str:
    """A table with a row a variant: medians over the prompts."""
    columns = {"cross": "odd/even cross-render PSNR, dB", "coverage": "share of the picture", "sharpness": "sharpness",
               "apart": "difference to all working", "seconds": "seconds"}
    lines = ["| switched off | " + " | ".join(columns.values()) + " |", "|---" + "|--:" * len(columns) + "|"]
    for name in dict.fromkeys(score["switched_off"] for score in scores):
        mine = [score for score in scores if score["switched_off"] == name]
        medians = [statistics.median(score[column] for score in mine) for column in columns]
        lines.append(f"| {name} | " + " | ".join(f"{value:.3f}" for value in medians) + " |")
    return "\n".join(lines)


def add_options(parser: argparse.ArgumentParser) -> None:
    add_drawing_options(parser)
    parser.add_argument("--limit", type=int, help="only so many of the prompts")


def run(options: argparse.Namespace) -> None:
    pipeline, prompts = load_pipeline(options), read_prompts(options.prompts)
    scores: list[dict] = []
    rows: list[tuple[str, np.ndarray]] = []
    for score, step in evaluate_mixers(pipeline, prompts[:options.limit], options.seed, **sampling_arguments(options)):
        scores.append(asdict(score))
        rows.append((f"{score.prompt}, off: {score.switched_off}", sheet_row(step.views, None)[:-2]))
        print(" ".join(f"{k} {v:.3f}" if isinstance(v, float) else f"{v:24}" for k, v in scores[-1].items()),
              flush=True)
    print(markdown(scores))
    if options.sheet:
        contact_sheet(rows).save(options.sheet)
    if options.json:
        options.json.write_text(json.dumps(scores, indent=1) + "\n", encoding="utf-8")
