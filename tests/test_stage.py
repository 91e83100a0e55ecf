"""What the app's viewer is told: from so far away an object is seen whole, however it is turned, and no smaller."""

from dataclasses import replace

import numpy as np
import pytest
import trimesh
from solids import cube, sphere

from coser.reconstruction.glb import glb_vertices, save_glb
from coser.reconstruction.mesh import Mesh
from coser.stage import BETA, HALF_FOV, MARGIN, viewing_distance

BOX = np.array(np.meshgrid(*[(-0.5, 0.5)] * 3)).reshape(3, -1).T
BALL = sphere(0.5)[0].numpy().astype(float)
SIDES = [(1, 1, 1), (0.3, 1, 0.05), (0.05, 1, 0.3), (1, 0.02, 1), (0.4, 0.4, 1), (20, 5, 3)]


def most_of_the_picture(vertices, distance):
    """How far from the middle they come at most, turned about y, 1 being the picture's rim."""
    vertices = vertices - (vertices.min(0) + vertices.max(0)) / 2
    down, most = np.radians(90 - BETA), 0.0
    for turn in np.radians(np.arange(0, 360, 1)):
        to_camera = np.array([np.cos(turn) * np.cos(down), np.sin(down), np.sin(turn) * np.cos(down)])
        right = np.array([-np.sin(turn), 0, np.cos(turn)])
        depth = distance - vertices @ to_camera
        assert (depth > 0).all()
        off = abs(vertices @ np.stack([right, np.cross(to_camera, right)], 1)) / depth[:, None]
        most = max(most, float(off.max()) / np.tan(HALF_FOV))
    return most


@pytest.mark.parametrize("sides", SIDES)
@pytest.mark.parametrize("solid", [BOX, BALL], ids=["box", "ball"])
def test_an_object_fills_the_picture_but_never_leaves_it(solid, sides):
    vertices = solid * np.array(sides) + (5.0, -3.0, 2.0)  # wherever it stands
    distance = viewing_distance(vertices)
    assert most_of_the_picture(vertices, distance) == pytest.approx(1 / MARGIN, abs=2e-3)
    assert viewing_distance(vertices * 7) == pytest.approx(7 * distance)


def test_round_objects_are_seen_from_nearer_than_boxes_of_their_size():
    assert viewing_distance(BALL) < 0.8 * viewing_distance(BOX)


@pytest.mark.parametrize("coloring", ["none", "vertices", "texture"])
def test_a_files_vertices_are_those_that_others_read(tmp_path, coloring):
    vertices, faces, _ = cube(0.3)
    mesh = Mesh(vertices.numpy() + np.float32(0.1), faces.numpy())
    if coloring == "vertices":
        mesh = replace(mesh, vertex_colors=np.full(mesh.vertices.shape, 0.5, np.float32))
    elif coloring == "texture":
        uvs = np.random.default_rng(0).random((len(mesh.faces), 3, 2), np.float32)
        mesh = replace(mesh, uvs=uvs, texture=np.zeros((8, 8, 3), np.uint8))
    path = save_glb(mesh, tmp_path / "box.glb")
    theirs = trimesh.load(path, force="mesh", process=False).vertices
    assert np.array_equal(glb_vertices(path), theirs.astype(np.float32)) and len(theirs) >= 8
