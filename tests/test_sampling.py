"""Points spread over a surface: evenly, on both sides of thin parts, the same ones every time."""

import numpy as np
import pytest
from scipy.spatial import cKDTree
from solids import cube
from test_mesh import BALL, BOX, mesh_of

from coser.reconstruction.mesh import Mesh
from coser.reconstruction.sampling import colors_at, face_areas, spread_points, vertex_colors_of


def places(mesh: Mesh, count: int) -> np.ndarray:
    faces, weights = spread_points(mesh, count)
    return np.einsum("pk,pkc->pc", weights, mesh.vertices[mesh.faces[faces]])


def test_as_many_as_asked_about_and_none_near_another():
    points = places(BALL, 4000)
    assert 3600 < len(points) < 4600
    gaps = cKDTree(points).query(points, 2)[0][:, 1] / np.sqrt(face_areas(BALL).sum() / 4000)
    assert gaps.min() >= 0.69 and gaps.max() < 1.5
    assert np.abs(np.linalg.norm(points, axis=1) - 0.6).max() < 0.01


def test_no_place_of_the_surface_is_left_out():
    probes = places(BALL, 20_000)
    assert cKDTree(places(BALL, 4000)).query(probes)[0].max() < 1.2 * np.sqrt(face_areas(BALL).sum() / 4000)


def test_large_and_small_triangles_get_their_share():
    faces, _ = spread_points(BOX, 6000)
    assert np.allclose(np.bincount(faces // 2), len(faces) / 6, rtol=0.03)


def test_thin_plates_are_covered_on_both_sides():
    plate = mesh_of(cube(0.5))
    plate = Mesh(plate.vertices * np.float32([1, 1, 0.001]), plate.faces)
    z = places(plate, 2000)[:, 2]
    assert (z > 0.0004).sum() == pytest.approx((z < -0.0004).sum(), rel=0.05)


def test_the_same_points_every_time():
    assert np.array_equal(places(BALL, 500), places(BALL, 500))


def test_a_vertex_takes_the_mean_of_its_corners_in_the_texture():
    texture = np.zeros((4, 4, 3), np.uint8)
    texture[:, :2], texture[:, 2:] = (200, 0, 0), (0, 100, 0)
    uvs = np.where(np.arange(12)[:, None, None] % 2 == 0, (0.125, 0.5), (0.875, 0.5)).repeat(3, 1).astype(np.float32)
    mesh = Mesh(BOX.vertices, BOX.faces, uvs=uvs, texture=texture)
    even = np.bincount(BOX.faces[::2].ravel(), minlength=8) / np.bincount(BOX.faces.ravel(), minlength=8)
    wanted = even[:, None] * (200, 0, 0) + (1 - even[:, None]) * (0, 100, 0)
    assert np.allclose(vertex_colors_of(mesh) * 255, wanted, atol=1e-3)


def test_a_texture_is_looked_up_between_its_texels():
    texture = np.zeros((2, 2, 3), np.uint8)
    texture[0, 0], texture[1, 1] = 200, 100
    uvs = np.float32([[[0.25, 0.25], [0.75, 0.25], [0.75, 0.75]]])
    mesh = Mesh(np.eye(3, dtype=np.float32), np.array([[0, 1, 2]]), uvs=uvs, texture=texture)
    weights = np.array([[1, 0, 0], [0, 1, 0], [0, 0, 1], [0.5, 0, 0.5]])
    assert np.allclose(colors_at(mesh, np.zeros(4, int), weights)[:, 0] * 255, [200, 0, 100, 75], atol=1e-3)


def test_wrong_counts_and_surfaces_without_area_are_refused():
    with pytest.raises(ValueError, match="count"):
        spread_points(BALL, 0)
    with pytest.raises(ValueError, match="area"):
        spread_points(Mesh(np.zeros((3, 3), np.float32), np.array([[0, 1, 2]])), 10)
