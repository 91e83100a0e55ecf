"""Compare trainings of the denoiser: equal time or steps, same seeds, held-out figures side by side.

`python -m coser.compare coser/data/comparisons/conditioning.json --out runs/compare/conditioning --minutes 5
--seeds 0 1 --arguments "--renders R --held-out H --autoencoder V"` trains every variant of the file with every seed,
one after the other, for so many minutes of computing (or so many --steps: the same samples, however long they take),
and writes table.md and table.json after each. A finished run is not repeated: the same line again goes on, also with
more seeds, and several at once share the runs of a folder.
"""

from __future__ import annotations

import argparse
import json
import math
import shlex
import shutil
import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from filelock import FileLock, Timeout
from PIL import Image

from coser import train
from coser.agreement import neighbour_color_psnr
from coser.cameras import Cameras
from coser.data.dataset import RingBatch, list_rings, step_generator
from coser.data.render import load_ring
from coser.evaluate_prompts import contact_sheet, sheet_row
from coser.flow import flow_loss
from coser.metrics import silhouette_iou
from coser.pipeline import CoSERPipeline
from coser.throughput import bytes_kept
from coser.train_autoencoder import autoencoder_figures
from coser.train_loop import checkpoints
from coser.views import ViewSet

RINGS, VIEWS = 8, 12  # held-out rings whose estimates are decoded, and views of each
LEVELS = (0.85, 0.97)  # from there on; a nearly clean estimate says nothing about the denoiser


@dataclass(frozen=True)
class Variant:
    """One line of a comparison: its name, and what its training's command line has besides the common arguments."""

    name: str
    arguments: tuple[str, ...]

    @property
    def slug(self) -> str:
        return "".join(c if c.isalnum() else "-" for c in self.name)


def load_variants(path: Path) -> list[Variant]:
    """The variants of a JSON file, the plain one first: {"about": ..., "variants": {name: "command line", ...}}."""
    variants = json.loads(path.read_text(encoding="utf-8"))["variants"]
    return [Variant(name, tuple(shlex.split(line))) for name, line in variants.items()]


@torch.no_grad()
def estimates(pipeline: CoSERPipeline, renders: Path,
              chosen: slice = slice(None)) -> Iterator[tuple[float, ViewSet, ViewSet, Cameras]]:
    """Of every held-out ring `chosen` among RINGS and every level of LEVELS: the level, the decoded one-step estimate,
    the true views, their cameras. The first caption is given, without guidance."""
    rings = list_rings(renders)
    rings = rings[::max(1, len(rings) // RINGS)][:RINGS]
    for i, ring in list(enumerate(rings))[chosen]:
        views, cameras = load_ring(ring.path)
        stride = max(1, len(views) // VIEWS)
        views, cameras = views[::stride], cameras[::stride]
        embeds = pipeline.encode_prompt([ring.captions[0]])
        clean = pipeline.vae.views_to_latents(views.to(pipeline.device)).float()
        for level in LEVELS:
            noise = torch.randn(clean.shape, generator=step_generator(11, i)).to(clean)
            noisy = (1 - level) * clean + level * noise
            time = torch.tensor([level * 1000], device=clean.device)
            flow = pipeline.unet(noisy[None].to(pipeline.unet.dtype), time, embeds.states, cameras,
                                 pooled=embeds.pooled, attention_mask=embeds.mask)[0].float()
            yield level, pipeline.latents_to_views(noisy - level * flow).to("cpu"), views, cameras


def estimate_figures(pipeline: CoSERPipeline, renders: Path) -> dict[str, float]:
    """How close decoded one-step estimates come to held-out views, at LEVELS of noise: comparable between autoencoders.

    RGB PSNR over the object (dB) and silhouette IoU, means over views, and how alike neighbours paint the same places
    of the true surface (dB).
    """
    figures: dict[str, list[float]] = {}
    for level, estimate, views, cameras in estimates(pipeline, renders):
        found = {"psnr": autoencoder_figures(estimate, views)["psnr"],
                 "iou": float(silhouette_iou(estimate.masks, views.masks).mean()),
                 "neighbours": neighbour_color_psnr(estimate, views, cameras)}
        for name, value in found.items():
            figures.setdefault(f"{name}_{level}", []).append(value)
    means = {name: [v for v in values if not math.isnan(v)] for name, values in figures.items()}
    return {name: statistics.mean(values) for name, values in means.items() if values}


def sheet(variants: list[Variant], options: argparse.Namespace, seed: int, ring: int) -> Image.Image:
    """The true views of held-out ring number `ring`, and below them every finished variant's estimates of them."""
    rows = []
    for variant in variants:
        folder = options.out / f"{variant.slug}-{seed}"
        if (folder / "row.json").is_file():
            pipeline = CoSERPipeline.from_pretrained(checkpoints(folder)[-1])
            pipeline.unet.float(), pipeline.vae.float()
            parsed, _ = train.parse(command_line(variant, seed, folder, options))
            drawn = list(estimates(pipeline, parsed.held_out, slice(ring, ring + 1)))
            rows = rows or [("truth", sheet_row(drawn[0][2], None)[:-2])]
            rows.append((f"{variant.name}, from noise level {drawn[0][0]}", sheet_row(drawn[0][1], None)[:-2]))
    return contact_sheet(rows)


def mebibytes_kept(pipeline: CoSERPipeline, num_views: int = 12) -> float:
    """What one ring keeps for the backward pass, MiB."""
    unet = pipeline.unet
    channels, size = (unet.config.unet[name] for name in ("in_channels", "sample_size"))
    batch = RingBatch(torch.zeros(1, num_views, channels, size, size), Cameras.orbit(num_views), [""])
    embeds = pipeline.encode_prompt(batch.captions)
    return bytes_kept(lambda: flow_loss(unet, batch, embeds, step_generator(0, 0))) / 2**20


def command_line(variant: Variant, seed: int, folder: Path, options: argparse.Namespace) -> list[str]:
    """What `coser.train` is told of a run."""
    budget = ["--steps", str(options.steps)] if options.steps else ["--minutes", str(options.minutes)]
    return ["denoiser", "--run", str(folder), *budget, "--processor-time", "--seed", str(seed), "--save-every",
            "1000000", "--evaluate-every", "1000000", *shlex.split(options.arguments), *variant.arguments]


def told(variant: Variant, seed: int, options: argparse.Namespace) -> str:
    """What its row depends on, wherever its folder is."""
    return shlex.join(command_line(variant, seed, Path("run"), options))


def train_variant(variant: Variant, seed: int, folder: Path, options: argparse.Namespace) -> dict:
    """One run from its first step to its figures; its row. The checkpoint's training state is not kept."""
    parsed, loop = train.parse(command_line(variant, seed, folder, options))
    parsed.run_verb(parsed, loop)
    checkpoint = checkpoints(folder)[-1]
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    pipeline = CoSERPipeline.from_pretrained(checkpoint)
    dtype = getattr(torch, parsed.dtype)
    pipeline.to(parsed.device)
    pipeline.unet.to(dtype), pipeline.vae.to(dtype)
    held_out = next(row for row in reversed(log) if row.get("held_out"))
    row = {"variant": variant.name, "seed": seed, "steps": held_out["step"], "told": told(variant, seed, options),
           "seconds": json.loads((checkpoint / "training.json").read_text())["seconds"],
           "views_per_second": statistics.median(r["views_per_second"] for r in log if "views_per_second" in r),
           "mebibytes": mebibytes_kept(pipeline), "parameters": sum(p.numel() for p in pipeline.unet.parameters()),
           **{k: v for k, v in held_out.items() if k.startswith("loss")},
           **estimate_figures(pipeline, parsed.held_out)}
    (checkpoint / "training_state.safetensors").unlink()
    return row


def table(rows: list[dict], variants: list[Variant]) -> str:
    """Markdown: a line a variant, means over its seeds; where there are several, the half range between them.

    "against plain" is the loss less that of the first variant with the same seed, which draws the same samples and
    noise: its range tells more than the losses' own.
    """
    figures = [k for k in rows[0] if k.startswith(("loss", "psnr", "iou", "neighbours"))]
    names = {k: k.replace("_", " at ").replace("psnr", "PSNR").replace("iou", "IoU") for k in figures}
    lines = ["| variant | seeds | M parameters | steps | minutes | MiB kept a ring | against plain | "
             + " | ".join(names.values()) + " |", "|---" * (7 + len(figures)) + "|"]
    plain = {r["seed"]: r["loss"] for r in rows if r["variant"] == variants[0].name}

    def cell(values: list[float], digits: int, sign: str = "") -> str:
        half = (max(values) - min(values)) / 2
        return f"{statistics.mean(values):{sign}.{digits}f}" + (f" ± {half:.{digits}f}" if len(values) > 1 else "")

    for variant in variants:
        own = [r for r in rows if r["variant"] == variant.name]
        if not own:
            continue
        paired = [r["loss"] - plain[r["seed"]] for r in own if r["seed"] in plain]
        cells = [cell(paired, 4, "+") if paired else ""]
        for key in figures:
            cells.append(cell([r[key] for r in own], 2 if key.startswith(("psnr", "neighbours")) else 4))
        lines.append(f"| {variant.name} | {len(own)} | {own[0]['parameters'] / 1e6:.1f} | "
                     f"{statistics.mean(r['steps'] for r in own):.0f} | "
                     f"{statistics.mean(r['seconds'] for r in own) / 60:.1f} | {own[0]['mebibytes']:.0f} | "
                     + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def parser() -> argparse.ArgumentParser:
    """The command line."""
    top = argparse.ArgumentParser(prog="python -m coser.compare", description=__doc__.split("\n")[0])
    top.add_argument("variants", type=Path, help="JSON file of variants, see coser/data/comparisons")
    top.add_argument("--out", type=Path, required=True, help="folder for runs and tables")
    budget = top.add_mutually_exclusive_group(required=True)
    budget.add_argument("--minutes", type=float, help="of computing for each run")
    budget.add_argument("--steps", type=int, help="of each run, however long they take")
    top.add_argument("--seeds", type=int, nargs="+", default=[0])
    top.add_argument("--arguments", default="", help="of `coser.train denoiser`, for all variants")
    top.add_argument("--sheet", type=Path, help="where pictures of every variant's estimates go (PNG or WebP)")
    top.add_argument("--sheet-ring", type=int, default=0, help=f"which of {RINGS} held-out rings they show")
    return top


def main(arguments: list[str] | None = None) -> None:
    options = parser().parse_args(arguments)
    variants = load_variants(options.variants)
    options.out.mkdir(parents=True, exist_ok=True)
    for seed in options.seeds:
        for variant in variants:
            folder = options.out / f"{variant.slug}-{seed}"
            try:
                # held by the process that trains here, and free again when that one ends, however it ends
                with FileLock(folder.with_suffix(".lock"), blocking=False):
                    if (folder / "row.json").is_file():
                        before = json.loads((folder / "row.json").read_text("utf-8")).get("told")
                        if before not in (None, told(variant, seed, options)):
                            raise ValueError("out must be a folder of its own for each budget and set of arguments, "
                                             f"got {options.out}, where {variant.name} was trained by {before}")
                        continue
                    shutil.rmtree(folder, ignore_errors=True)  # what a killed run left
                    row = train_variant(variant, seed, folder, options)
                    (folder / "row.json").write_text(json.dumps(row), encoding="utf-8")
            except Timeout:
                continue
            write_table(variants, options)
    write_table(variants, options)  # also where all was done before
    if options.sheet:
        sheet(variants, options, options.seeds[0], options.sheet_ring).save(options.sheet)


def write_table(variants: list[Variant], options: argparse.Namespace) -> None:
    """The table of what is done so far, to files and to the terminal."""
    rows = finished_rows(variants, options)
    if rows:
        (options.out / "table.json").write_text(json.dumps(rows, indent=1), encoding="utf-8")
        (options.out / "table.md").write_text(table(rows, variants), encoding="utf-8")
        print(table(rows, variants), flush=True)


def finished_rows(variants: list[Variant], options: argparse.Namespace) -> list[dict]:
    """Of the runs asked for those that are done, seed after seed."""
    paths = (options.out / f"{v.slug}-{seed}" / "row.json" for seed in options.seeds for v in variants)
    return [json.loads(path.read_text(encoding="utf-8")) for path in paths if path.is_file()]


if __name__ == "__main__":
    main()
