"""How near a mesh's surface is to the true one, counting of the truth only what can be seen from outside.

Assets are made to be looked at: they hold walls inside each other, open shells and windings either way. So the true
surface is the part of it that some of many directions all around sees, the true solid is what none of them can look
into, and normals are compared without their sign.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from scipy.spatial import cKDTree
from torch import Tensor

from coser.cameras import Cameras
from coser.rasterizer import rasterize
from coser.reconstruction import Mesh

CANDIDATES = 8  # triangles tried for a point's nearest one: those of the nearest samples and middles
DIRECTIONS = 60  # from which surfaces and solids are looked at, spread evenly over the sphere
LOOK_SIZE = 256  # pixels a side of those looks, which span 2 radii
SEEN_WITHIN = 0.01  # radii; a point no deeper than this behind what a direction sees is seen
ENCLOSED = 0.7  # share of a surface with a solid behind it, from which on it counts as a solid's
GRID = 80  # cells a side of the box in which solids are compared
NEAR = (0.01, 0.02)  # radii: 0.5 and 1 % of the object's diameter


@dataclass(frozen=True)
class Truth:
    """A true surface, and what of it counts.

    points [P,3] float64, drawn evenly over the area that can be seen from outside, and their faces [P]; cells [C,3]
    float32: middles of the cells of a grid around it, and solid [C] bool: which of them nobody can look into. encloses:
    whether most of the surface has such cells behind it; of open shells and thin sheets, volumes say nothing.
    """

    mesh: Mesh
    points: np.ndarray
    faces: np.ndarray
    cells: Tensor
    solid: Tensor
    encloses: bool


def look_at_truth(vertices: Tensor, faces: Tensor, samples: int = 20_000) -> Truth:
    """True vertices [V,3] in the unit sphere and faces [F,3], windings either way => the Truth to compare with."""
    mesh = Mesh(vertices.numpy(), faces.numpy())
    depths = _looks(mesh)
    points, on = sample_surface(mesh, 4 * samples)  # more than asked for: some lie inside
    seen = (_behind(torch.from_numpy(points).float(), depths) < SEEN_WITHIN).any(0).numpy()
    points, on = points[seen][:samples], on[seen][:samples]
    low, high = vertices.amin(0), vertices.amax(0)
    margin = 0.05 * float((high - low).max())
    step = (high - low + 2 * margin) / GRID
    axes = [low[k] - margin + (torch.arange(GRID) + 0.5) * step[k] for k in range(3)]
    cells = torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).reshape(-1, 3)
    solid = _solid(cells, depths)
    behind = cKDTree(cells[solid].numpy()).query(points)[0] if solid.any() else np.full(len(points), np.inf)
    encloses = bool((behind < 1.5 * float(step.max())).mean() >= ENCLOSED)
    return Truth(mesh, points, on, cells, solid, encloses)


def surface_figures(mesh: Mesh, truth: Truth, cameras: Cameras | None = None) -> dict[str, float]:
    """A mesh against the truth, lengths in the units of both (the object's radius).

    accuracy: mean distance from the mesh's surface to the true one; completeness: from the true one to the mesh's;
    chamfer: the mean of both. fscore_0.5 and fscore_1: harmonic mean of the shares of both surfaces within 0.5 and 1 %
    of the diameter of the other. normal_error: median angle, degrees, between a surface and the nearest place of the
    other, both ways. volume_iou: of what cannot be looked into from outside, as an open mesh can be; nan where the
    truth encloses next to nothing. With the cameras of
    the views: completeness_seen and completeness_unseen, of the truth that they see and that they do not (nan where
    there is none).
    """
    count = len(truth.points)
    points, on = sample_surface(mesh, count, seed=1)
    forth, nearest = surface_distances(truth.points, mesh, points, on)
    back, nearest_true = surface_distances(points, truth.mesh, truth.points, truth.faces)
    figures = {"chamfer": (forth.mean() + back.mean()) / 2, "accuracy": back.mean(), "completeness": forth.mean()}
    for limit in NEAR:
        precision, recall = (back < limit).mean(), (forth < limit).mean()
        figures[f"fscore_{50 * limit:g}"] = 2 * precision * recall / max(precision + recall, 1e-9)
    own, true = _face_normals(mesh), _face_normals(truth.mesh)
    cosine = np.concatenate([(own[nearest] * true[truth.faces]).sum(1), (own[on] * true[nearest_true]).sum(1)])
    figures["normal_error"] = math.degrees(math.acos(min(1.0, float(np.median(np.abs(cosine))))))
    figures["volume_iou"] = math.nan
    if truth.encloses:
        solid = _solid(truth.cells, _looks(mesh))
        figures["volume_iou"] = int((solid & truth.solid).sum()) / int((solid | truth.solid).sum())
    if cameras is not None:
        seen = seen_by(truth, cameras)
        for name, part in (("seen", seen), ("unseen", ~seen)):
            figures[f"completeness_{name}"] = forth[part].mean() if part.any() else math.nan
    return {name: float(value) for name, value in figures.items()}


def seen_by(truth: Truth, cameras: Cameras) -> np.ndarray:
    """Which of the truth's points [P] some camera sees."""
    depths = _depth_maps(truth.mesh, cameras)
    return (_behind(torch.from_numpy(truth.points).float(), depths, cameras) < SEEN_WITHIN).any(0).numpy()


def sample_surface(mesh: Mesh, count: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """`count` points drawn evenly over a mesh's area, [count,3] float64, and their faces' numbers [count]."""
    generator = np.random.default_rng(seed)
    a, b, c = mesh.vertices.astype(np.float64)[mesh.faces].swapaxes(0, 1)
    areas = np.linalg.norm(np.cross(b - a, c - a), axis=1).cumsum()
    faces = np.searchsorted(areas, generator.random(count) * areas[-1], side="right").clip(max=len(areas) - 1)
    u, v = generator.random((2, count, 1))
    u, v = np.where(u + v > 1, (1 - u, 1 - v), (u, v))
    return a[faces] + u * (b - a)[faces] + v * (c - a)[faces], faces


def surface_distances(points: np.ndarray, mesh: Mesh, samples: np.ndarray,
                      faces: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Points [P,3] => their distances [P] from a mesh, of which samples [M,3] on its faces [M] are known, and the
    nearest faces [P]. Distances are to triangles, so that they do not depend on how dense the samples lie."""
    triangles = mesh.vertices.astype(np.float64)[mesh.faces]
    known = np.concatenate([samples, triangles.mean(1)])  # small triangles may have no sample, large ones have many
    faces = np.concatenate([faces, np.arange(len(triangles))])
    _, near = cKDTree(known).query(points, min(CANDIDATES, len(known)))
    near = faces[near.reshape(len(points), -1)]
    distances = _triangle_distances(points[:, None], triangles[near])
    best = distances.argmin(1)[:, None]
    return np.take_along_axis(distances, best, 1)[:, 0], np.take_along_axis(near, best, 1)[:, 0]


def all_around(count: int = DIRECTIONS) -> Cameras:
    """Orthographic cameras spread evenly over the sphere (a Fibonacci lattice), which see the unit sphere."""
    index = np.arange(count) + 0.5
    elevations = np.degrees(np.arcsin(1 - 2 * index / count))
    return Cameras.look_at_origin(index * 180 * (3 - 5**0.5) % 360, elevations, orthographic=True)


def _looks(mesh: Mesh) -> Tensor:
    return _depth_maps(mesh, all_around())


def _depth_maps(mesh: Mesh, cameras: Cameras) -> Tensor:
    """Depths [N,S,S]; infinite where a camera sees nothing."""
    fragments = rasterize(torch.from_numpy(mesh.vertices), torch.from_numpy(mesh.faces), cameras, LOOK_SIZE)
    return torch.where(fragments.faces >= 0, fragments.depths, torch.inf)


def _behind(points: Tensor, depths: Tensor, cameras: Cameras | None = None) -> Tensor:
    """How deep points [P,3] lie behind what each camera (all those around, if not given) sees there, [N,P]."""
    uv, depth = (cameras or all_around()).project(points)
    size = depths.shape[-1]
    column, row = (uv * size).long().clamp(0, size - 1).unbind(-1)
    return depth - depths.flatten(1).gather(1, row * size + column)


def _solid(cells: Tensor, depths: Tensor) -> Tensor:
    """Which of the cells [C,3] lie behind the surface for every camera around."""
    cameras = all_around()
    left = torch.arange(len(cells))
    for i in range(len(cameras)):
        left = left[_behind(cells[left], depths[i:i + 1], cameras[i])[0] >= 0]
    solid = torch.zeros(len(cells), dtype=torch.bool)
    solid[left] = True
    return solid


def _face_normals(mesh: Mesh) -> np.ndarray:
    a, b, c = mesh.vertices.astype(np.float64)[mesh.faces].swapaxes(0, 1)
    normals = np.cross(b - a, c - a)
    return normals / np.linalg.norm(normals, axis=1, keepdims=True).clip(1e-30)


def _triangle_distances(points: np.ndarray, triangles: np.ndarray) -> np.ndarray:
    """Points [...,3] and triangles [...,3,3] => distances [...]: to the plane above the inside, else to an edge."""
    edges = np.roll(triangles, -1, -2) - triangles
    to_points = points[..., None, :] - triangles
    normals = np.cross(edges[..., 0, :], edges[..., 1, :])
    inside = ((np.cross(edges, to_points) * normals[..., None, :]).sum(-1) > 0).all(-1)
    height = np.abs((to_points[..., 0, :] * normals).sum(-1)) / np.linalg.norm(normals, axis=-1).clip(1e-30)
    along = (to_points * edges).sum(-1) / (edges * edges).sum(-1).clip(1e-30)
    to_edges = np.linalg.norm(to_points - along.clip(0, 1)[..., None] * edges, axis=-1)
    return np.where(inside, height, to_edges.min(-1))
