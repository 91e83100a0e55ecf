"""Views without depth to a closed surface: the visual hull, pushed in where the views' colours disagree.

Signed distances on a grid are rendered as in Wang et al., "NeuS: Learning neural implicit surfaces by volume rendering
for multi-view reconstruction", 2021 (eq. 10-13), and follow the gradient of what the pictures then lack. Nothing neural
is left: the distances are those of the visual hull plus a depression >= 0, which is what is learnt. It starts at
nothing and is smooth, so places without a mark keep the hull, and thin parts do not melt. Where all that is near is as
wrong, it grows, as carving by colours does (Kutulakos and Seitz, "A theory of shape by space carving", 2000). The
colours that go with a surface need no learning: they are the mean of the views that see the place.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from coser.cameras import Cameras, pixel_centers
from coser.reconstruction.hull import DistanceGrid, agreed_hull
from coser.views import ViewSet

STRIDES = (4, 2, 1)  # cells of the finest grid a cell of each level; pictures shrink alike
STEPS = (80, 120, 60)  # of each level
RAYS = (256, 4096)  # a step, at least and at most; between them a quarter of all
SAMPLES = 12  # a ray
WINDOW = (-2.0, 4.0)  # cells in front of and behind the surface
SOFTNESS = 0.5  # cells; the scale of the logistic density around the surface
CONTINUED = 4  # pixels that colours go on for beyond the edge of what is covered
RECOLOR = 20  # steps between two colourings
SHALLOW = 1.5  # cells; a view that lies deeper behind its surface says little about a place's colour
STEP = 0.5  # cells; how far a step moves where the gradient is as strong as it usually is
MOMENTUM = 0.8  # share of a step that goes where the steps before went
DRIFT = 0.1  # cells; how far a step moves inwards where views disagree about the colour of the surface
AGREED = 0.08  # in [0,1]; how much they differ on a surface that is right, by blur and misplacement
SEVERAL = 1.5  # views at least must see a place to disagree about it
CLEAR = 0.04  # in [0,1]; colours that differ less pull the less, so that noise does not carve
OPACITY = 1.0  # weight of covered pixels' transparency against colour differences
DECAY = 0.998  # of a depression that is left a step, where no colour asks for it
SMOOTH = 0.5  # share of the way to their neighbours' mean that depressions go


@dataclass(frozen=True)
class FitStep:
    """One moment of a fit: index of total, the mean colour difference of its rays, and at the end the grid."""

    index: int
    total: int
    difference: float
    grid: DistanceGrid | None = None


def fit(views: ViewSet, cameras: Cameras, resolution: int = 128, *, seed: int = 0,
        steps: tuple[int, int, int] = STEPS) -> tuple[np.ndarray, np.ndarray, float]:
    """`stream_fit` drained => vertices [V,3] float32, faces [F,3] int64 (right hand outward), the voxel's side."""
    for step in stream_fit(views, cameras, resolution, seed=seed, steps=steps):
        pass
    return step.grid.surface()


def stream_fit(views: ViewSet, cameras: Cameras, resolution: int = 128, *, seed: int = 0,
               steps: tuple[int, int, int] = STEPS) -> Iterator[FitStep]:
    """Posed views, of which colours and masks count => the steps of fitting their surface; the last carries its grid.

    views: N >= 1 square views that each show something; depths are not used. cameras: their N perspective cameras,
    anywhere, of objects of any size. resolution, errors, and what happens to views that contradict each other: as for
    `agreed_hull`; at a level where no view has a pixel that is wholly covered, the surface stays as it was. seed: of
    the rays that are drawn; on a CPU the same seed makes the same surface but for rounding.
    steps: of the three levels, whose cells are four, two and one of the finest grid's. Every step is a moment to leave.
    """
    hull = agreed_hull(views.masks, cameras, resolution)
    cameras = cameras.to(views.views.device)
    generator = torch.Generator(views.views.device).manual_seed(seed)
    total, done, depression, difference = sum(steps), 0, None, float("nan")
    yield FitStep(0, total, float("nan"))
    for stride, count in zip(STRIDES, steps):
        level = _Level(hull, views, cameras, stride, depression)
        for index in range(count if len(level.view) else 0):
            if index % RECOLOR == 0:
                level.recolor()
            difference = level.step(generator, 1 - index / count)
            done += 1
            if done < total:
                yield FitStep(done, total, difference)
        depression = level.depression
    yield FitStep(total, total, difference, DistanceGrid(level.distances(), hull.axes, hull.voxel))


class _Level:
    """One level of the fit: its grid, its pictures, and where each of their rays meets the surface."""

    def __init__(self, hull: DistanceGrid, views: ViewSet, cameras: Cameras, stride: int, depression: Tensor | None):
        self.hull = hull.distances[::stride, ::stride, ::stride].contiguous()
        self.shape, self.voxel = self.hull.shape, hull.voxel * stride
        self.axes = [axis[::stride] for axis in hull.axes]
        self.origin = torch.stack([axis[0] for axis in hull.axes])
        self.cameras = cameras
        self.depression = torch.zeros_like(self.hull) if depression is None else F.interpolate(
            depression[None, None], self.shape, mode="trilinear", align_corners=True)[0, 0]
        self.velocity, self.pull = torch.zeros_like(self.hull).view(-1), torch.zeros_like(self.hull).view(-1)
        self.drift = torch.zeros_like(self.pull)  # inwards, where views disagree
        self.field = torch.zeros(self.hull.numel(), 4, device=self.hull.device)  # distance, red, green, blue
        self.field[:, 0] = self.distances().view(-1)
        size = max(16, views.views.shape[-1] // stride)
        pictures = F.adaptive_avg_pool2d(torch.cat([views.views, views.masks], 1), size)
        self.pictures, self.size = torch.cat([_continued(pictures), pictures[:, 3:]], 1), size
        covered = (pictures[:, 3] > 0.9).flatten(1)
        self.view, self.pixel = covered.nonzero(as_tuple=True)
        origins, directions = cameras.rays(pixel_centers(size, covered.device))
        self.origins, self.directions = origins[self.view, self.pixel], directions[self.view, self.pixel]
        self.lengths = self.directions.norm(dim=1)
        self.colors = self.pictures[:, :3].flatten(2).transpose(1, 2)[self.view, self.pixel]
        self.depths = self._entries()

    def distances(self) -> Tensor:
        return self.hull + self.depression

    def _entries(self) -> Tensor:
        """Depths at which the rays enter the surface, found by tracing spheres."""
        middle = torch.stack([(axis[0] + axis[-1]) / 2 for axis in self.axes])
        reach = float(torch.stack([axis[-1] - axis[0] for axis in self.axes]).norm()) / 2
        middle_depth = self.cameras.project(middle[None])[1][:, 0][self.view]
        depth = middle_depth - reach
        for _ in range(40):
            ahead = self._at(self.origins + depth[:, None] * self.directions, slice(0, 1))[:, 0]
            depth = depth + (0.9 * ahead / self.lengths).clamp(min=-self.voxel, max=reach)
        return torch.minimum(depth, middle_depth + reach)

    def _corners(self, points: Tensor) -> tuple[Tensor, Tensor]:
        """Points [P,3] => the numbers of the eight cells around each, [P,8], and their weights."""
        x, y, z = self.shape
        last = torch.tensor([x - 1.001, y - 1.001, z - 1.001], device=points.device)
        place = torch.minimum(((points - self.origin) / self.voxel).clamp_min(0), last)
        cell = place.long()
        part = place - cell
        base = (cell[:, 0] * y + cell[:, 1]) * z + cell[:, 2]
        offsets = torch.tensor([(i * y + j) * z + k for i in (0, 1) for j in (0, 1) for k in (0, 1)],
                               device=points.device)
        sides = torch.stack([1 - part, part], -1)
        weights = (sides[:, 0, :, None, None] * sides[:, 1, None, :, None] * sides[:, 2, None, None, :]).flatten(1)
        return base[:, None] + offsets, weights

    def _at(self, points: Tensor, channels: slice = slice(0, 4)) -> Tensor:
        cells, weights = self._corners(points)
        values = self.field[:, channels].index_select(0, cells.view(-1)).unflatten(0, cells.shape)
        return (values * weights[..., None]).sum(1)

    def recolor(self) -> None:
        """Gives the cells around the surface the mean colour of the views that see them, or nearly do, and finds the
        places that these views disagree about: no gradient leads away from where all around is as wrong."""
        band = ((self.field[:, 0] < 2 * self.voxel) & (self.field[:, 0] > -7 * self.voxel)).nonzero()[:, 0]
        seen = torch.zeros(len(self.pictures), self.size**2, device=band.device)
        seen[self.view, self.pixel] = self.depths
        maps = torch.cat([self.pictures, seen.view(-1, 1, self.size, self.size)], 1)
        x, y, z = self.shape
        self._gather_neighbours(band)
        for part in band.split(65536):
            cell = part // (y * z), part // z % y, part % z
            points = torch.stack([axis[place] for axis, place in zip(self.axes, cell)], -1)
            uv, depth = self.cameras.project(points)
            grid = (uv * 2 - 1)[:, None]
            color = F.grid_sample(self.pictures, grid, align_corners=False)[:, :, 0]
            surface = F.grid_sample(maps[:, 4:], grid, mode="nearest", align_corners=False)[:, 0, 0]
            behind = torch.where(surface > 0, depth - surface, 10 * self.voxel).clamp(0, 10 * self.voxel)
            weight = torch.exp(-behind / (SHALLOW * self.voxel)) * (color[:, 3] > 0.5) + 1e-9
            total = weight.sum(0)
            mean = (weight[:, None] * color[:, :3]).sum(0) / total
            self.field[part, 1:] = mean.T
            spread = ((weight[:, None] * (color[:, :3] - mean).square()).sum(0) / total).mean(0).sqrt()
            asked = (total.square() > SEVERAL * weight.square().sum(0)) & (self.field[part, 0].abs() < 1.5 * self.voxel)
            self.drift[part] = ((spread - AGREED) / AGREED).clamp(0, 1) * asked * (DRIFT * self.voxel)

    @torch.enable_grad()
    def step(self, generator: torch.Generator, haste: float) -> float:
        """One step along the gradient of the rendered difference of some rays; that difference."""
        device = self.hull.device
        count = min(max(len(self.view) // 4, RAYS[0]), RAYS[1])
        rays = torch.randint(len(self.view), (count,), generator=generator, device=device)
        ticks = torch.linspace(*WINDOW, SAMPLES + 1, device=device) * self.voxel
        ticks = ticks + (torch.rand(count, 1, generator=generator, device=device) - 0.5) * (ticks[1] - ticks[0])
        depths = self.depths[rays, None] + ticks / self.lengths[rays, None]
        points = self.origins[rays, None] + depths[..., None] * self.directions[rays, None]
        cells, weights = self._corners(points.view(-1, 3))
        values = (self.field.index_select(0, cells.view(-1)).view(*cells.shape, 4) * weights[..., None]).sum(1)
        values = values.view(count, SAMPLES + 1, 4)
        distances = values[..., 0].clone().requires_grad_()
        colors = (values[:, 1:, 1:] + values[:, :-1, 1:]) / 2
        shares = neus_weights(distances, SOFTNESS * self.voxel)
        opacity = shares.sum(1)
        rendered = (shares[..., None] * colors).sum(1) / (opacity[:, None] + 1e-3)
        difference = rendered - self.colors[rays]
        colour = F.huber_loss(difference, torch.zeros_like(difference), reduction="none", delta=CLEAR).sum(1) / CLEAR
        (colour + OPACITY * (1 - opacity)).sum().backward()
        self._find(rays, depths, values[..., 0])
        self.pull.zero_().index_add_(0, cells.view(-1), (distances.grad.view(-1, 1) * weights).view(-1))
        self._move(haste)
        return float(difference.detach().abs().mean())

    def _find(self, rays: Tensor, depths: Tensor, distances: Tensor) -> None:
        """Remembers where the rays now meet the surface: at the first crossing in their window, else at its end."""
        inside = distances < 0
        first = inside.int().argmax(1)
        row = torch.arange(len(rays), device=rays.device)
        before = (first - 1).clamp_min(0)
        d0, d1 = distances[row, before], distances[row, first]
        share = torch.where(first > 0, d0 / (d0 - d1).clamp_min(1e-9), 0.0)
        met = depths[row, before] + share * (depths[row, first] - depths[row, before])
        self.depths[rays] = torch.where(inside.any(1), met, self.depths[rays])

    def _gather_neighbours(self, band: Tensor) -> None:
        """Decides which cells move until the next colouring, and finds the six neighbours of each."""
        x, y, z = self.shape
        place = torch.stack([band // (y * z), band // z % y, band % z])
        self.band, neighbours = band, []
        for axis, stride in enumerate((y * z, z, 1)):
            for way in (-1, 1):
                there = (place[axis] + way).clamp(0, self.shape[axis] - 1)
                neighbours.append(band + (there - place[axis]) * stride)
        self.neighbours = torch.stack(neighbours)

    def _move(self, haste: float) -> None:
        """Moves the surface against the pull that the rays have left in the cells, and smooths the depressions."""
        pull = self.pull[self.band]
        self.velocity[self.band] = velocity = MOMENTUM * self.velocity[self.band] - (1 - MOMENTUM) * pull
        usual = (pull.square().sum() / (pull != 0).sum().clamp_min(1)).sqrt().clamp_min(1e-12)
        depression = self.depression.view(-1)
        limit = self.voxel / 2
        moved = (velocity * (haste * STEP * self.voxel / usual)).clamp(-limit, limit) + haste * self.drift[self.band]
        moved += DECAY * depression[self.band]
        depression[self.band] = moved.clamp_min(0)
        smooth = depression[self.neighbours].mean(0)
        depression[self.band] = torch.lerp(depression[self.band], smooth, SMOOTH)
        self.field[self.band, 0] = self.hull.view(-1)[self.band] + depression[self.band]


def _continued(pictures: Tensor) -> Tensor:
    """Premultiplied colours and coverage [N,4,S,S] => straight colours [N,3,S,S], continued outwards from the edges:
    what lies just beside a silhouette must not pass for black."""
    known = pictures[:, 3:] >= 0.5
    colors = torch.where(known, pictures[:, :3] / pictures[:, 3:].clamp_min(1e-3), 0.0)
    for _ in range(CONTINUED):
        share = F.avg_pool2d(known.float(), 3, 1, 1)
        colors = torch.where(known, colors, F.avg_pool2d(colors, 3, 1, 1) / share.clamp_min(1e-6))
        known = share > 0
    return colors


def neus_weights(distances: Tensor, scale: float) -> Tensor:
    """Signed distances [R,K+1] along rays => the weights [R,K] of the sections between them (NeuS, eq. 10-13).

    scale: of the logistic density around the surface, in the units of the distances.
    """
    inside = torch.sigmoid(distances / scale)
    alpha = ((inside[:, :-1] - inside[:, 1:] + 1e-5) / (inside[:, :-1] + 1e-5)).clamp(0, 1)
    through = torch.cumprod(1 - alpha + 1e-7, 1)
    return alpha * torch.cat([torch.ones_like(through[:, :1]), through[:, :-1]], 1)
