"""Where meshes stand in a scene: at rest on one another by their heights, or beside one another by their boxes.

World axes as in `coser.cameras`: y up, the front along +z, and so x to the right of who sees the front. The floor is
y = 0. Vertices are [V,3] float64, faces [F,3] int64; a box is two corners, [2,3].
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from coser.rasterizer import covered_pixels

COARSE, FINE = 48, 256  # columns a side: to look for a place on the lower mesh, and to drop the upper one exactly there
# Of the upper mesh's longest side: what lies no higher above its lowest point is what it stands on, and columns with no
# larger gap bear it. The same, so that a plane bears all of a ball's base.
BASE = 0.03
BORNE = 0.7  # share of the base that must be borne
LOWEST = 0.25  # of the lower mesh's height: what would come to rest further down has fallen into it
SHOWN = 0.5  # of the upper mesh's height that nothing of the lower one hides from straight in front
TRIES = 12  # places looked at closely


def box_of(vertices: Tensor) -> Tensor:
    """The corners [2,3] of the box around vertices."""
    return torch.stack([vertices.amin(0), vertices.amax(0)])


def on_floor(vertices: Tensor, longest: float) -> Tensor:
    """Vertices scaled so that the box's longest side is `longest`, its middle over the origin, its bottom at y = 0."""
    low, high = box_of(vertices)
    middle = (low + high) / 2
    middle[1] = low[1]
    return (vertices - middle) * (longest / float((high - low).max()))


def height_fields(vertices: Tensor, faces: Tensor, corner: tuple[float, float], cell: float,
                  size: int) -> tuple[Tensor, Tensor]:
    """The lowest and the highest y of a mesh in each of size x size columns, [size,size]: row by z, column by x.

    corner: x and z where the columns begin. cell: their width. A column is asked at its middle; where the mesh is
    not, the lowest is inf and the highest -inf. Upright faces have no columns.
    """
    flat = ((vertices[:, [0, 2]] - torch.tensor(corner).to(vertices)) / cell)[faces]
    triangle, row, column = covered_pixels(flat, size)
    (a, b, c), heights = flat.unbind(1), vertices[:, 1][faces]
    ab, ac = b - a, c - a
    det = ab[:, 0] * ac[:, 1] - ab[:, 1] * ac[:, 0]
    det = torch.where(det.abs() < 1e-12, torch.inf, det)
    up, across = heights[:, 1] - heights[:, 0], heights[:, 2] - heights[:, 0]
    by_x, by_z = (up * ac[:, 1] - across * ab[:, 1]) / det, (across * ab[:, 0] - up * ac[:, 0]) / det
    y = heights[triangle, 0] + by_x[triangle] * (column + 0.5 - a[triangle, 0])
    y = y + by_z[triangle] * (row + 0.5 - a[triangle, 1])
    y = torch.minimum(torch.maximum(y, heights.amin(1)[triangle]), heights.amax(1)[triangle])  # slivers
    at = row * size + column
    lowest = y.new_full((size * size,), torch.inf).scatter_reduce(0, at, y, "amin")
    highest = y.new_full((size * size,), -torch.inf).scatter_reduce(0, at, y, "amax")
    return lowest.view(size, size), highest.view(size, size)


def drop(lower: tuple[Tensor, Tensor], upper: tuple[Tensor, Tensor]) -> tuple[float, float]:
    """Lets the upper mesh (vertices, faces) sink along y until it touches the lower one.

    Returns the y to add to its vertices, and the share of its base that then touches. (-inf, 0) where no column holds
    both. Heights are exact where both meshes are flat, else to the slope times half a column of FINE.
    """
    low, high = box_of(upper[0])
    cell = float((high - low)[[0, 2]].max()) / (FINE - 2)
    corner = float(low[0]) - cell, float(low[2]) - cell
    bottom, _ = height_fields(*upper, corner, cell, FINE)
    _, top = height_fields(*lower, corner, cell, FINE)
    rise = float((top - bottom).max())
    if rise == -torch.inf:
        return rise, 0.0
    return rise, _borne(bottom[None] + rise - top[None], _base(bottom, low, high), low, high)[0].item()


def _base(bottom: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Which columns of the lowest heights [S,S] a mesh stands on."""
    return bottom <= bottom.min() + BASE * (high - low).max()


def _borne(gap: Tensor, base: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Gaps [P,S,S] above what lies below => the share of the base [S,S] that touches it, [P]."""
    return (gap[:, base] <= BASE * (high - low).max()).double().mean(1)


def resting_places(lower: tuple[Tensor, Tensor], upper: tuple[Tensor, Tensor],
                   draw: np.random.Generator) -> Iterator[Tensor]:
    """Ways [3] to move the upper mesh so that it lies at rest on the lower one, its base borne.

    Both stand on the floor. The middle of the base is over a column that bears it, and the mesh has not fallen into the
    lower one, nor is it hidden from the front. Looked for on a coarse grid, among the quarter of all places that would
    do which is nearest to the middle; yielded once the fine one agrees.
    """
    (low, high), (under_low, under_high) = box_of(upper[0]), box_of(lower[0])
    cell = float((under_high - under_low)[[0, 2]].max()) / COARSE
    count = int(np.ceil(float((high - low)[[0, 2]].max()) / cell)) + 1
    bottom, _ = height_fields(*upper, (float(low[0]), float(low[2])), cell, count)
    if not bool(bottom.isfinite().any()):
        return
    _, top = height_fields(*lower, (float(under_low[0]), float(under_low[2])), cell, COARSE)
    top = F.pad(top, (count // 2,) * 4, value=-torch.inf)
    side = top.shape[0] - count + 1
    base = _base(bottom, low, high)
    rows, columns = base.nonzero(as_tuple=True)
    middle = rows.double().mean().round().long(), columns.double().mean().round().long()
    parts = []
    for windows in top.unfold(0, count, 1).unfold(1, count, 1):  # [side,count,count]; all at once are gigabytes
        rise = (windows - bottom).amax((1, 2))
        borne = _borne(rise[:, None, None] + bottom - windows, base, low, high)
        parts.append((rise, borne, windows[:, middle[0], middle[1]]))
    rise, borne, beneath = map(torch.cat, zip(*parts))
    under = beneath >= rise - BASE * (high - low).max() - cell
    fits = (borne >= BORNE) & under & (rise >= LOWEST * under_high[1])
    places = fits.nonzero()[:, 0]
    if not len(places):
        return
    where = torch.stack([places // side, places % side], 1).double()
    center = ((under_high - under_low)[[2, 0]] / cell - (high - low)[[2, 0]] / cell) / 2 + count // 2
    nearest = (where - center).norm(dim=1).argsort(stable=True)  # a seat rather than the arms beside it
    chosen = nearest[:max(1, len(nearest) // 4)].numpy()
    for place in draw.permutation(chosen)[:TRIES]:
        row, column = where[int(place)].tolist()
        move = torch.tensor([float(under_low[0] - low[0]) + (column - count // 2) * cell, 0.0,
                             float(under_low[2] - low[2]) + (row - count // 2) * cell], dtype=torch.float64)
        height, share = drop(lower, (upper[0] + move, upper[1]))
        hidden = top[int(row) + count:, int(column):int(column) + count]
        shown = not hidden.numel() or float(hidden.max()) <= height + (1 - SHOWN) * float(high[1] - low[1])
        if share >= BORNE and height >= LOWEST * float(under_high[1]) and shown:
            move[1] = height
            yield move


def beside(box: Tensor, other: Tensor, side: tuple[int, int], gap: float, shift: float = 0.0) -> Tensor:
    """How to move what `box` holds [3] so that it stands beside the box `other`, `gap` apart.

    side: axis (0 or 2) and sign; (0, -1) is to the left of it, seen from the front, (2, 1) in front of it. Along the
    other of the two axes the middles end `shift` apart. Boxes that are apart hold meshes that do not meet.
    """
    axis, sign = side
    across = 2 - axis
    move = torch.zeros(3, dtype=torch.float64)
    near, far = (0, 1) if sign > 0 else (1, 0)
    move[axis] = other[far, axis] + sign * gap - box[near, axis]
    move[across] = other[:, across].mean() + shift - box[:, across].mean()
    return move
