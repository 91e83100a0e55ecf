"""Posed views with depth to a closed surface: signed distances of all depth maps, carved by the silhouettes.

Every view says how far a point lies from what it sees: in front of its depth map or beside its silhouette (free,
positive), just behind its depth map (inside, negative), or further behind (it cannot tell). A truncated mean of the
depth distances (Curless and Levoy, "A volumetric method for building complex models from range images", 1996) makes the
surface; silhouettes carve away what lies outside them, by two votes where depth maps know a surface. What no view can
tell is taken to be solid, down to the floor that the object stands on. The less views say of a place, the more its
distance follows those around it.
"""

from __future__ import annotations

import math
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from coser.cameras import Cameras
from coser.reconstruction.floor import cut_floor
from coser.reconstruction.maps import ViewMaps, pixel_size, surface_points, view_maps
from coser.reconstruction.sheets import thicken_sheets
from coser.reconstruction.surface import closed_surface
from coser.views import ViewSet

FINEST = 1.5  # pixels; a finer grid would cost time and show nothing more
TRUNCATION = 3.0  # voxels; a view behind whose surface a point lies deeper than this has no say
SHEET = 1.5  # voxels; thinner things seen from both sides are made this thick
MARGIN = 3  # voxels of air around the object
MIN_COS = 0.03  # surfaces seen at a flatter angle than this tell nothing
# what a cell's neighbours count, where one view that sees it squarely counts 1; the least that views count; rounds of it
NEIGHBOURS, LEAST, ROUNDS = 0.1, 0.05, 10
SURE = 3.0  # what views count where the coarse pass decided
FREE, HIDDEN, NEAR = 1, -1, 0  # what the coarse pass says of a cell


def fuse(views: ViewSet, cameras: Cameras, resolution: int = 128,
         neighbours: float = NEIGHBOURS) -> tuple[np.ndarray, np.ndarray, float]:
    """Views and their cameras => vertices [V,3] float32, faces [F,3] int64 (right hand outward), the voxel's side.

    resolution: the grid spends at most resolution^3 voxels on the object's box, none much finer than a pixel.
    neighbours: what a cell's neighbours count (`smoothed`). The surface is closed. Every view must show something.
    Raises ValueError when no two agree on a surface.
    """
    maps = view_maps(views, cameras)
    points, shown = surface_points(views, cameras)
    seen = points[shown]
    low, high = _bounds(seen)
    pixel = pixel_size(cameras, views.views.shape[-1], cameras.centers.norm(dim=-1).mean())
    voxel = max(float((high - low).clamp_min(8 * pixel).prod()) ** (1 / 3) / resolution, FINEST * float(pixel))
    axes = [torch.arange(float(low[k]) - MARGIN * voxel, float(high[k]) + (MARGIN + 1) * voxel, voxel,
                         device=maps.nearness.device) for k in range(3)]
    cells = _classify(maps, cameras, axes, voxel)
    truncation = TRUNCATION * voxel
    near = (cells == NEAR).nonzero()
    distances = cells.float() * truncation
    told = cells == FREE
    weights = torch.full_like(distances, SURE)
    for part in near.split(65536):
        points, places = torch.stack([axes[k][part[:, k]] for k in range(3)], -1), tuple(part.T)
        distances[places], told[places], weights[places] = signed_distances(points, maps, cameras, truncation)
    stray = max(2, len(seen) // (2000 * len(views)))  # a handful of stray pixels below the object does not count
    lowest = float(seen[:, 1].kthvalue(min(stray, len(seen))).values)
    lowest -= float(pixel * torch.deg2rad(cameras.elevations.mean()).cos()) / 2  # half a pixel below its centre
    cut = cut_floor(distances.cpu().numpy(), told.cpu().numpy(), axes[1].cpu().numpy(), lowest, truncation)
    smooth = smoothed(torch.from_numpy(cut).to(weights), weights, neighbours)
    grid = torch.maximum(smooth, lowest - axes[1][:, None]).cpu().numpy()  # the floor stays flat
    return closed_surface(grid, axes, voxel)


def smoothed(distances: Tensor, weights: Tensor, neighbours: float = NEIGHBOURS) -> Tensor:
    """Signed distances [X,Y,Z] of which views are this sure [X,Y,Z] => the same, nearer to their neighbours.

    ROUNDS of Jacobi's iteration for the least sum of weight * (change)^2 and of neighbours * distance * (distance -
    mean around it). Where many views see a surface squarely nothing changes; what is left of their noise, and the
    ragged ends of carving where none sees anything, becomes smooth.
    """
    weights = weights.clamp_min(LEAST)
    share = neighbours / (weights + neighbours)
    out, kept = distances, (1 - share) * distances
    for _ in range(ROUNDS):
        around = F.pad(out[None, None], (1,) * 6, mode="replicate")
        for dim in (2, 3, 4):
            length = around.shape[dim] - 2
            ends = around.narrow(dim, 0, length) + around.narrow(dim, 2, length)
            around = (ends / 2 + around.narrow(dim, 1, length)) / 2
        out = kept + share * around[0, 0]
    return out


def signed_distances(points: Tensor, maps: ViewMaps, cameras: Cameras,
                     truncation: float) -> tuple[Tensor, Tensor, Tensor]:
    """Points [P,3] => signed distances [P] within +-truncation (positive outside), whether any view can tell [P], and
    how sure those are that see a surface near [P]: 1 for each that looks at it squarely."""
    n, size = maps.nearness.shape[:2]
    uv, depth = cameras.project(points)
    pixel = pixel_size(cameras, size, depth)
    beside = F.grid_sample(maps.silhouettes[:, None], (uv * 2 - 1)[:, None], mode="bilinear", padding_mode="border",
                           align_corners=False)[:, 0, 0] * pixel
    column, row = (uv * size).long().clamp(0, size - 1).unbind(-1)
    index = row * size + column
    dx, dy = uv[..., 0] * size - column - 0.5, uv[..., 1] * size - row - 0.5
    nearness, cosine, gx, gy = (m.reshape(n, -1).gather(1, index)
                                for m in (maps.nearness, maps.cosines, maps.slopes[:, 0], maps.slopes[:, 1]))
    behind = (1 / (nearness + gx * dx + gy * dy).clamp_min(1e-3) - depth) * cosine
    tells = (cosine > MIN_COS) & (beside < pixel) & (behind > -truncation)
    # seen squarely counts more; what lies behind a surface counts less the deeper it lies
    weight = torch.where(tells, cosine.square() * (1 + behind / truncation).clamp(0, 1), 0.0)
    total = weight.sum(0)
    mean = (weight * behind.clamp(max=truncation)).sum(0) / total.clamp_min(1e-9)
    mean = torch.where(total > 1e-6, mean, -truncation)
    most, second = beside.topk(min(2, n), 0).values[[0, -1]]
    # one silhouette may be wrong: where depth maps know a surface, two must agree to carve it away
    carved = torch.where(total > 1e-6, second, most)
    distance = torch.maximum(mean, carved)
    squareness = torch.where(tells & (behind.abs() < truncation), cosine.square(), 0.0)
    maybe = _seen_from_both_sides(index, squareness, maps.normals)
    if len(maybe):
        rays = F.normalize(points[maybe].T - cameras.centers[..., None], dim=1)
        normals = maps.normals.flatten(2).gather(2, index[:, None, maybe].expand(-1, 3, -1))
        through = (behind[:, maybe] >= truncation) & (cosine[:, maybe] > MIN_COS)
        thick, sheet = thicken_sheets(behind[:, maybe], squareness[:, maybe], normals, rays, beside[:, maybe], through,
                                      SHEET * truncation / TRUNCATION)
        distance[maybe[sheet]] = thick[sheet]
    sure = torch.where(behind < truncation, weight, 0.0).sum(0)
    return distance.clamp(-truncation, truncation), (total > 1e-6) | (carved > 0), sure


def _seen_from_both_sides(index: Tensor, weight: Tensor, normals: Tensor) -> Tensor:
    """Numbers of the points whose views' normals nearly cancel: mean normals shorter than 0.6."""
    sums = [(weight * axis.flatten(1).gather(1, index)).sum(0) for axis in normals.unbind(1)]
    return (torch.stack(sums).norm(dim=0) < 0.6 * weight.sum(0)).nonzero()[:, 0]


def _bounds(points: Tensor) -> tuple[Tensor, Tensor]:
    stray = max(1, len(points) // 100_000)
    low = points.kthvalue(stray, 0).values
    return low, -(-points).kthvalue(stray, 0).values


def _classify(maps: ViewMaps, cameras: Cameras, axes: list[Tensor], voxel: float) -> Tensor:
    """Cells of the grid [X,Y,Z]: FREE, HIDDEN or NEAR (worth a look), decided for blocks of 2^3 with room for doubt."""
    size = maps.nearness.shape[-1]
    corners = torch.stack(torch.meshgrid(*(axis[::2] for axis in axes), indexing="ij"), -1)
    uv, depth = cameras.project(corners.reshape(-1, 3))
    doubt = 1.8 * voxel  # half the diagonal of a block
    reach = math.ceil(0.6 * doubt / float(pixel_size(cameras, size, depth.mean())))  # in pairs of pixels
    # covered without a depth: what is there may lie anywhere, so nothing is free or hidden for that view
    hole = (maps.silhouettes < 0) & (maps.nearness == 0)
    known = torch.where(maps.cosines > 0, -maps.nearness, -torch.inf)
    closest, nowhere_closer = (  # of all that the block may cover; pairs of pixels are fine enough for that
        F.max_pool2d(F.max_pool2d(m, 2, ceil_mode=True), 2 * reach + 1, 1, reach)
        for m in (maps.nearness.masked_fill(hole, torch.inf), known.masked_fill(hole, 0.0)))
    furthest = -nowhere_closer
    column, row = ((uv * size).long().clamp(0, size - 1) // 2).unbind(-1)
    index = row * closest.shape[-1] + column
    first, last = (1 / m.flatten(1).gather(1, index) for m in (closest, furthest))
    votes = min(3, len(cameras))  # two may look along a sheet from its two ends
    free = (depth < first - doubt - voxel).sum(0) >= votes
    hidden = ((depth > last + doubt + 1.5 * voxel) & (last > 0)).all(0)
    blocks = (free.int() * FREE + (hidden & ~free).int() * HIDDEN).view(corners.shape[:3])
    for dim, axis in enumerate(axes):
        nearest = ((torch.arange(len(axis), device=axis.device) + 1) // 2).clamp(max=blocks.shape[dim] - 1)
        blocks = blocks.index_select(dim, nearest)
    return blocks
