"""Stretched copies of assets, rendered, so that a kind has more shapes: `python -m coser.data.stretch ASSETS RENDERS`.

A copy is taller or lower, wider or narrower than its asset and widens or narrows upwards; where that shows, its
captions say so ("a tall red barrel"). Every other copy is a mirror image besides, lit like all else. Written beside the
assets' own rings as `<asset id>~stretched<copy>-0.safetensors`, each a row of its own in `index.jsonl`, seen from the
default elevation. Files that exist are kept.
"""

from __future__ import annotations

import argparse
import math
import os
import re
import zlib
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from coser.cameras import ELEVATION, Cameras
from coser.data.assets import Asset, in_unit_sphere, list_assets, load_mesh, other_sides, with_article
from coser.data.index import stretched_id
from coser.data.render import add_to_index, run_jobs, save_ring
from coser.rasterizer import render

# Largest change of a logarithm: 1.42 times as tall against its floor plan, 1.2 times as wide as deep.
HEIGHT, WIDTH = 0.35, 0.18
TAPER = 0.2  # the floor plan is up to so much larger at the top and smaller at the bottom, or the other way round
# From which ratio on captions say so: of the height, and of the width; its inverse is said by the other word.
SHOWS = {("tall", "low"): 1.15, ("wide", "narrow"): 1.1}
WORDS = tuple(word for words in SHOWS for word in words)
# A caption that says one of these already is not taken over where a word of SHOWS is due.
SIZES = (*WORDS, "short", "flat", "long", "slim", "squat", "thin", "big", "large", "small", "tiny", "round")
SAYS_SIZE = re.compile(rf"\b({'|'.join(SIZES)})\b", re.I)
ARTICLE = re.compile(r"(an?|the|one)\s+", re.I)


@dataclass(frozen=True)
class Stretch:
    """How a copy differs: height against the floor plan, width (x) against depth (z), both ratios; taper, -1..1.

    With a taper t, the floor plan is 1 + t times its size at the top of the asset and 1 - t at the bottom. mirrored:
    left and right (x) change places.
    """

    height: float
    width: float
    taper: float
    mirrored: bool = False

    @property
    def word(self) -> str:
        """What captions call it, "" where nothing shows."""
        for ratio, ((more, less), least) in zip((self.height, self.width), SHOWS.items()):
            if ratio > least:
                return more
            if ratio < 1 / least:
                return less
        return ""


def draw_stretch(asset_id: str, copy: int, seed: int = 0) -> Stretch:
    """The stretch of an asset's copy, always the same one: logarithms and taper evenly up to their largest.

    Copies of odd numbers are mirror images.
    """
    draw = np.random.default_rng([seed, copy, zlib.crc32(asset_id.encode())])
    return Stretch(math.exp(draw.uniform(-HEIGHT, HEIGHT)), math.exp(draw.uniform(-WIDTH, WIDTH)),
                   draw.uniform(-TAPER, TAPER), mirrored=copy % 2 == 1)


def stretched(vertices: Tensor, stretch: Stretch) -> Tensor:
    """Vertices [V,3], y up, of an asset around the origin => those of its copy, again in the unit sphere."""
    x, y, z = vertices.double().unbind(-1)
    plan = 1 + stretch.taper * y / y.abs().max().clamp_min(1e-6)
    aside = math.sqrt(stretch.width)
    x = -x if stretch.mirrored else x
    moved = torch.stack([x * plan * aside, y * stretch.height, z * plan / aside], -1)
    return torch.from_numpy(in_unit_sphere(moved.numpy())).float()


def with_size(caption: str, word: str) -> str | None:
    """"A red barrel", "tall" => "A tall red barrel"; None where the caption speaks of sizes already."""
    if not word:
        return caption
    if SAYS_SIZE.search(caption):
        return None
    article = ARTICLE.match(caption)
    if article is None:
        return f"{word} {caption[:1].lower()}{caption[1:]}"
    said = article[1][0] if article[1].lower() in ("a", "an") else article[1]  # each of the words takes an "a"
    return f"{said} {word} {caption[article.end():]}"


def stretched_asset(asset: Asset, copy: int, seed: int = 0) -> Asset:
    """What is known of an asset's copy. Its mesh is the asset's, stretched."""
    stretch = draw_stretch(asset.id, copy, seed)
    word, sides = stretch.word, other_sides if stretch.mirrored else str
    captions = tuple(c for c in (with_size(sides(c), word) for c in asset.captions) if c)
    name = sides(asset.object)
    if word:  # "a tall bone" that became low is a low bone
        name = " ".join(SAYS_SIZE.sub("", name).split()) or name
    named = (word, *asset.colors[:1], name)
    return replace(asset, id=stretched_id(asset.id, copy), object=f"{word} {name}".strip(),
                   captions=captions or (with_article(" ".join(filter(None, named))),))


def _render_one(job: tuple[Asset, int, Path, int, int, int, str]) -> None:
    asset, copy, path, seed, num_views, size, device = job
    vertices, faces, colors = load_mesh(asset)
    stretch = draw_stretch(asset.id, copy, seed)
    vertices = stretched(vertices, stretch)
    if stretch.mirrored:  # or the faces would look inwards
        faces, colors = faces.flip(1), colors.flip(1)
    cameras = Cameras.orbit(num_views, ELEVATION)
    save_ring(path, render(vertices.to(device), faces.to(device), colors.to(device), cameras, size), cameras)


def render_stretched(assets: list[Asset], output: Path, copies: int = 1, seed: int = 0, num_views: int = 24,
                     size: int = 256, device: str = "cpu", workers: int = 1, until: float = math.inf) -> list[str]:
    """Renders `copies` stretched copies of every asset into `output`, which may hold other rings; returns their ids.

    On CUDA in this process, on a CPU over `workers` processes. until: a reading of time.perf_counter() at which it
    stops, finished or not; the next call goes on.
    """
    made = {(asset.id, copy): stretched_asset(asset, copy, seed) for copy in range(copies) for asset in assets}
    add_to_index(output, list(made.values()))  # before the rings: whoever lists them finds their rows
    jobs = [(asset, copy, output / f"{made[asset.id, copy].id}-0.safetensors", seed, num_views, size, device)
            for copy in range(copies) for asset in assets]
    run_jobs(_render_one, [job for job in jobs if not job[2].is_file()], num_views, device, workers, until)
    return [asset.id for asset in made.values()]


def are_stretched(assets: list[Asset], copies: int, folder: Path) -> bool:
    """Whether `folder` holds so many stretched copies of every asset."""
    return all((folder / f"{stretched_id(a.id, copy)}-0.safetensors").is_file() for a in assets
               for copy in range(copies))


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m coser.data.stretch", description=__doc__.split("\n")[0])
    parser.add_argument("assets", type=Path, help="a packed folder (index.jsonl) or a folder of GLB, glTF or OBJ files")
    parser.add_argument("renders", type=Path, help="where the rings go, beside others or into a folder of their own")
    parser.add_argument("--split", help="only this split of a packed folder")
    parser.add_argument("--min-quality", type=int, default=0)
    parser.add_argument("--min-object-count", type=int, default=1, help="only kinds with so many assets")
    parser.add_argument("--limit", type=int, help="so many of the assets")
    parser.add_argument("--copies", type=int, default=1, help="of each asset (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="other copies of the same names, for another folder")
    parser.add_argument("--num-views", type=int, default=24)
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    options = parser.parse_args(arguments)
    try:
        assets = list_assets(options.assets, options.split, options.min_quality, options.min_object_count,
                             limit=options.limit)
    except ValueError as error:
        parser.exit(1, f"coser: {error}\n")
    written = render_stretched(assets, options.renders, options.copies, options.seed, options.num_views, options.size,
                               options.device, options.workers)
    print(f"{len(written)} stretched copies of {len(assets)} assets")


if __name__ == "__main__":
    main()
