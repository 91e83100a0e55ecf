"""Views that contradict each other to a closed surface: not what all of them allow, but what fits all of them best.

Carving by silhouettes keeps what no view denies. Generated views deny each other's thin and far parts, and carving
takes all of those. Here every view's opinion of a point, a signed distance to its silhouette or its depth map, is
averaged, and the level of the mean at which the shape fits the silhouettes best is its surface.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

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
# of local levels: how wide a cell's edge is and how far apart levels are set (world units), steps of descent, what a
# missed pixel counts against one covered in vain, a cell in front of a surface against that, and levels that differ
SOFTNESS, PATCH, STEPS, MISSED, FREE, CALM = 0.015, 0.08, 30, 2.0, 0.03, 0.0005
LEAST_COS = 0.1  # a surface seen flatter than this still has this much to say


@dataclass(frozen=True)
class Opinions:
    """What views think of the cells of a grid around the object.

    places [X,Y,Z,3]: the cells', along the axes, `voxel` apart (world units). distances [X,Y,Z]: the views' mean signed
    distance, positive outside, within +-TRUNCATION. told [X,Y,Z]: whether any view can tell. lowest: the floor's
    height.
    """

    places: Tensor
    axes: list[Tensor]
    voxel: float
    distances: Tensor
    told: Tensor
    lowest: float

    def at_level(self, level: float | Tensor) -> "Opinions":
        """With the surface where the distances are `level`, one for all or [X,Y,Z]."""
        return replace(self, distances=self.distances - level)

    def with_floor(self) -> "Opinions":
        """Without the unseen cone under the object (`cut_floor`)."""
        cut = cut_floor(self.distances.numpy(), self.told.numpy(), self.axes[1].numpy(), self.lowest, TRUNCATION)
        return replace(self, distances=torch.from_numpy(cut))


@dataclass(frozen=True)
class CellsSeen:
    """Where N views see a grid's P cells: in their pictures (uv [N,P,2] in [0,1]), how far away (depths [N,P]), and in
    which pixel (pixels [N,P]) of pictures of side x side, of which one pixel is pool x pool of theirs."""

    uv: Tensor
    depths: Tensor
    pixels: Tensor
    side: int
    pool: int


def fuse_consensus(views: ViewSet, cameras: Cameras, resolution: int = 64,
                   local: bool = False) -> tuple[np.ndarray, np.ndarray, float]:
    """Views and their cameras => vertices [V,3] float32, faces [F,3] int64 (right hand outward), the voxel's side.

    As `fuse`, for views that contradict each other. resolution: the grid spends about resolution^3 voxels on the
    object's box. local: the level varies from place to place (`local_levels`), which saves thin parts that the views
    show in different places. Raises ValueError when no level of the mean leaves a surface.
    """
    views, cameras = views.to("cpu"), cameras.to("cpu")
    maps = view_maps(views, cameras)
    opinions = opinions_of(views, cameras, maps, resolution)
    seen = cells_seen(opinions, cameras, views.masks.shape[-1])
    opinions = opinions.at_level(best_level(opinions, views.masks, seen))
    if local:
        opinions = opinions.at_level(local_levels(opinions, views.masks, maps, seen))
        opinions = opinions.at_level(best_level(opinions, views.masks, seen)).with_floor()
    return closed_surface(opinions.distances.numpy(), opinions.axes, opinions.voxel)


def opinions_of(views: ViewSet, cameras: Cameras, maps: ViewMaps, resolution: int) -> Opinions:
    """What the views think of about resolution^3 cells; maps: of the same views."""
    silhouettes = silhouette_distances_everywhere(views.masks[:, 0])
    points = [p[s] for p, s in zip(*surface_points(views, cameras))]
    low, high = (torch.stack([p.quantile(share, 0) for p in points]) for share in (0.002, 0.998))
    lowest = float(low[:, 1].median())  # most views agree on where the object stands
    low, high = low.amin(0), high.amax(0)
    voxel = float((high - low).clamp_min(0.1).prod()) ** (1 / 3) / resolution
    axes = [torch.arange(float(low[k]) - MARGIN * voxel, float(high[k]) + (MARGIN + 1) * voxel, voxel)
            for k in range(3)]
    places = torch.stack(torch.meshgrid(*axes, indexing="ij"), -1)
    parts = [mean_opinion(part, maps, silhouettes, cameras) for part in places.view(-1, 3).split(65536)]
    distances, told = (torch.cat(p).view(places.shape[:3]) for p in zip(*parts))
    return Opinions(places, axes, voxel, distances, told, lowest).with_floor()


def mean_opinion(points: Tensor, maps: ViewMaps, silhouettes: Tensor, cameras: Cameras) -> tuple[Tensor, Tensor]:
    """Points [P,3] => the views' mean signed distance [P] within +-TRUNCATION, and whether any can tell [P].

    silhouettes [N,S,S]: signed distances in pixels. What lies deep behind a view's surface, or where its depth map has
    a hole, is nothing it can tell.
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
    weight = torch.where(outside, 1.0, (nearness > 0) * cosine * (1 + behind / TRUNCATION).clamp(0, 1))
    total = weight.sum(0)
    told = total > 0.05
    mean = (weight * opinion).sum(0) / total.clamp_min(1e-6)
    return torch.where(told, mean, -TRUNCATION), told


def cells_seen(opinions: Opinions, cameras: Cameras, size: int) -> CellsSeen:
    """Where the cameras, with pictures of `size` pixels a side, see the cells; pixels are pooled until no ray slips
    through between cells."""
    pixel = float(pixel_size(cameras, 1, cameras.centers.norm(dim=-1).mean()))
    pool = max(1, int(np.ceil(size * 1.2 * opinions.voxel / pixel)))
    side = -(-size // pool)
    uv, depths = cameras.project(opinions.places.reshape(-1, 3))
    column, row = (uv * size / pool).long().clamp(0, side - 1).unbind(-1)
    return CellsSeen(uv, depths, row * side + column, side, pool)


def best_level(opinions: Opinions, masks: Tensor, seen: CellsSeen) -> float:
    """The level of the distances whose inside, as the cells are seen, has the best mean IoU with masks [N,1,S,S]."""
    covered = F.max_pool2d((masks >= 0.5).float(), seen.pool, ceil_mode=True).flatten(1) > 0
    nearest = torch.full((len(masks), seen.side**2), torch.inf)
    nearest.scatter_reduce_(1, seen.pixels, opinions.distances.reshape(1, -1).expand(len(masks), -1), "amin")
    levels = torch.linspace(-0.8, 0.8, LEVELS) * TRUNCATION
    scores = []
    for level in levels:
        inside = nearest < level
        scores.append(float(((inside & covered).sum(1) / (inside | covered).sum(1).clamp_min(1)).mean()))
    return float(levels[int(np.argmax(scores))])


def local_levels(opinions: Opinions, masks: Tensor, maps: ViewMaps, seen: CellsSeen) -> Tensor:
    """Levels [X,Y,Z] of the distances whose inside fits masks [N,1,S,S] best, smooth over PATCH.

    Where views show a thin part in different places, the mean distance has a valley that never falls below zero; a
    higher level there brings the part back, at its mean place. Found by gradient descent: a cell is inside by a
    sigmoid of its distance, a pixel is covered unless all cells behind it are empty, and what is covered in vain costs
    less than what is missed. Cells in front of what a view sees cost, too.
    """
    shape, n, size = opinions.distances.shape, len(masks), masks.shape[-1]
    index = (seen.pixels + seen.side**2 * torch.arange(n)[:, None]).flatten()
    covered = F.avg_pool2d(masks.float(), seen.pool, ceil_mode=True).flatten()
    column, row = (seen.uv * size).long().clamp(0, size - 1).unbind(-1)
    nearness = maps.nearness.flatten(1).gather(1, row * size + column)
    in_front = 1 / nearness.clamp_min(1e-3) - seen.depths > 2 * opinions.voxel
    free = ((nearness > 0) & in_front).float().mean(0).view(shape)
    start = (-opinions.distances / SOFTNESS).clamp(-8, 8)
    patches = [max(2, round(count * opinions.voxel / PATCH)) for count in shape]
    raised = torch.zeros(patches, requires_grad=True)  # in units of SOFTNESS
    optimizer = torch.optim.Adam([raised], lr=0.5, betas=(0.8, 0.95))
    for _ in range(STEPS):
        with torch.enable_grad():
            inside = start + _between(raised, shape)
            through = torch.zeros(len(covered)).index_add(0, index, F.softplus(inside).flatten().repeat(n))
            off = covered - (1 - torch.exp(-through))
            loss = torch.where(off > 0, MISSED * off, -off).sum()
            loss = loss + FREE * (inside.sigmoid() * free).sum() + CALM * raised.square().sum()
            (raised.grad,) = torch.autograd.grad(loss, raised)
        optimizer.step()
    return SOFTNESS * _between(raised.detach(), shape)


def _between(values: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Values at the corners of patches => at all cells of `shape`, in straight lines."""
    return F.interpolate(values[None, None], shape, mode="trilinear", align_corners=True)[0, 0]


def silhouette_distances_everywhere(masks: Tensor) -> Tensor:
    """Coverage [N,S,S] => signed distances to the silhouette in pixels, positive outside, however far."""
    inside = (masks >= 0.5).numpy()
    signed = [np.where(m, 0.5 - distance_transform_edt(m), distance_transform_edt(~m) - 0.5) for m in inside]
    return torch.from_numpy(np.stack(signed)).to(masks.dtype)
