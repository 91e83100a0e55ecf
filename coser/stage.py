"""From how far away the app's viewer must look at an object to show all of it, however it is turned."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from pygltflib import GLTF2

ALPHA, BETA = 60.0, 75.0  # degrees, of Babylon.js' ArcRotateCamera: round the object, and down from above it
HALF_FOV = 0.4  # radians, of its camera, up and down; the viewer is at least as wide as it is high
SPLATS_SIDE = 1.4  # metres, the longest side that fits into the picture of the viewer of splats
MARGIN = 1.08  # room around the object, of its size


def box_of(glb: str | Path) -> np.ndarray:
    """The sides [3] of the box around a GLB's vertices, along x, y and z, in metres; nodes must not move them."""
    file = GLTF2().load_binary(str(glb))
    positions = [file.accessors[part.attributes.POSITION] for mesh in file.meshes for part in mesh.primitives]
    return np.max([p.max for p in positions], 0) - np.min([p.min for p in positions], 0)


def viewing_distance(sides: np.ndarray) -> float:
    """How far from the middle of a box of these sides [3] the camera must be to see what turns inside it.

    Babylon's own distance is in proportion to the box's diagonal, and cut the tops of ladders and lanterns off.
    """
    slope, down = np.tan(HALF_FOV) / MARGIN, np.radians(90 - BETA)
    turn, height = np.meshgrid(np.linspace(0, 2 * np.pi, 360, endpoint=False), [-sides[1] / 2, sides[1] / 2])
    reach = np.hypot(sides[0], sides[2]) / 2  # of the rims that the corners draw when it is turned
    sideways, towards = reach * np.sin(turn), reach * np.cos(turn) * np.cos(down) + height * np.sin(down)
    upwards = height * np.cos(down) - reach * np.cos(turn) * np.sin(down)
    return float((np.maximum(abs(sideways), abs(upwards)) / slope + towards).max())
