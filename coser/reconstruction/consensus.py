"""Views that contradict each other to a closed surface: not what all of them allow, but what fits all of them best.

Carving by silhouettes keeps what no view denies. Generated views deny each other's thin and far parts, and carving
takes all of those. Here every view's opinion of a point, a signed distance to its silhouette or its depth map, is
averaged, and the level of the mean at which the shape fits the silhouettes best is its surface.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from scipy.ndimage import distance_transform_edt
from torch import Tensor

from coser.cameras import Cameras
from coser.reconstruction.floor import cut_floor
from coser.reconstruction.maps import ViewMaps, pixel_size, surface_points, view_maps
from coser.reconstruction.surface import closed_surface
from coser.views import ViewSet

TRUNCATION = 0.12  # world units: how far generated views commonly differ
MARGIN = 3  # voxels of air around the object
LEVELS = 33  # how many levels are tried
LEAST_COS = 0.1  # a surface seen flatter than this still has this much to say


def fuse_consensus(views: ViewSet, cameras: Cameras, resolution: int = 64) -> tuple[np.ndarray, np.ndarray, float]:
    """Views and their cameras => vertices [V,3] float32, faces [F,3] int64 (right hand outward), the voxel's side.

    As `fuse`, for views that contradict each other. resolution: the grid spends about resolution^3 voxels on the
    object's box. Raises ValueError when no level of the mean leaves a surface.
    """
    views, cameras = views.to("cpu"), cameras.to("cpu")
    maps = view_maps(views, cameras)
    silhouettes = silhouette_distances_everywhere(views.masks[:, 0])
    points = [p[s] for p, s in zip(*surface_points(views, cameras))]
    low, high = (torch.stack([p.quantile(share, 0) for p in points]) for share in (0.002, 0.998))
    lowest = float(low[:, 1].median())  # most views agree on where the object stands
    low, high = low.amin(0), high.amax(0)
    voxel = float((high - low).clamp_min(0.1).prod()) ** (1 / 3) / resolution
    axes = [torch.arange(float(low[k]) - MARGIN * voxel, float(high[k]) + (MARGIN + 1) * voxel, voxel)
            for k in range(3)]
    grid = torch.stack(torch.meshgrid(*axes, indexing="ij"), -1)
    parts = [mean_opinion(part, maps, silhouettes, cameras) for part in grid.view(-1, 3).split(65536)]
    distances, told = (torch.cat(p).view(grid.shape[:3]) for p in zip(*parts))
    distances = torch.from_numpy(cut_floor(distances.numpy(), told.numpy(), axes[1].numpy(), lowest, TRUNCATION))
    level = best_level(distances, grid, views.masks, cameras, voxel)
    return closed_surface((distances - level).numpy(), axes, voxel)


def mean_opinion(points: Tensor, maps: ViewMaps, silhouettes: Tensor, cameras: Cameras) -> tuple[Tensor, Tensor]:
    """Points [P,3] => the views' mean signed distance [P] within +-TRUNCATION, and whether any can tell [P].

    silhouettes [N,S,S]: signed distances in pixels. What lies deep behind a view's surface is nothing it can tell.
    """
    n, size = maps.nearness.shape[:2]
    uv, depth = cameras.project(points)
    beside = F.grid_sample(silhouettes[:, None], (uv * 2 - 1)[:, None], padding_mode="border", align_corners=False)
    beside = beside[:, 0, 0] * pixel_size(cameras, size, depth)
    column, row = (uv * size).long().clamp(0, size - 1).unbind(-1)
    index = row * size + column
    nearness, cosine = (m.reshape(n, -1).gather(1, index) for m in (maps.nearness, maps.cosines))
    cosine = cosine.clamp_min(LEAST_COS)
    behind = (1 / nearness.clamp_min(1e-3) - depth) * cosine
    outside = beside > 0
    opinion = torch.where(outside, beside, torch.maximum(beside, behind)).clamp(-TRUNCATION, TRUNCATION)
    weight = torch.where(outside, 1.0, cosine * (1 + behind / TRUNCATION).clamp(0, 1))
    total = weight.sum(0)
    told = total > 0.05
    mean = (weight * opinion).sum(0) / total.clamp_min(1e-6)
    return torch.where(told, mean, -TRUNCATION), told


def best_level(distances: Tensor, grid: Tensor, masks: Tensor, cameras: Cameras, voxel: float) -> float:
    """The level of `distances` [X,Y,Z] whose inside, seen by the cameras, has the best mean IoU with `masks`.

    grid [X,Y,Z,3]: the cells' places. Pictures are made coarse enough that no ray slips through between cells.
    """
    pixel = float(pixel_size(cameras, 1, cameras.centers.norm(dim=-1).mean()))
    pool = max(1, int(np.ceil(masks.shape[-1] * 1.2 * voxel / pixel)))
    covered = F.max_pool2d((masks >= 0.5).float(), pool, ceil_mode=True).flatten(1) > 0
    side = -(-masks.shape[-1] // pool)
    uv, _ = cameras.project(grid.reshape(-1, 3))
    column, row = (uv * masks.shape[-1] / pool).long().clamp(0, side - 1).unbind(-1)
    nearest = torch.full(covered.shape, torch.inf)
    nearest.scatter_reduce_(1, row * side + column, distances.reshape(1, -1).expand(len(masks), -1), "amin")
    levels = torch.linspace(-0.8, 0.8, LEVELS) * TRUNCATION
    scores = []
    for level in levels:
        inside = nearest < level
        scores.append(float(((inside & covered).sum(1) / (inside | covered).sum(1).clamp_min(1)).mean()))
    return float(levels[int(np.argmax(scores))])


def silhouette_distances_everywhere(masks: Tensor) -> Tensor:
    """Coverage [N,S,S] => signed distances to the silhouette in pixels, positive outside, however far."""
    inside = (masks >= 0.5).numpy()
    signed = [np.where(m, 0.5 - distance_transform_edt(m), distance_transform_edt(~m) - 0.5) for m in inside]
    return torch.from_numpy(np.stack(signed)).to(masks.dtype)
