"""Silhouettes to a closed surface: the visual hull, the largest solid that no view denies.

Laurentini, "The visual hull concept for silhouette-based image understanding", 1994. Every view says how far a point
lies beside its silhouette, finer than a pixel; the hull's signed distance is the largest of these. What no view can
deny, the cone under an object seen from above, ends at the lowest place where a sight line can have touched the object.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from scipy.ndimage import distance_transform_edt
from torch import Tensor

from coser.cameras import Cameras, pixel_centers
from coser.reconstruction.likeness import silhouette_likeness
from coser.reconstruction.maps import REACH, pixel_size, silhouette_distances
from coser.reconstruction.surface import closed_surface

FINEST = 1.5  # pixels; a finer grid would cost time and show nothing more
MARGIN = 3  # cells of air around the object
BLOCK = 4  # cells; away from the surface one distance in so many is worked out, the others lie between
SEARCH = 28  # cells a side of the grids that the object's box is searched with
TRIAL = 64  # cells a side where contradictions are looked for
CONTRADICTED = 0.9  # mean IoU of a hull with its silhouettes; less than this is more than a pixel around thin parts
TOUCH = 0.3  # cells; a sight line that passes the hull this closely touches it
WIDEST = 95.0  # degrees between neighbouring views; sight lines further apart meet too far from the object
ROOM = 1.5  # of the largest silhouette's radius: nothing of the object lies further from its middle
CONTRADICTION = ("masks contradict each other: no point of space lies inside all silhouettes. Do the cameras belong to "
                 "these views?")


@dataclass(frozen=True)
class DistanceGrid:
    """Signed distances [X,Y,Z] (world units, negative inside) at cells `voxel` apart, whose places along x, y and z are
    the three axes."""

    distances: Tensor
    axes: list[Tensor]
    voxel: float

    def at(self, points: Tensor) -> Tensor:
        """Distances [P] at points [P,3], linear between cells; outside, those of the grid's edge."""
        scaled = [(points[:, k] - self.axes[k][0]) / (self.axes[k][-1] - self.axes[k][0]) * 2 - 1 for k in (2, 1, 0)]
        return F.grid_sample(self.distances[None, None], torch.stack(scaled, -1)[None, :, None, None],
                             padding_mode="border", align_corners=True)[0, 0, :, 0, 0]

    def surface(self) -> tuple[np.ndarray, np.ndarray, float]:
        """vertices [V,3] float32, faces [F,3] int64 (right hand outward), the voxel's side: see `closed_surface`."""
        return closed_surface(self.distances.cpu().numpy(), self.axes, self.voxel)


def visual_hull(masks: Tensor, cameras: Cameras, resolution: int = 128, *, denials: int = 1,
                floor: bool = True) -> tuple[np.ndarray, np.ndarray, float]:
    """Silhouettes => vertices [V,3] float32, faces [F,3] int64 (right hand outward), the voxel's side.

    Arguments and errors as for `hull_grid`. The surface is closed.
    """
    return hull_grid(masks, cameras, resolution, denials=denials, floor=floor).surface()


def agreed_hull(masks: Tensor, cameras: Cameras, resolution: int = 128) -> DistanceGrid:
    """`hull_grid` with as few denials as make a hull that looks like its silhouettes.

    Where one denial leaves a hull that does not, the views contradict each other, and two and more denials are tried,
    up to a quarter of the views; the best of these is taken. Arguments and errors as for `hull_grid`.
    """
    best, trial = None, min(resolution, TRIAL)
    for denials in range(1, max(1, len(masks) // 4) + 1):
        try:
            vertices, faces, _ = visual_hull(masks, cameras, trial, denials=denials)
        except ValueError:
            if denials == max(1, len(masks) // 4) and best is None:
                raise
            continue
        likeness = float(silhouette_likeness(vertices, faces, masks, cameras).mean())
        if best is None or likeness > best[0] + 0.01:
            best = likeness, denials
        if likeness >= CONTRADICTED:
            break
    return hull_grid(masks, cameras, resolution, denials=best[1])


def hull_grid(masks: Tensor, cameras: Cameras, resolution: int = 128, *, denials: int = 1,
              floor: bool = True) -> DistanceGrid:
    """Silhouettes => signed distances to their hull, on a grid around it.

    masks [N,1,S,S] in [0,1]: coverage, each view must show something; cameras: their N perspective cameras, anywhere,
    of objects of any size. A silhouette cut off by the picture's edge denies nothing beyond it. resolution: the grid
    spends at most resolution^3 cells on the object's box, none much finer than a pixel. denials: as many views must
    deny a point to carve it away; more than one forgives views that contradict the others. floor: end the unseen cone
    below the object (`lowest_touch`); without, this is the plain hull. Raises ValueError when nothing is left.
    """
    if masks.ndim != 4 or masks.shape[1] != 1 or masks.shape[2] != masks.shape[3]:
        raise ValueError(f"masks must be [N,1,S,S], got {list(masks.shape)}")
    if len(masks) != len(cameras):
        raise ValueError(f"cameras must be as many as the masks ({len(masks)}), got {len(cameras)}")
    if not 1 <= denials <= len(masks):
        raise ValueError(f"denials must lie between 1 and the number of masks ({len(masks)}), got {denials}")
    empty = ~(masks >= 0.5).flatten(1).any(1)
    if empty.any():
        raise ValueError("masks must each show something, got nothing of at least 0.5 in view "
                         f"{int(empty.int().argmax())}")
    cameras = cameras.to(masks.device)
    ball = _ball(masks, cameras)
    silhouettes = signed_silhouettes(masks[:, 0])
    low, high = _box(silhouettes, cameras, ball, denials)
    pixel = float(pixel_size(cameras, masks.shape[-1], _depths(cameras, ball[0]).mean()))
    voxel = max(float((high - low).clamp_min(8 * pixel).prod()) ** (1 / 3) / resolution, FINEST * pixel)
    sides = [max(2, -(-(int((high - low)[k] / voxel) + 2 * MARGIN) // BLOCK)) * BLOCK + 1 for k in range(3)]
    middle = (low + high) / 2
    axes = [middle[k] + (torch.arange(sides[k], device=masks.device) - (sides[k] - 1) / 2) * voxel for k in range(3)]
    rough = _distances([axis[::BLOCK] for axis in axes], silhouettes, cameras, ball, denials)
    distances = F.interpolate(rough[None, None], sides, mode="trilinear", align_corners=True)[0, 0]
    near = (distances.abs() < 1.8 * BLOCK * voxel).nonzero()
    for part in near.split(65536):
        points = torch.stack([axes[k][part[:, k]] for k in range(3)], -1)
        distances[tuple(part.T)] = beside_silhouettes(points, silhouettes, cameras, ball, denials)
    grid = DistanceGrid(distances, axes, voxel)
    if not bool((distances < 0).any()):
        raise ValueError(CONTRADICTION)
    if floor:
        lowest = lowest_touch(grid, silhouettes, cameras)
        grid = DistanceGrid(torch.maximum(distances, lowest - axes[1][None, :, None]), axes, voxel)
    return grid


def beside_silhouettes(points: Tensor, silhouettes: Tensor, cameras: Cameras, ball: tuple[Tensor, float],
                       denials: int = 1) -> Tensor:
    """Points [P,3] => signed distances [P] (world units): the `denials`-largest of their distances out of the
    silhouettes [N,S,S] (pixels, positive outside), and nothing outside the ball (middle [3], radius)."""
    size = silhouettes.shape[-1]
    uv, depth = cameras.project(points)
    beside = F.grid_sample(silhouettes[:, None], (uv * 2 - 1)[:, None], mode="bilinear", padding_mode="border",
                           align_corners=False)[:, 0, 0] * pixel_size(cameras, size, depth)
    middle, radius = ball
    beside = torch.where(depth > 1e-2 * radius, beside, radius)  # nothing lies behind a camera
    beside = beside.amax(0) if denials == 1 else beside.topk(denials, 0).values[-1]
    return torch.maximum(beside, (points - middle).norm(dim=-1) - radius)


def signed_silhouettes(masks: Tensor) -> Tensor:
    """Coverage [N,S,S] => signed distances to the silhouette in pixels, positive outside: finer than a pixel near it,
    whole pixels far away."""
    inside = (masks >= 0.5).cpu().numpy()
    far = [np.full(m.shape, -max(m.shape), np.float64) if m.all() else
           np.where(m, 0.5 - distance_transform_edt(m), distance_transform_edt(~m) - 0.5) for m in inside]
    near = silhouette_distances(masks)
    return torch.where(near.abs() < REACH, near, torch.from_numpy(np.stack(far)).to(near))


def lowest_touch(grid: DistanceGrid, silhouettes: Tensor, cameras: Cameras) -> float:
    """The height that the object reaches down to, as far as its silhouettes [N,S,S] (pixels) can tell; -inf when a view
    sees its underside, because then they tell it all, or when the views do not go around it.

    The sight line through a silhouette's lower edge touches the object somewhere within the hull and runs downwards:
    not above the place where it enters. The lowest of these places bounds the object's underside from above; what lies
    further down is seen by no view.
    """
    size = silhouettes.shape[-1]
    middle = torch.stack([axis[[0, -1]].mean() for axis in grid.axes])
    around = cameras.centers - middle
    azimuths = torch.rad2deg(torch.atan2(around[:, 0], around[:, 2])).sort().values
    if float(torch.cat([azimuths.diff(), azimuths[:1] + 360 - azimuths[-1:]]).max()) > WIDEST:
        return -torch.inf
    rows = torch.arange(size, device=silhouettes.device)[:, None]
    last = torch.where(silhouettes < 0, rows, -1).amax(1)  # [N,S], the lowest covered pixel of each column
    view, column = ((last >= 0) & (last < size - 1)).nonzero(as_tuple=True)
    pixel = last[view, column] * size + column
    origin, direction = (t[view, pixel] for t in cameras.rays(pixel_centers(size, silhouettes.device)))
    lowest_of_view = last[view, column] == last.amax(1)[view]
    if not len(view) or bool((direction[lowest_of_view, 1] > 0).any()):
        return -torch.inf
    reach = float(torch.stack([axis[-1] - axis[0] for axis in grid.axes]).norm()) / 2
    nearest = _depths(cameras, middle)[view] - reach
    steps = torch.arange(0, 2 * reach, 0.7 * grid.voxel, device=silhouettes.device)
    touching = TOUCH * grid.voxel
    inside = torch.stack([grid.at(origin + (nearest + step)[:, None] * direction) < touching for step in steps], 1)
    found = inside.any(1)
    entry = nearest + steps[inside.int().argmax(1)]
    pixel_side = pixel_size(cameras, size, entry)
    height = (origin + entry[:, None] * direction)[:, 1] + silhouettes[view, last[view, column], column] * pixel_side
    return float(height[found].min()) if bool(found.any()) else -torch.inf


def _ball(masks: Tensor, cameras: Cameras) -> tuple[Tensor, float]:
    """Middle [3] and radius of a ball that holds the object: where the sight lines through the silhouettes' middles
    meet, or pass the world's origin if they do not, and as far as a silhouette reaches there."""
    size = masks.shape[-1]
    covered = (masks[:, 0] >= 0.5).float()
    ticks = (torch.arange(size, device=masks.device) + 0.5) / size
    ends = [torch.where(covered.amax(dim) > 0, ticks, torch.nan) for dim in (1, 2)]  # along u, along v
    first, last = (torch.stack([torch.nan_to_num(e, nan=fill).amin(1) if fill > 0 else
                                torch.nan_to_num(e, nan=fill).amax(1) for e in ends], -1) for fill in (9.0, -9.0))
    origins, directions = (t[:, 0] for t in cameras.rays(((first + last) / 2)[:, None]))
    directions = F.normalize(directions, dim=-1)
    across = torch.eye(3, device=masks.device) - directions[:, :, None] * directions[:, None]
    # a millionth of a pull to the origin decides what the lines leave open
    system = across.sum(0) + 1e-6 * torch.eye(3, device=masks.device)
    middle = torch.linalg.solve(system.double(), (across @ origins[..., None]).sum(0).double())[:, 0].float()
    depth = _depths(cameras, middle)
    if bool((depth <= 0).any()):
        raise ValueError(f"cameras must look at one object, but that lies behind camera {int(depth.argmin())}")
    reach = (last - first).norm(dim=-1) / 2 * pixel_size(cameras, 1, depth)
    return middle, float(reach.max()) * (1.0 if len(masks) == 1 else ROOM)


def _box(silhouettes: Tensor, cameras: Cameras, ball: tuple[Tensor, float], denials: int) -> tuple[Tensor, Tensor]:
    """Corners of the hull's box, searched on ever smaller grids."""
    low, high = ball[0] - ball[1], ball[0] + ball[1]
    for _ in range(3):
        axes = [torch.linspace(float(low[k]), float(high[k]), SEARCH, device=low.device) for k in range(3)]
        cell = (high - low) / (SEARCH - 1)
        inside = (_distances(axes, silhouettes, cameras, ball, denials) < 0.6 * float(cell.norm())).nonzero()
        if not len(inside):
            raise ValueError(CONTRADICTION)
        first, last = inside.amin(0), inside.amax(0)
        low, high = (torch.stack([axes[k][end[k]] for k in range(3)]) for end in (first, last))
        low, high = low - cell, high + cell
    return low, high


def _distances(axes: list[Tensor], silhouettes: Tensor, cameras: Cameras, ball: tuple[Tensor, float],
               denials: int) -> Tensor:
    """`beside_silhouettes` of a whole grid, [X,Y,Z]."""
    points = torch.stack(torch.meshgrid(*axes, indexing="ij"), -1)
    parts = points.view(-1, 3).split(65536)
    return torch.cat([beside_silhouettes(p, silhouettes, cameras, ball, denials) for p in parts]).view(points.shape[:3])


def _depths(cameras: Cameras, point: Tensor) -> Tensor:
    """How deep a point [3] lies in each view, [N]."""
    return cameras.project(point[None])[1][:, 0]
