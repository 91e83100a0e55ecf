"""Baselines get their cameras right, so that ours is compared with what they can do."""

import numpy as np
import pytest
from solids import cube

from coser.baselines import poisson, tsdf_fusion
from coser.cameras import Cameras
from coser.evaluate_surface import METHODS
from coser.rasterizer import render
from coser.surface_metrics import look_at_truth, surface_figures

RING = Cameras.orbit(8)


@pytest.fixture(scope="module")
def views():
    return render(*cube(0.5), RING, 128, shade=False)


@pytest.fixture(scope="module")
def truth():
    return look_at_truth(*cube(0.5)[:2], 3000)


def colors_of_sides(mesh) -> np.ndarray:
    """Mean colour of what lies in the middle of the sides +x, -x, +y, +z and -z of a cube, [5,3]."""
    sides = [(0, 1), (0, -1), (1, 1), (2, 1), (2, -1)]
    near = [(mesh.vertices[:, axis] * sign > 0.48) & (np.delete(np.abs(mesh.vertices), axis, 1).max(1) < 0.35)
            for axis, sign in sides]
    return np.stack([mesh.vertex_colors[n].mean(0) for n in near])


SIDES = cube()[2].numpy()[[0, 2, 4, 8, 10], 0]


@pytest.mark.parametrize("make", [lambda v, c: tsdf_fusion(v, c, 0.03), lambda v, c: poisson(v, c, depth=6)],
                         ids=["tsdf", "poisson"])
def test_open3d_finds_the_seen_sides_in_their_colours(make, views, truth):
    pytest.importorskip("open3d")
    mesh = make(views, RING)
    figures = surface_figures(mesh, truth, RING)
    assert figures["accuracy"] < 0.01 and figures["completeness_seen"] < 0.02
    assert np.abs(colors_of_sides(mesh) - SIDES).max() < 0.1


def test_visual_hull_stands_on_the_floor_and_covers_the_truth(views, truth):
    mesh = METHODS["hull"][1](views, RING)
    figures = surface_figures(mesh, truth, RING)
    assert mesh.is_watertight and figures["completeness"] < 0.05 and figures["volume_iou"] > 0.8
