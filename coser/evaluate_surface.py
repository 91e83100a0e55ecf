"""Measures surfaces and textures against the true assets: ours with and without depth, beside what others would do."""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import math
import statistics
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import psutil
import torch

from coser import baselines
from coser.cameras import ELEVATION, Cameras
from coser.data.assets import Asset, list_assets, load_mesh
from coser.devices import choose_device
from coser.metrics import psnr, render_mesh, sharpness, ssim
from coser.rasterizer import render
from coser.reconstruction import Mesh, Surface, finish, reconstruct
from coser.reconstruction.hull import visual_hull
from coser.reconstruction.maps import pixel_size
from coser.surface_metrics import Truth, look_at_truth, surface_figures
from coser.views import ViewSet

VERB = "surface"
HEIGHTS = (0.0, 20.0, 45.0, -20.0)  # degrees of the novel views
NOVEL_VIEWS = 4  # at each height, halfway between the azimuths of two views
BASELINE_VOXEL = 1.5  # pixels, as ours at most
SAMPLED_EVERY = 0.005  # seconds between looks at the memory


def _without_depth(views: ViewSet) -> ViewSet:
    return replace(views, depths=torch.zeros_like(views.depths))


def _hull(views: ViewSet, cameras: Cameras) -> Mesh:
    vertices, faces, voxel = visual_hull(views.masks, cameras)
    return finish(Surface(Mesh(vertices, faces), voxel, _without_depth(views), cameras))


def _tsdf(views: ViewSet, cameras: Cameras) -> Mesh:
    pixel = pixel_size(cameras, views.views.shape[-1], cameras.centers.norm(dim=-1).mean())
    return baselines.tsdf_fusion(views, cameras, BASELINE_VOXEL * float(pixel))


METHODS: dict[str, tuple[str, Callable[[ViewSet, Cameras], Mesh]]] = {
    "depth": ("ours, with depth", reconstruct),
    "fit": ("ours, colours alone", lambda views, cameras: reconstruct(_without_depth(views), cameras)),
    "hull": ("visual hull, our floor and texture", _hull),
    "tsdf": ("Open3D TSDF, with depth", _tsdf),
    "poisson": ("Poisson, with depth, thin parts cut", baselines.poisson),
    "poisson_closed": ("Poisson, with depth, closed", lambda v, c: baselines.poisson(v, c, thinnest=0.0)),
}
OURS = ("depth", "fit", "hull")  # what runs on the device that is asked for
# figure: its words in the table, digits, and whether more is better
FIGURES: dict[str, tuple[str, int, bool]] = {
    "chamfer": ("Chamfer", 4, False), "accuracy": ("mesh to truth", 4, False),
    "completeness_seen": ("truth seen to mesh", 4, False), "completeness_unseen": ("truth unseen to mesh", 4, False),
    "fscore_0.5": ("F 0.5 %", 3, True), "fscore_1": ("F 1 %", 3, True), "volume_iou": ("volume IoU", 3, True),
    "normal_error": ("normals, °", 1, False),
    **{f"psnr_{h:g}": (f"PSNR {h:g}°", 1, True) for h in HEIGHTS},
    **{f"ssim_{h:g}": (f"SSIM {h:g}°", 3, True) for h in HEIGHTS},
    "sharpness": ("sharpness of true", 2, True),
    "seconds": ("s", 2, False), "processor_seconds": ("processor s", 2, False),
    "memory": ("MiB added", 0, False), "faces": ("triangles", 0, False), "watertight": ("watertight", 2, True),
}


@dataclass(frozen=True)
class Scene:
    """An asset's ring of views, and what its mesh is judged by: the truth, and true views from between the ring's,
    which `novel` has by their height."""

    views: ViewSet
    ring: Cameras
    truth: Truth
    novel: dict[float, tuple[Cameras, ViewSet]]


def make_scene(asset: Asset, num_views: int, size: int = 256, elevation: float = ELEVATION) -> Scene:
    """Renders an asset's ring, and its novel views at HEIGHTS, halfway between the azimuths of the ring's views."""
    vertices, faces, colors = load_mesh(asset)
    ring = Cameras.orbit(num_views, elevation)
    steps = (torch.arange(NOVEL_VIEWS).double() * num_views / NOVEL_VIEWS).floor()
    around = {h: Cameras.look_at_origin((steps + 0.5) * 360 / num_views, h) for h in HEIGHTS}
    return Scene(render(vertices, faces, colors, ring, size), ring, look_at_truth(vertices, faces),
                 {h: (cameras, render(vertices, faces, colors, cameras, size)) for h, cameras in around.items()})


def measure(scene: Scene, method: Callable[[ViewSet, Cameras], Mesh],
            device: torch.device | str = "cpu") -> dict[str, float]:
    """Makes a mesh of the scene's views => FIGURES of it. ValueError of a method that finds no surface passes through.

    device: where the views lie when the seconds begin. memory: MiB by which the process' memory grew at most meanwhile,
    looked at every 5 ms; a GPU's own is not counted.
    """
    views, ring = scene.views.to(device), scene.ring.to(device)
    with MemoryWatch() as memory:
        began, worked = time.perf_counter(), time.process_time()
        mesh = method(views, ring)
        seconds, processor_seconds = time.perf_counter() - began, time.process_time() - worked
    figures = {"seconds": seconds, "processor_seconds": processor_seconds, "memory": memory.added,
               "faces": float(len(mesh.faces)), "watertight": float(mesh.is_watertight)}
    for height, (cameras, truth) in scene.novel.items():
        seen = render_mesh(mesh, cameras, truth.views.shape[-1])
        pictures = seen.on_background(), truth.on_background()
        figures[f"psnr_{height:g}"] = float(psnr(*pictures).mean())
        figures[f"ssim_{height:g}"] = float(ssim(*pictures).mean())
        if height == 20.0:
            figures["sharpness"] = float(sharpness(seen).mean() / sharpness(truth).mean().clamp_min(1e-6))
    return figures | surface_figures(mesh, scene.truth, scene.ring)


class MemoryWatch:
    """`with MemoryWatch() as memory`: afterwards memory.added is how much (MiB) the process' own memory grew at most.

    What the allocator kept of memory freed before is given back first: whoever takes it again would seem to take none.
    On Linux, resident pages of files (a program's code) do not count: the system takes them back when it likes.
    """

    def __enter__(self) -> "MemoryWatch":
        gc.collect()
        self.process, self.done, self.looking = psutil.Process(), threading.Event(), threading.Event()
        self.start = self.peak = 0
        self.thread = threading.Thread(target=self._look, daemon=True)
        self.thread.start()
        self.looking.wait()  # a thread takes over an ended one's heap, and that shrinks at its first look
        if sys.platform == "linux" and (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)):  # glibc has it
            trim(0)
        self.start = self.peak = self._own()
        return self

    def __exit__(self, *error) -> None:
        self.done.set()
        self.thread.join()

    def _look(self) -> None:
        self._own()
        self.looking.set()
        while not self.done.wait(SAMPLED_EVERY):
            self.peak = max(self.peak, self._own())

    def _own(self) -> int:
        seen = self.process.memory_info()
        return seen.rss - getattr(seen, "shared", 0)

    @property
    def added(self) -> float:
        return (self.peak - self.start) / 2**20


def evaluate_surface(assets: list[Asset], num_views: list[int], methods: list[str], out: Path,
                     size: int = 256, device: torch.device | str = "cpu") -> list[dict]:
    """Measures every asset, number of views and method that `out`/rows.jsonl lacks, and returns all its rows.

    device: of our own methods; the baselines' libraries work on the CPU. A method that finds no surface, or whose
    library is missing, leaves a row with the reason in "error"; the latter is tried again the next time. Rows of
    pictures of another size are not taken over.
    """
    out.mkdir(parents=True, exist_ok=True)
    path = out / "rows.jsonl"
    rows = [json.loads(line) for line in path.read_text("utf-8").splitlines()] if path.is_file() else []
    rows = [row for row in rows if row.get("size", size) == size and not row.get("lacking")]
    have = {(row["id"], row["num_views"], row["method"]) for row in rows}
    for asset in assets:
        for count in num_views:
            missing = [m for m in methods if (asset.id, count, m) not in have]
            scene = make_scene(asset, count, size) if missing else None
            for method in missing:
                row = {"id": asset.id, "object": asset.object, "num_views": count, "method": method, "size": size}
                try:
                    row |= measure(scene, METHODS[method][1], device if method in OURS else "cpu")
                except ValueError as error:
                    row["error"] = str(error)
                except ImportError as error:
                    row |= {"error": str(error), "lacking": True}
                rows.append(row)
                with path.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(row) + "\n")
                told = row.get("error") or ", ".join(f"{k} {row[k]:.4g}" for k in ("chamfer", "psnr_20", "seconds"))
                print(f"{asset.object[:24]:24} {count:3} {method:15} {told}", flush=True)
    wanted = {a.id for a in assets}
    return [r for r in rows if r["id"] in wanted and r["num_views"] in num_views and r["method"] in methods]


def summarise(rows: list[dict]) -> dict[str, dict[str, tuple[float, float]]]:
    """Rows => "method, views" => figure => (median, worst tenth) of the assets that have it; and how many there are."""
    summary = {}
    for key in dict.fromkeys((r["method"], r["num_views"]) for r in rows):
        own = [r for r in rows if (r["method"], r["num_views"]) == key]
        good = [r for r in own if "error" not in r]
        figures: dict[str, tuple[float, float]] = {"assets": (len(good), len(own))}
        for name, (_, _, more_is_better) in FIGURES.items():
            values = [r[name] for r in good if not math.isnan(r[name])]
            if values:
                tenths = statistics.quantiles(values, n=10, method="inclusive") if len(values) > 1 else values * 9
                figures[name] = statistics.median(values), tenths[0 if more_is_better else -1]
        summary["{}, {}".format(*key)] = figures
    return summary


def markdown(summary: dict[str, dict[str, tuple[float, float]]], figures: list[str] | None = None) -> str:
    """A table with a column for each figure, medians with the worst tenth in brackets."""
    figures = figures or list(FIGURES)
    lines = ["| method | views | " + " | ".join(FIGURES[f][0] for f in figures) + " | assets |",
             "|---|--:|" + "--:|" * (len(figures) + 1)]
    for key, row in summary.items():
        method, views = key.rsplit(", ", 1)
        cells = ["{0:.{2}f} ({1:.{2}f})".format(*row[f], FIGURES[f][1]) if f in row else "" for f in figures]
        good, own = row["assets"]
        lines.append(f"| {METHODS[method][0]} | {views} | " + " | ".join(cells) + f" | {good} of {own} |")
    return "\n".join(lines) + "\n"


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--assets", required=True, help="folder of assets (packed, or GLB/glTF/OBJ files)")
    parser.add_argument("--split", default=None, help="only this split of a packed folder, such as val")
    parser.add_argument("--limit", type=int, default=None, help="that many of the assets, a fixed draw")
    parser.add_argument("--num-views", type=int, nargs="+", default=[12])
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--size", type=int, default=256, help="pixels a side of the views")
    parser.add_argument("--device", default="cpu", help="of our own methods (default: %(default)s); cuda wants an "
                        "--out of its own")
    parser.add_argument("--out", type=Path, required=True, help="folder for rows and tables; rows that are there "
                        "already are not measured again")


def run(options: argparse.Namespace) -> None:
    assets = list_assets(options.assets, options.split, limit=options.limit)
    rows = evaluate_surface(assets, options.num_views, options.methods, options.out, options.size,
                            choose_device(options.device)[0])
    summary = summarise(rows)
    (options.out / "table.json").write_text(json.dumps(summary, indent=1) + "\n", "utf-8")
    (options.out / "table.md").write_text(markdown(summary), "utf-8")
    print(markdown(summary))
