"""From a grid of signed distances to triangles that close."""

from __future__ import annotations

import numpy as np
from skimage.measure import marching_cubes
from torch import Tensor


def closed_surface(distances: np.ndarray, axes: list[Tensor], voxel: float) -> tuple[np.ndarray, np.ndarray, float]:
    """Signed distances [X,Y,Z] (world units, negative inside) on a grid => vertices [V,3] float32, faces [F,3] int64
    (right hand outward), the voxel's side.

    axes: the cells' places along x, y and z, `voxel` apart. What reaches the grid's edge is closed there. Raises
    ValueError when nothing is inside.
    """
    grid = np.pad(distances, 1, constant_values=max(float(distances.max()), voxel))
    # a corner exactly on the surface makes slivers
    np.copyto(grid, 1e-4 * voxel, where=np.abs(grid) < 1e-4 * voxel)
    if not (grid < 0).any():
        raise ValueError("views show nothing that at least two of them agree on: no surface was found")
    vertices, faces, _, _ = marching_cubes(grid, 0.0)
    origin = np.array([float(axis[0]) for axis in axes], np.float32)
    return ((vertices - 1) * voxel + origin).astype(np.float32), faces.astype(np.int64), voxel
