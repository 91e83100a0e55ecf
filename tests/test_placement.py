"""Placement: where assets stand and how large they are, and that nothing else about them changes."""

from dataclasses import replace

import numpy as np
import pytest

from coser.reconstruction.mesh import Mesh
from coser.reconstruction.normals import with_normals
from coser.reconstruction.placement import place
from tests.test_mesh import BALL

LONG = replace(with_normals(BALL), vertices=(BALL.vertices * (0.5, 2, 1) + (3, -4, 5)).astype(np.float32))


def test_feet_stand_on_the_floor_in_the_middle():
    low, high = (f(place(LONG, "feet", 1.8).vertices, 0) for f in (np.min, np.max))
    assert low[1] == 0 and high[1] == pytest.approx(1.8)
    assert np.allclose((low + high)[[0, 2]], 0, atol=1e-5)


def test_a_centred_mesh_has_the_middle_of_its_box_at_nothing():
    placed = place(LONG, "center", 0.3).vertices
    assert np.allclose(placed.min(0) + placed.max(0), 0, atol=1e-6)
    assert np.ptp(placed, axis=0).max() == pytest.approx(0.3)


def test_proportions_faces_and_normals_stay():
    placed = place(LONG, "feet", 10.0)
    assert np.allclose(np.ptp(placed.vertices, axis=0) / 10, np.ptp(LONG.vertices, axis=0) / 2.4, atol=1e-5)
    assert placed.faces is LONG.faces and placed.normals is LONG.normals
    assert placed.volume == pytest.approx(LONG.volume * (10 / 2.4)**3, rel=1e-3) and placed.is_watertight


@pytest.mark.parametrize("wrong, match", [
    (dict(origin="top"), "origin must be one of feet, center, got 'top'"), (dict(longest_side=0.0), "longest_side"),
    (dict(longest_side=float("nan")), "longest_side"),
    (dict(mesh=Mesh(np.ones((3, 3), np.float32), np.array([[0, 1, 2]]))), "extent")])
def test_wrong_arguments_are_refused_by_name(wrong, match):
    with pytest.raises(ValueError, match=match):
        place(**{"mesh": BALL, **wrong})
