"""Objects that were drawn one by one, put together: sized as in life, at rest on one another or side by side."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from coser.cameras import Cameras
from coser.data.placing import beside, box_of, drop, resting_places
from coser.data.scene_words import SHRINKS, SIDES, sizes_together
from coser.metrics import render_mesh
from coser.reconstruction import QUICK, Mesh, Surface, find_surface, finish
from coser.scene_prompts import ScenePlan
from coser.views import ViewSet

GAP = 0.05  # between neighbours, of the largest one's size
STILL = torch.zeros(3, dtype=torch.float64)


@dataclass(frozen=True)
class Placed:
    """A copy of the mesh `index`: its vertices times `scale`, plus `offset` [3] float64."""

    index: int
    scale: float
    offset: Tensor

    def moved(self, offset: Tensor, scale: float = 1.0) -> "Placed":
        """Scaled about the origin, then moved."""
        return Placed(self.index, self.scale * scale, self.offset * scale + offset)

    def vertices(self, meshes: Sequence[Mesh]) -> Tensor:
        """Where its vertices [V,3] float64 are."""
        return torch.from_numpy(meshes[self.index].vertices).double() * self.scale + self.offset


def put_together(plan: ScenePlan, drawn: Sequence[tuple[ViewSet, Cameras]], size_of: Callable[[str], float]) -> Surface:
    """The views of each object of a plan, by the same cameras => the surface of the scene, with views of the whole.

    drawn: N views and their cameras for each of the plan's objects, in its order. size_of: name => its longest side in
    life, such as `LifeSizes.of`. Every object stays a closed part of its own. Raises ValueError when one of them shows
    no surface.
    """
    if len(drawn) != len(plan.objects):
        raise ValueError(f"drawn must be views of the plan's {len(plan.objects)} objects, got {len(drawn)}")
    surfaces = [find_surface(*views, drawn=True) for views in drawn]
    meshes = [finish(surface, **QUICK) for surface in surfaces]
    placed = in_unit_sphere(arrange(plan, meshes, [size_of(o.name) for o in plan.objects]), meshes)
    views, cameras = drawn[0]
    seen = render_mesh(joined(meshes, placed), cameras, views.views.shape[-1]).to(views.views.device)
    voxel = max(surfaces[p.index].voxel * p.scale for p in placed)
    return Surface(joined([surface.mesh for surface in surfaces], placed), voxel, seen, cameras)


def arrange(plan: ScenePlan, meshes: Sequence[Mesh], sizes: Sequence[float]) -> list[Placed]:
    """Where a plan's objects stand, on the floor y = 0; meshes and sizes in life (metres) go with its objects.

    Sizes are pulled together as in training scenes, so that an apple on a table is still seen. What finds no place to
    rest is let down over the middle.
    """
    placed, largest = _row(0, meshes[0], 1.0, plan.objects[0].count), sizes[0]
    for i, relation in enumerate(plan.relations, 1):
        before, size = sizes_together(largest, sizes[i])
        group, row = _moved(placed, STILL, before), _row(i, meshes[i], size, plan.objects[i].count)
        placed, largest = _related(group, relation, row, meshes), max(largest, sizes[i])
    return placed


def _related(first: list[Placed], relation: str, second: list[Placed], meshes: Sequence[Mesh]) -> list[Placed]:
    """The first objects, moved to where they stand in a relation to the second, and the second."""
    if relation == "on" and (laid := _laid(first, second, meshes)):
        return laid
    side = SIDES.get(relation, (0, -1))  # what comes first in a sentence stands on the left
    boxes = [box_of(_geometry(group, meshes)[0]) for group in (first, second)]
    return _moved(first, beside(*boxes, side, GAP)) + second


def _row(index: int, mesh: Mesh, longest: float, count: int) -> list[Placed]:
    """Copies of a mesh side by side on the floor, their middle over the origin, each with a longest side of so much."""
    low, high = box_of(torch.from_numpy(mesh.vertices).double())
    scale = longest / float((high - low).max())
    middle = (low + high) / 2
    middle[1] = low[1]
    step = float((high - low)[0]) * scale + GAP * longest
    across = torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64)
    return [Placed(index, scale, across * step * (k - (count - 1) / 2) - middle * scale) for k in range(count)]


def _laid(upper: list[Placed], lower: list[Placed], meshes: Sequence[Mesh]) -> list[Placed] | None:
    """The upper objects at rest on the lower one; None where there is nothing below them."""
    below = _geometry(lower, meshes)
    for shrink in SHRINKS:
        smaller = _moved(upper, STILL, shrink)
        for move in resting_places(below, _geometry(smaller, meshes), np.random.default_rng(0)):
            return _moved(smaller, move) + lower
    rise, _ = drop(below, _geometry(upper, meshes))
    if rise == -torch.inf:
        return None
    return _moved(upper, torch.tensor([0.0, rise, 0.0], dtype=torch.float64)) + lower


def _moved(placed: list[Placed], offset: Tensor, scale: float = 1.0) -> list[Placed]:
    return [p.moved(offset, scale) for p in placed]


def _geometry(placed: list[Placed], meshes: Sequence[Mesh]) -> tuple[Tensor, Tensor]:
    """Vertices [V,3] and faces [F,3] of all of them."""
    parts = [p.vertices(meshes) for p in placed]
    firsts = np.cumsum([0] + [len(part) for part in parts])
    faces = [torch.from_numpy(meshes[p.index].faces) + int(n) for p, n in zip(placed, firsts)]
    return torch.cat(parts), torch.cat(faces)


def in_unit_sphere(placed: list[Placed], meshes: Sequence[Mesh]) -> list[Placed]:
    """The same scene with its box centred and its farthest vertex on the unit sphere, as every asset is rendered."""
    vertices, _ = _geometry(placed, meshes)
    middle = box_of(vertices).mean(0)
    scale = 1 / max(float((vertices - middle).norm(dim=1).max()), 1e-9)
    return _moved(placed, -middle * scale, scale)


def joined(meshes: Sequence[Mesh], placed: list[Placed]) -> Mesh:
    """All copies as one mesh, with their colours where the meshes have them at their vertices."""
    vertices, faces = _geometry(placed, meshes)
    colors = [meshes[p.index].vertex_colors for p in placed]
    return Mesh(vertices.float().numpy(), faces.numpy(),
                None if any(c is None for c in colors) else np.concatenate(colors))
