"""An object that no mirror and no turn maps to itself: arms of their own colour and length along +x, +y and +z."""

from dataclasses import replace

import numpy as np
from solids import cube

from coser.reconstruction.mesh import Mesh
from coser.reconstruction.normals import with_normals

LENGTHS = 0.9, 0.6, 0.4  # along +x, +y, +z
COLORS = np.array([[220, 40, 30], [40, 200, 60], [40, 60, 210]], np.uint8)  # of these three arms
CELL = 8  # texels a side of a face's place in the texture


def arms(coloring: str = "texture") -> Mesh:
    """The three arms as one closed mesh: "texture", "vertices" or "none"."""
    vertices, faces, _ = cube(1.0)
    places, index = np.unique(vertices.numpy(), axis=0, return_inverse=True)
    faces = index.ravel()[faces.numpy()]
    boxes = []
    for axis, length in enumerate(LENGTHS):
        low, high = np.full(3, -0.08), np.full(3, 0.08)
        low[axis], high[axis] = 0.15, length
        boxes.append(places * (high - low) / 2 + (high + low) / 2)
    arm = np.repeat([0, 1, 2], len(places))
    mesh = Mesh(np.concatenate(boxes).astype(np.float32),
                np.concatenate([faces + k * len(places) for k in range(3)]),
                COLORS[arm].astype(np.float32) / 255 if coloring == "vertices" else None)
    return with_normals(_textured(mesh, arm) if coloring == "texture" else mesh)


def _textured(mesh: Mesh, arm: np.ndarray) -> Mesh:
    """Every face has a cell of the texture to itself, filled with its arm's colour."""
    side = int(np.ceil(np.sqrt(len(mesh.faces))))
    row, column = np.divmod(np.arange(len(mesh.faces)), side)
    corners = np.array([[1.5, 1.5], [CELL - 1.5, 1.5], [1.5, CELL - 1.5]])
    uvs = (np.stack([column, row], -1)[:, None] * CELL + corners) / (side * CELL)
    cells = np.full((side * side, 3), 255, np.uint8)
    cells[:len(mesh.faces)] = COLORS[arm[mesh.faces[:, 0]]]
    texture = cells.reshape(side, side, 3).repeat(CELL, 0).repeat(CELL, 1)
    return replace(mesh, uvs=uvs.astype(np.float32), texture=texture)


def expect_arms(points: np.ndarray, colors: np.ndarray, axes=((1, 0, 0), (0, 1, 0), (0, 0, 1)), unit: float = 1.0):
    """Fails unless points [P,3] of colours [P,3], 0..255, lie where the arms are in a frame in which the mesh's +x, +y
    and +z are `axes`, with `unit` a metre."""
    nearest = np.abs(colors[:, None].astype(int) - COLORS).sum(-1)
    assert nearest.min(1).max() <= 6
    for k, (axis, length) in enumerate(zip(np.array(axes, float), LENGTHS)):
        own = points[nearest.argmin(1) == k]
        along = own @ axis / unit
        assert abs(along.max() - length) < 0.03 and abs(along.min() - 0.15) < 0.03
        assert np.abs(own / unit - along[:, None] * axis).max() <= 0.08 + 1e-4
