"""The underside, which no view from above can see: cut where the seen surface ends, not where sight lines meet."""

from __future__ import annotations

import numpy as np
from scipy.ndimage import distance_transform_edt, minimum_filter, uniform_filter


def cut_floor(distances: np.ndarray, told: np.ndarray, heights: np.ndarray, lowest: float,
              truncation: float) -> np.ndarray:
    """Signed distances [X,Y,Z] (y up) => the same without the unseen cone under the object.

    told [X,Y,Z]: whether any view knows the cell; heights [Y]: of the cells, rising; lowest: of all heights seen.
    Nothing is left below `lowest`. Above it, cells that no view knows are cut below the local floor: the height at
    which the nearest seen wall ends in open air, so that a table keeps no cone under its top although it has legs.
    """
    floor = np.full(distances.shape[::2], lowest, np.float32)
    ends, where = _wall_ends(distances, told, heights)
    if where.any():
        nearest = distance_transform_edt(~where, return_distances=False, return_indices=True)
        floor = np.maximum(floor, ends[tuple(nearest)])
    above = heights[None, :, None]
    cut = np.where(told, distances, np.maximum(distances, floor[:, None] - above))
    return np.clip(np.maximum(cut, lowest - above), -truncation, truncation).astype(np.float32)


def _wall_ends(distances: np.ndarray, told: np.ndarray, heights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Heights [X,Z] at which the columns' lowest seen surface ends, and where one ends in known air."""
    seen = told & (distances < 0)
    first = seen.argmax(1)  # of each column, from below
    below = np.maximum(first - 1, 0)
    x, z = np.indices(first.shape)
    inside, outside = distances[x, first, z], distances[x, below, z]
    where = seen.any(1) & (first > 0) & told[x, below, z] & (outside > 0)
    where &= uniform_filter(where.astype(np.float32), 5, mode="constant") * 25 > 4.5  # walls are lines, not dots
    share = np.where(where, inside / np.where(where, inside - outside, 1), 0)
    ends = heights[first] - share * (heights[first] - heights[below])
    lowest_around = minimum_filter(np.where(where, ends, np.inf), size=3)  # a ragged edge counts with its lowest part
    return np.where(where, lowest_around, 0).astype(np.float32), where
