"""Where an asset stands and how large it is: what a game asks of it beside its looks."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from coser.reconstruction.mesh import Mesh

ORIGINS = ("feet", "center")


def place(mesh: Mesh, origin: str = "feet", longest_side: float = 1.0) -> Mesh:
    """The mesh moved and scaled evenly, nothing else about it changed.

    origin: "feet" puts the lowest point on y = 0 and the middle of the box over (0, 0, 0), "center" puts the middle of
    the box there. longest_side: of the box, metres. Raises ValueError for another origin and where the side, or the
    mesh's own, is not above 0.
    """
    if origin not in ORIGINS:
        raise ValueError(f"origin must be one of {', '.join(ORIGINS)}, got {origin!r}")
    if not 0 < longest_side < np.inf:
        raise ValueError(f"longest_side must be above 0 metres, got {longest_side}")
    used = mesh.vertices[mesh.faces.ravel()].astype(np.float64) if len(mesh.faces) else np.zeros((1, 3))
    low, high = used.min(0), used.max(0)
    extent = (high - low).max()
    if not extent > 0:
        raise ValueError("mesh must have an extent to be placed, got a point")
    stand = (low + high) / 2
    if origin == "feet":
        stand[1] = low[1]
    vertices = (mesh.vertices - stand) * (longest_side / extent)
    return replace(mesh, vertices=vertices.astype(np.float32))
