"""From how far away the app's viewer must look at an object to show all of it, however it is turned."""

from __future__ import annotations

import numpy as np

ALPHA, BETA = 60.0, 75.0  # degrees, of Babylon.js' ArcRotateCamera: round the object, and down from above it
HALF_FOV = 0.4  # radians, of its camera, up and down; the viewer is as wide as it is high, or wider
SPLATS_SIDE = 1.4  # metres, the longest side that fits into the picture of the viewer of splats
MARGIN = 1.08  # room around the object, of its size; on a telephone the viewer is a twentieth narrower than high
TURNS = 90  # that are tried


def viewing_distance(vertices: np.ndarray) -> float:
    """How far from the middle of their box the camera must be to see all of the vertices [V,3], turned about y or not.

    The distance that Babylon chooses by itself cut the tops of ladders off.
    """
    x, height, z = (vertices - (vertices.min(0) + vertices.max(0)) / 2).T
    reach, slope, down = np.hypot(x, z), np.tan(HALF_FOV) / MARGIN, np.radians(90 - BETA)
    furthest = 0.0
    for turn in np.linspace(0, np.pi, TURNS):  # the other half of a circle mirrors this one
        out, aside = reach * np.cos(turn), reach * np.sin(turn)
        towards, upwards = out * np.cos(down) + height * np.sin(down), height * np.cos(down) - out * np.sin(down)
        furthest = max(furthest, float((np.maximum(aside, abs(upwards)) / slope + towards).max()))
    return furthest
