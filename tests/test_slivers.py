"""Slivers: triangles without an area go, the surface stays closed and where it was."""

import numpy as np
import pytest
from solids import sphere, table

from coser.cameras import Cameras
from coser.rasterizer import render
from coser.reconstruction import finish, find_surface
from coser.reconstruction.mesh import Mesh
from coser.reconstruction.slivers import THIN, without_slivers
from tests.test_mesh import BALL, BOX


def heights(mesh: Mesh) -> np.ndarray:
    """The triangles' lowest heights [F], in shares of the mesh's longest side."""
    corners = mesh.vertices[mesh.faces].astype(np.float64)
    edges = np.roll(corners, -1, 1) - corners
    double = np.linalg.norm(np.cross(edges[:, 0], edges[:, 1]), axis=1)
    return double / np.linalg.norm(edges, axis=2).max(1) / np.ptp(mesh.vertices, axis=0).max()


def split_edge(mesh: Mesh, share: float, aside: float = 0.0) -> Mesh:
    """The first edge of the first face cut at a share of its length, moved aside towards that face's third corner."""
    a, b, c = mesh.faces[0]
    other = next(f for f in range(1, len(mesh.faces)) if a in mesh.faces[f] and b in mesh.faces[f])
    d = next(v for v in mesh.faces[other] if v not in (a, b))
    place = mesh.vertices[a] + share * (mesh.vertices[b] - mesh.vertices[a])
    place = place + aside * (mesh.vertices[c] - mesh.vertices[a])
    m, faces = len(mesh.vertices), np.delete(mesh.faces, [0, other], 0)
    added = [[a, m, c], [m, b, c], [b, m, d], [m, a, d]]
    return Mesh(np.concatenate([mesh.vertices, [place]]).astype(np.float32), np.concatenate([faces, added]))


def test_an_edge_without_length_is_collapsed():
    mesh = split_edge(BALL, 1e-6)
    assert mesh.is_watertight and heights(mesh).min() < THIN
    mended = without_slivers(mesh)
    assert mended.is_watertight and heights(mended).min() > THIN
    assert len(mended.faces) == len(BALL.faces) and len(mended.vertices) == len(BALL.vertices)
    assert mended.volume == pytest.approx(BALL.volume, rel=1e-5)


def test_a_flat_triangle_with_long_edges_is_turned_away():
    flat = Mesh(BOX.vertices, BOX.faces)
    a, b, c = flat.faces[0]
    middle = ((BOX.vertices[a] + BOX.vertices[b]) / 2)[None]  # on the edge a - b, but only the face's own side knows
    flat = Mesh(np.concatenate([flat.vertices, middle]),
                np.concatenate([flat.faces[1:], [[a, b, 8], [b, c, 8], [c, a, 8]]]))
    assert flat.is_watertight and heights(flat).min() < THIN
    mended = without_slivers(flat)
    assert mended.is_watertight and heights(mended).min() > 0.1 and mended.volume == pytest.approx(1, abs=1e-5)


def test_meshes_without_slivers_are_left_alone():
    assert without_slivers(BALL) is BALL and without_slivers(BOX) is BOX


def test_the_last_triangles_of_a_flat_tetrahedron_stay_closed():
    flat = Mesh(np.array([[0, 0, 0], [1, 0, 0], [0, 1, 0], [.3, .3, 1e-9]], np.float32),
                np.array([[0, 2, 1], [0, 1, 3], [1, 2, 3], [2, 0, 3]]))
    assert without_slivers(flat).is_watertight


@pytest.mark.parametrize("budget", [500, 3000, 10**5])
def test_finished_meshes_have_no_slivers_no_doubles_and_one_winding(budget):
    ring = Cameras.orbit(6)
    for solid in (sphere(0.7, 16), table()):
        mesh = finish(find_surface(render(*solid, ring, 64), ring, 40), max_faces=budget, texture_size=None)
        assert mesh.is_watertight and mesh.volume > 0  # closed, and every edge run through once each way
        assert heights(mesh).min() > THIN
        assert len(np.unique(np.sort(mesh.faces, 1), axis=0)) == len(mesh.faces) <= budget
        assert len(np.unique(mesh.vertices, axis=0)) == len(mesh.vertices)
