"""Charts into a square, as in the game of falling blocks: each lands where least is wasted below it.

The packer of Lévy et al., "Least Squares Conformal Maps" (2002), section 4: charts come from the tallest to the
lowest, and all that is known of the charts that lie already is how high they reach in each column.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

COLUMNS = 1024  # that are told apart, at most
FIRST_SHARE = 0.75  # of the square that the charts take, tried first
TRIES = 6


@dataclass(frozen=True)
class Profiles:
    """How far C charts reach in each column, chart after chart: bottom, top [K]; a chart's columns begin at first [C]
    of these, are width [C] many and lie `left` [C] columns right of its zero."""

    left: np.ndarray
    first: np.ndarray
    width: np.ndarray
    bottom: np.ndarray
    top: np.ndarray


def pack(edges: np.ndarray, owner: np.ndarray, area: float, texture_size: int, gap: int) -> tuple[float, np.ndarray]:
    """The edges [E,2,2] around C charts in the plane, chart after chart [E], and the area of all charts together => one
    scale, in texels a unit, and where the charts' zeros go, in texels [C,2], so that charts of that scale lie within
    the square and `gap` texels apart.

    Where charts are so many that gaps would take most of the square, the gaps shrink, too.
    """
    columns = min(texture_size, COLUMNS)
    cell = texture_size / columns
    margin, share = gap / cell / 2, FIRST_SHARE
    while True:
        for _ in range(TRIES):
            scale = np.sqrt(share * columns**2 / area)
            profiles = profiles_of(edges * scale, owner, margin)
            if profiles.width.max() <= columns:
                places, height = _drop(profiles, columns)
                if height <= columns:
                    return scale * cell, places * cell
                # gaps do not shrink with the charts, so these shrink a little more than the height asks for
                share *= min(columns / height, 0.98)
            else:
                share *= min((columns / profiles.width.max())**2, 0.97)
        margin /= 2


def _drop(profiles: Profiles, columns: int) -> tuple[np.ndarray, float]:
    """Charts, none wider than the square => where their zeros go, in cells [C,2], and how high they pile up."""
    lowest, highest = (f.reduceat(t, profiles.first) for f, t in ((np.minimum, profiles.bottom),
                                                                   (np.maximum, profiles.top)))
    horizon = np.zeros(columns, np.float32)
    places = np.empty((len(profiles.first), 2))
    for chart in np.argsort(lowest - highest, kind="stable"):
        width, first = profiles.width[chart], profiles.first[chart]
        bottom, top = profiles.bottom[first:first + width], profiles.top[first:first + width]
        base = (sliding_window_view(horizon, width) - bottom).max(1)  # how low it can lie, wherever it begins
        filled = np.concatenate([[0], horizon.cumsum(dtype=np.float64)])
        x = int((8 * base * width - (filled[width:] - filled[:-width])).argmin())  # low, and little lost below
        y = float(np.ceil(base[x]))
        horizon[x:x + width] = y + top
        places[chart] = x - profiles.left[chart], y
    return places, float(horizon.max())


def profiles_of(edges: np.ndarray, owner: np.ndarray, margin: float) -> Profiles:
    """Edges [E,2,2] in cells, chart after chart [E] => the charts' Profiles, widened by `margin` cells."""
    swap = edges[:, 0, 0] > edges[:, 1, 0]
    start, end = np.where(swap[:, None], edges[:, 1], edges[:, 0]), np.where(swap[:, None], edges[:, 0], edges[:, 1])
    starts = np.flatnonzero(np.concatenate([[True], np.diff(owner) > 0]))
    low, high = (np.floor(x).astype(np.int64) for x in (start[:, 0] - margin, end[:, 0] + margin))
    left = np.minimum.reduceat(low, starts)
    width = np.maximum.reduceat(high, starts) - left + 1
    first = np.cumsum(width) - width
    count = high - low + 1
    edge = np.repeat(np.arange(len(edges)), count)
    column = low[edge] + np.arange(len(edge)) - np.repeat(np.cumsum(count) - count, count)
    # the part of the edge that lies within `margin` of the column
    (x0, y0), (x1, y1) = start[edge].T, end[edge].T
    steep = x1 - x0 < 1e-9
    slope = np.where(steep, 0, (y1 - y0) / np.where(steep, 1, x1 - x0))
    near = y0 + (np.clip(column - margin, x0, x1) - x0) * slope
    far = np.where(steep, y1, y0 + (np.clip(column + 1 + margin, x0, x1) - x0) * slope)
    place = (first - left)[owner[edge]] + column
    bottom, top = np.full(width.sum(), np.inf, np.float32), np.full(width.sum(), -np.inf, np.float32)
    np.minimum.at(bottom, place, (np.minimum(near, far) - margin).astype(np.float32))
    np.maximum.at(top, place, (np.maximum(near, far) + margin).astype(np.float32))
    return Profiles(left, first, width, bottom, top)
