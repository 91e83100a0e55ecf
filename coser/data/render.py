"""Render every asset of a folder into rings of posed views: `python -m coser.data.render ASSETS RENDERS`.

One safetensors file a ring, `<asset id>-<ring>.safetensors`: rgba uint8 [N,4,S,S] (colour premultiplied), depths
float16 [N,1,S,S], azimuths and elevations float32 [N] in degrees. `index.jsonl` beside them repeats what is known of
each asset.
Files that exist are kept, so an interrupted run goes on where it stopped.
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import os
import time
import zlib
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from coser.cameras import ELEVATION, Cameras
from coser.data.assets import Asset, list_assets, load_mesh
from coser.data.index import read_index, write_index
from coser.rasterizer import render
from coser.views import ViewSet
from coser.whole_files import whole_file

ELEVATIONS = (0.0, 5.0, 10.0, 15.0, 25.0, 30.0)  # few, so that a training batch finds rings that share one


def render_ring(asset: Asset, ring: int, num_views: int = 24, size: int = 256,
                device: str = "cpu") -> tuple[ViewSet, Cameras]:
    """Ring 0 sees the asset at the default elevation, the others at a random one of ELEVATIONS; all from the front."""
    draw = zlib.crc32(f"{asset.id}-{ring}".encode())
    elevation = ELEVATION if ring == 0 else ELEVATIONS[draw % len(ELEVATIONS)]
    cameras = Cameras.orbit(num_views, elevation)
    vertices, faces, colors = (t.to(device) for t in load_mesh(asset))
    return render(vertices, faces, colors, cameras, size), cameras


def save_ring(path: Path, views: ViewSet, cameras: Cameras) -> None:
    """Writes a ring's file; a killed run leaves no half one."""
    rgba = (torch.cat([views.views, views.masks], 1).clamp(0, 1) * 255).round().to(torch.uint8)
    tensors = {"rgba": rgba, "depths": views.depths.half(), "azimuths": cameras.azimuths,
               "elevations": cameras.elevations}
    with whole_file(path) as writing:
        save_file({k: v.cpu().contiguous() for k, v in tensors.items()}, writing)


def ring_to_views(tensors: dict[str, Tensor]) -> ViewSet:
    """A ring file's tensors (or a slice of them) => ViewSet in float32."""
    rgba = tensors["rgba"].float() / 255
    return ViewSet(rgba[:, :3], rgba[:, 3:], tensors["depths"].float())


def load_ring(path: str | Path) -> tuple[ViewSet, Cameras]:
    """Ring file => its views and cameras."""
    tensors = load_file(path)
    return ring_to_views(tensors), Cameras.look_at_origin(tensors["azimuths"], tensors["elevations"])


def _render_one(job: tuple[Asset, int, Path, int, int, str]) -> None:
    asset, ring, path, num_views, size, device = job
    save_ring(path, *render_ring(asset, ring, num_views, size, device))


def is_rendered(assets: list[Asset], rings: int, folder: Path) -> bool:
    return all((folder / f"{a.id}-{ring}.safetensors").is_file() for a in assets for ring in range(rings))


def add_to_index(folder: Path, assets: list[Asset]) -> None:
    """Writes what is known of assets into a folder's index, whose other rows stay."""
    folder.mkdir(parents=True, exist_ok=True)
    known = read_index(folder)
    known |= {a.id: {k: v for k, v in asdict(a).items() if k not in ("path", "packed")} for a in assets}
    write_index(folder, known.values())


def render_assets(assets: list[Asset], output: Path, rings: int = 1, num_views: int = 24, size: int = 256,
                  device: str = "cpu", workers: int = 1, until: float = math.inf) -> None:
    """Renders `rings` rings of every asset into `output`.

    On CUDA in this process, on a CPU over `workers` processes. until: a reading of time.perf_counter() at which it
    stops, finished or not; the next call goes on.
    """
    add_to_index(output, assets)
    jobs = [(a, ring, output / f"{a.id}-{ring}.safetensors", num_views, size, device)
            for ring in range(rings) for a in assets]
    run_jobs(_render_one, [job for job in jobs if not job[2].is_file()], num_views, device, workers, until)


def run_jobs(render_one: Callable[[tuple], None], jobs: list[tuple], num_views: int, device: str, workers: int,
             until: float) -> None:
    """Calls `render_one` with each job: (asset, number of the ring, path, and what else it takes).

    On CUDA in this process, on a CPU over `workers` processes, until a reading of time.perf_counter(); in an order that
    has nothing to do with the packs: an unfinished folder is a fair sample.
    """
    jobs = sorted(jobs, key=lambda job: (job[1], zlib.crc32(job[0].id.encode())))
    if device != "cpu" or workers <= 1:
        _report(map(render_one, jobs), len(jobs), num_views, until)
    else:
        with multiprocessing.get_context("spawn").Pool(workers, torch.set_num_threads, (1,)) as pool:
            _report(pool.imap_unordered(render_one, jobs), len(jobs), num_views, until)


def _report(done: Iterator[None], jobs: int, num_views: int, until: float) -> None:
    start = time.perf_counter()
    for i, _ in enumerate(done, 1):
        if i % 50 == 0 or i == jobs:
            rate = i * num_views / (time.perf_counter() - start)
            print(f"{i}/{jobs} rings, {rate:.1f} views/s", flush=True)
        if time.perf_counter() >= until:
            return


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m coser.data.render", description=__doc__.split("\n")[0])
    parser.add_argument("assets", type=Path, help="a packed folder (index.jsonl) or a folder of GLB, glTF or OBJ files")
    parser.add_argument("output", type=Path)
    parser.add_argument("--split", help="only this split of a packed folder")
    parser.add_argument("--min-quality", type=int, default=0)
    parser.add_argument("--min-object-count", type=int, default=1)
    parser.add_argument("--words", nargs="+", help="only assets whose object's last word is one of these")
    parser.add_argument("--limit", type=int)
    parser.add_argument("--rings", type=int, default=1)
    parser.add_argument("--num-views", type=int, default=24)
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    options = parser.parse_args(arguments)
    assets = list_assets(options.assets, options.split, options.min_quality, options.min_object_count,
                         options.words, options.limit)
    print(f"{len(assets)} assets, {options.rings} rings of {options.num_views} views each")
    render_assets(assets, options.output, options.rings, options.num_views, options.size, options.device,
                  options.workers)


if __name__ == "__main__":
    main()
