"""Texels: which of them lie on a mesh and where, and what fills the gaps between charts."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from coser.rasterizer import covered_pixels

DILATION = 4  # texels; beyond, gaps are filled with ever coarser means


@dataclass(frozen=True)
class Texels:
    """P texels that lie on a mesh: row, column [P], their face [P] and where on it, as weights [P,3] of its corners."""

    row: Tensor
    column: Tensor
    face: Tensor
    weights: Tensor

    def __len__(self) -> int:
        return len(self.row)

    def __getitem__(self, index: Tensor) -> "Texels":
        return Texels(*(t.index_select(0, index) for t in (self.row, self.column, self.face, self.weights)))

    def blend(self, values: Tensor) -> Tensor:
        """What the faces' corners carry, [F,3,C] => the texels' [P,C]."""
        parts = values.reshape(len(values), -1).index_select(0, self.face).view(-1, *values.shape[1:])
        return torch.einsum("pk,pkc->pc", self.weights, parts)


def texels_of(uvs: Tensor, texture_size: int) -> Texels:
    """uvs [F,3,2] => the texels whose centres lie on a face; a face too small for any gets the texel at its middle,
    unless that belongs to another."""
    corners = uvs.double() * texture_size
    face, row, column = covered_pixels(corners, texture_size)
    taken = torch.zeros(texture_size, texture_size, dtype=torch.bool)
    taken[row, column] = True
    small = torch.bincount(face, minlength=len(uvs)) == 0
    middle = corners[small].mean(1).long().clamp(0, texture_size - 1)
    free = ~taken[middle[:, 1], middle[:, 0]]
    face = torch.cat([face, small.nonzero()[:, 0][free]])
    row, column = torch.cat([row, middle[free, 1]]), torch.cat([column, middle[free, 0]])
    x, y, constant = _weight_planes(corners).index_select(0, face).unbind(2)
    weights = torch.addcmul(torch.addcmul(constant, x, column[:, None] + 0.5), y, row[:, None] + 0.5).clamp(0, 1)
    return Texels(row, column, face, weights / weights.sum(1, keepdim=True).clamp_min(1e-9))


def _weight_planes(corners: Tensor) -> Tensor:
    """Corners [F,3,2] in pixels => [F,3,3]: times (x, y, 1), a pixel's barycentric weights; thirds where degenerate."""
    a, b, c = corners.unbind(1)
    ab, ac = b - a, c - a
    area = ab[:, 0] * ac[:, 1] - ab[:, 1] * ac[:, 0]
    flat = area.abs() < 1e-9
    area = torch.where(flat, 1.0, area)[:, None]
    second = torch.stack([ac[:, 1], -ac[:, 0], ac[:, 0] * a[:, 1] - ac[:, 1] * a[:, 0]], 1) / area
    third = torch.stack([-ab[:, 1], ab[:, 0], ab[:, 1] * a[:, 0] - ab[:, 0] * a[:, 1]], 1) / area
    first = -second - third
    first[:, 2] += 1
    weights = torch.stack([first, second, third], 1)
    weights[flat] = torch.tensor([0.0, 0, 1 / 3], dtype=weights.dtype)
    return weights.float()


def padded(texels: Texels, colors: Tensor, texture_size: int) -> np.ndarray:
    """Colours [P,3] in [0,1] at their texels, continued over the gaps => texture uint8 [S,S,3]."""
    picture = np.zeros((texture_size, texture_size, 3), np.float32)
    covered = np.zeros((texture_size + 2, texture_size + 2), bool)
    inside = covered[1:-1, 1:-1]
    row, column = texels.row.numpy(), texels.column.numpy()
    picture[row, column], inside[row, column] = colors.clamp(0, 1).numpy(), True
    ways = [(y, x) for y in (-1, 0, 1) for x in (-1, 0, 1) if (y, x) != (0, 0)]
    for _ in range(DILATION):
        near = np.zeros_like(inside)
        for y, x in ways:
            near |= covered[1 + y:texture_size + 1 + y, 1 + x:texture_size + 1 + x]
        row, column = np.nonzero(near & ~inside)
        total, count = np.zeros((len(row), 3), np.float32), np.zeros((len(row), 1), np.float32)
        for y, x in ways:
            known = covered[row + 1 + y, column + 1 + x]
            total[known] += picture[row[known] + y, column[known] + x]
            count[known] += 1
        picture[row, column], inside[row, column] = total / count, True
    _fill(picture, inside)
    return (picture * 255 + 0.5).astype(np.uint8)


def _fill(picture: np.ndarray, covered: np.ndarray) -> None:
    """Gives the places of a picture [S,S,3] that are not covered [S,S] the mean of what lies around them, taken over
    squares of 2, 4, 8, ... as far as it takes."""
    row, column = np.nonzero(~covered)
    if not len(row) or len(row) == covered.size:
        return
    half = -(-len(picture) // 2)
    sums, count = np.zeros((half, half, 3), np.float32), np.zeros((half, half), np.float32)
    for y in (0, 1):
        for x in (0, 1):
            part, there = picture[y::2, x::2], covered[y::2, x::2]
            height, width = there.shape
            sums[:height, :width] += part * there[..., None]
            count[:height, :width] += there
    coarse = sums / np.maximum(count, 1)[..., None]
    _fill(coarse, count > 0)
    picture[row, column] = coarse[row // 2, column // 2]
