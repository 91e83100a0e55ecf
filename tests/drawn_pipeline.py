"""For tests of what stands around a pipeline: one that draws a box under noise that fades step by step."""

from __future__ import annotations

import functools
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
import trimesh

from coser import reconstruction, studio
from coser.cameras import Cameras
from coser.models.unet import MIXERS
from coser.pipeline import CoSERPipeline, MultiviewStep, step_order
from coser.rasterizer import render
from coser.views import ViewSet

CORNERS = torch.tensor([[x, y, z] for x in (-1.0, 1.0) for y in (-1.0, 1.0) for z in (-1.0, 1.0)])
QUADS = ((0, 1, 3, 2), (4, 6, 7, 5), (0, 4, 5, 1), (2, 3, 7, 6), (0, 2, 6, 4), (1, 5, 7, 3))
FACES = torch.tensor([t for a, b, c, d in QUADS for t in ((a, b, c), (a, c, d))])
COLORS = {"red": (0.8, 0.1, 0.1), "blue": (0.1, 0.2, 0.8)}
NOTHING = "nothing"  # a prompt that draws empty views


class DrawnPipeline:
    """Has what Studio uses of CoSERPipeline; counts how many streams are open at once."""

    def __init__(self):
        self.open = self.most_open = 0
        self.count = threading.Lock()
        self.mixers: tuple[str, ...] | None = None  # of the last stream
        self.symmetry: tuple[str, ...] = ()  # likewise
        self.guidance_rescale = self.skip_guidance_scale = self.redraw = 0.0  # likewise
        self.unet = SimpleNamespace(config=SimpleNamespace(mixers=MIXERS))

    def to(self, *args, **kwargs) -> "DrawnPipeline":
        return self

    def prepare_latents(self, num_views: int, generator: torch.Generator) -> torch.Tensor:
        return torch.rand(num_views, 3, 64, 64, generator=generator)

    def latents_to_views(self, latents: torch.Tensor, preview: bool) -> ViewSet:
        return ViewSet(latents, torch.ones_like(latents[:, :1]), torch.zeros_like(latents[:, :1]))

    def stream(self, prompt: str, *, num_views: int, elevation: float, guidance_scale: float, num_inference_steps: int,
               negative_prompt: str, generator: torch.Generator, consistency: float = 0.0,
               fuse=None, mixers: tuple[str, ...] | None = None,
               symmetry: tuple[str, ...] = (), guidance_rescale: float = 0.0,
               skip_guidance_scale: float = 0.0, redraw: float = 0.0) -> Iterator[MultiviewStep]:
        self.mixers, self.symmetry = mixers, symmetry
        self.guidance_rescale, self.skip_guidance_scale = guidance_rescale, skip_guidance_scale
        self.redraw = redraw
        with self.count:
            self.open += 1
            self.most_open = max(self.most_open, self.open)
        try:
            cameras = Cameras.orbit(num_views, elevation)
            views = box_views(prompt, cameras)
            noise = self.prepare_latents(num_views, generator)
            total = len(step_order(num_inference_steps, redraw))
            for index in range(1, total + 1):
                fade = index / total
                small = quarter_size(views)
                noisy = ViewSet(fade * small.views + (1 - fade) * noise, fade * small.masks + (1 - fade), small.depths)
                yield MultiviewStep(index, total, views if fade == 1 else noisy, noise, noise, cameras)
        finally:
            with self.count:
                self.open -= 1


def box_views(prompt: str, cameras: Cameras) -> ViewSet:
    """256-pixel views of a box whose colour is the prompt's; empty ones for the prompt NOTHING."""
    color = next((rgb for word, rgb in COLORS.items() if word in prompt), (0.5, 0.5, 0.5))
    views = render(CORNERS * 0.5, FACES, torch.tensor(color).expand(len(FACES), 3, 3), cameras, 256, supersample=1)
    return ViewSet(*(0 * t for t in (views.views, views.masks, views.depths))) if prompt == NOTHING else views


def quarter_size(views: ViewSet) -> ViewSet:
    """A quarter of the side."""
    return ViewSet(*(F.avg_pool2d(t, 4) for t in (views.views, views.masks, views.depths)))


def load_drawn_pipelines(monkeypatch) -> None:
    """From a checkpoint called tests/drawn, which is no folder, a DrawnPipeline is loaded; others must exist."""
    monkeypatch.setattr(studio, "checkpoint_folder",
                        lambda name, real=studio.checkpoint_folder: Path(name) if name == "tests/drawn" else real(name))
    monkeypatch.setattr(CoSERPipeline, "from_pretrained", lambda *args, **kwargs: DrawnPipeline())


def fit_in_few_steps(monkeypatch) -> None:
    """Views without depth are fitted in a few steps instead of 260: enough for a convex solid, which its hull shows."""
    monkeypatch.setattr(reconstruction, "stream_fit", functools.partial(reconstruction.stream_fit, steps=(8, 6, 2)))


def mean_color(glb: str | Path) -> np.ndarray:
    """The mean of a GLB's texture where its corners lie, or of its vertex colours: [3] in [0,1]."""
    mesh = trimesh.load(glb, force="mesh", process=False)
    visual = mesh.visual.to_color() if mesh.visual.kind == "texture" and mesh.visual.uv is not None else mesh.visual
    if visual.kind != "vertex":  # trimesh keeps COLOR_0 as an attribute where there is a material
        return mesh.visual.vertex_attributes["color"][:, :3].mean(0) / 255
    return visual.vertex_colors[:, :3].mean(0) / 255


def welded(glb: str | Path) -> trimesh.Trimesh:
    """A GLB's mesh with the vertices at one place made one, whatever their normals and texture places."""
    mesh = trimesh.load(glb, force="mesh")
    mesh.merge_vertices(merge_tex=True, merge_norm=True)
    return mesh
