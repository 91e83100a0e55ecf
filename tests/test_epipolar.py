"""TSED: lines that must meet their points, neighbours that do or do not show the same, and what is missing."""

import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from solids import cube, patchwork

from coser.agreement import shuffled_ring
from coser.cameras import Cameras
from coser.epipolar import epipolar_distances, fundamental_matrices, tsed
from coser.rasterizer import render


def test_projections_of_one_point_lie_on_each_others_epipolar_lines():
    first = Cameras.look_at_origin([0, 10, 200], [20, -5, 60])
    second = Cameras.look_at_origin([30, 75, 20], [20, 40, 0])
    points = torch.rand(40, 3, generator=torch.Generator().manual_seed(0)) - 0.5
    pixels = [(c.project(points)[0] * 256).double().numpy() for c in (first, second)]
    for here, there, matrix in zip(*pixels, fundamental_matrices(first, second, 256).numpy()):
        assert epipolar_distances(here, there, matrix).max() < 1e-3
        lines = np.concatenate([here, np.ones((40, 1))], 1) @ matrix.T
        across = lines[:, :2] / np.linalg.norm(lines[:, :2], axis=1, keepdims=True)
        apart = epipolar_distances(here, there + 3 * across, matrix)
        back = epipolar_distances(there + 3 * across, here, matrix.T)
        np.testing.assert_allclose(apart, back)
        assert (apart > 1.5).all()  # the mean of 3 there and of something here
    with pytest.raises(ValueError, match="perspective"):
        fundamental_matrices(Cameras.orbit(2, orthographic=True), Cameras.orbit(2), 256)


def test_tsed_counts_consistent_neighbours():
    pytest.importorskip("cv2")
    around = torch.arange(8) * 2 * torch.pi / 8  # a small loop, for SIFT knows few points again from 30 degrees away
    cameras = Cameras.look_at_origin(30 + 12 * around.cos(), 25 + 12 * around.sin())
    views = render(*patchwork(8), cameras, 160)
    true, wrong = tsed(views, cameras), tsed(shuffled_ring(views), cameras)
    assert true.consistent[3] > 0.9 and true.matches > 20 and true.too_few == 0
    assert (true.consistent.diff() >= 0).all() and len(true.consistent) == len(true.thresholds)
    assert wrong.consistent[3] < 0.4
    assert not tsed(views, cameras, min_matches=10**6).consistent.any()
    blank = tsed(replace(views, views=0 * views.views, masks=0 * views.masks), cameras)
    assert (blank.matches, blank.too_few) == (0, 1) and not blank.consistent.any()


def test_tsed_without_opencv_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "cv2", None)
    ring = Cameras.orbit(8)
    with pytest.raises(ImportError, match="opencv-python-headless"):
        tsed(render(*cube(0.5), ring, 64), ring)
