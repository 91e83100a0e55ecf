"""What the app's viewer is told: from so far away an object is seen whole, however it is turned, and no smaller."""

import numpy as np
import pytest
import trimesh
from solids import cube

from coser.reconstruction.glb import save_glb
from coser.reconstruction.mesh import Mesh
from coser.reconstruction.placement import place
from coser.stage import BETA, HALF_FOV, MARGIN, box_of, viewing_distance


def most_of_the_picture(sides, distance):
    """How far from the middle the box's corners come at most, turned about y, 1 being the picture's rim."""
    corners = np.array(np.meshgrid(*[(-0.5, 0.5)] * 3)).reshape(3, -1).T * sides
    down, most = np.radians(90 - BETA), 0.0
    for turn in np.radians(np.arange(0, 360, 3)):
        to_camera = np.array([np.cos(turn) * np.cos(down), np.sin(down), np.sin(turn) * np.cos(down)])
        right = np.array([-np.sin(turn), 0, np.cos(turn)])
        depth = distance - corners @ to_camera
        assert (depth > 0).all()
        off = abs(corners @ np.stack([right, np.cross(to_camera, right)], 1)) / depth[:, None]
        most = max(most, float(off.max()) / np.tan(HALF_FOV))
    return most


@pytest.mark.parametrize("sides", [(1, 1, 1), (0.3, 1, 0.05), (0.05, 1, 0.3), (1, 0.02, 1), (0.4, 0.4, 1), (20, 5, 3)])
def test_a_box_fills_the_picture_but_never_leaves_it(sides):
    most = most_of_the_picture(np.array(sides), viewing_distance(np.array(sides, float)))
    assert 0.97 / MARGIN < most < 1 / MARGIN + 1e-4
    assert viewing_distance(np.array(sides) * 7.0) == pytest.approx(7 * viewing_distance(np.array(sides, float)))


@pytest.mark.parametrize("origin, longest_side", [("feet", 1.0), ("center", 2.5)])
def test_the_box_of_a_file_is_its_meshs(tmp_path, origin, longest_side):
    vertices, faces, _ = cube(0.3)
    stretched = vertices.numpy() * np.array([1.0, 2.0, 0.5])
    mesh = place(Mesh(stretched.astype(np.float32), faces.numpy()), origin, longest_side)
    path = save_glb(mesh, tmp_path / "box.glb")
    expected = trimesh.load(path, force="mesh").extents
    assert box_of(path) == pytest.approx(expected, rel=1e-5)
    assert box_of(str(path)) == pytest.approx(np.array([0.5, 1, 0.25]) * longest_side, rel=1e-4)
