"""The visual hull: holds the object, shows its silhouettes, wherever the object is and however large."""

import numpy as np
import pytest
import torch
from solids import cube, joined, sphere, table

from coser.cameras import Cameras
from coser.metrics import silhouette_iou
from coser.rasterizer import rasterize, render
from coser.reconstruction.hull import signed_silhouettes, visual_hull
from coser.reconstruction.mesh import Mesh

RING = Cameras.orbit(12)
SIZE = 96


def hull_of(solid, cameras=RING, resolution=48, **options) -> Mesh:
    vertices, faces, _ = visual_hull(render(*solid, cameras, SIZE).masks, cameras, resolution, **options)
    return Mesh(vertices, faces)


def silhouettes(mesh: Mesh, cameras: Cameras) -> torch.Tensor:
    fragments = rasterize(torch.from_numpy(mesh.vertices), torch.from_numpy(mesh.faces), cameras, SIZE)
    return (fragments.faces >= 0).float()[:, None]


def moved(cameras: Cameras, scale: float, offset) -> Cameras:
    pose = cameras.camera_to_world.clone()
    pose[:, :3, 3] = pose[:, :3, 3] * scale + torch.tensor(offset)
    return Cameras(pose, cameras.fov)


@pytest.mark.parametrize("solid", [cube(0.5), sphere(0.7, 24), table()], ids=["cube", "sphere", "table"])
def test_hull_is_closed_and_shows_the_silhouettes_it_was_made_of(solid):
    mesh = hull_of(solid)
    assert mesh.is_watertight and mesh.volume > 0
    iou = silhouette_iou(silhouettes(mesh, RING), render(*solid, RING, SIZE).masks)
    assert iou.min() > (0.88 if len(solid[0]) == 120 else 0.96)  # the table's thin legs lose a pixel


def test_plain_hull_holds_the_object():
    mesh = hull_of(cube(0.5), floor=False)
    assert (mesh.vertices.min(0) < -0.495).all() and (mesh.vertices.max(0) > 0.495).all()
    assert 1 < mesh.volume < 1.7  # seen from above alone, there is a cone below


def test_cone_that_no_view_sees_ends_where_the_object_stands():
    mesh, plain = hull_of(cube(0.5)), hull_of(cube(0.5), floor=False)
    assert mesh.vertices[:, 1].min() == pytest.approx(-0.5, abs=0.02)
    assert plain.vertices[:, 1].min() < -0.65


def test_views_from_below_leave_nothing_to_the_floor():
    cameras = Cameras.look_at_origin(torch.arange(24.) * 30, torch.tensor([20.0, -40.0]).repeat_interleave(12))
    mesh, plain = hull_of(sphere(0.7, 24), cameras), hull_of(sphere(0.7, 24), cameras, floor=False)
    assert np.array_equal(mesh.vertices, plain.vertices)
    assert np.linalg.norm(mesh.vertices, axis=1) == pytest.approx(0.7, abs=0.09)


def test_hull_follows_an_object_of_any_size_anywhere():
    near = hull_of(cube(0.5))
    far = hull_of(cube(5.0, (30.0, 2.0, -4.0)), moved(RING, 10, (30.0, 2.0, -4.0)))
    assert far.volume == pytest.approx(1000 * near.volume, rel=0.01)
    assert (far.vertices.min(0) + far.vertices.max(0)) / 2 == pytest.approx((30, 2, -4), abs=0.6)


def test_silhouette_distances_are_finer_than_a_pixel_and_reach_far():
    ramp = torch.zeros(1, 64, 64)
    ramp[:, :, :20], ramp[:, :, 20] = 1, 0.25  # the edge lies a quarter into column 20
    columns = torch.arange(64) + 0.5 - 20.25
    assert signed_silhouettes(ramp)[0, 32, 1:60] == pytest.approx(columns[1:60], abs=0.51)
    assert signed_silhouettes(ramp)[0, 32, 18:23] == pytest.approx(columns[18:23], abs=1e-6)
    assert signed_silhouettes(torch.ones(1, 8, 8)).max() < 0


@pytest.mark.parametrize("num_views", [1, 2, 3, 4, 24])
def test_any_number_of_views_makes_a_closed_hull(num_views):
    mesh = hull_of(cube(0.5), Cameras.orbit(num_views))
    assert mesh.is_watertight and mesh.volume > 0.9


def test_object_cut_off_by_the_picture_is_not_carved_beyond_it():
    close = moved(RING, 0.6, (0.0, 0.0, 0.0))
    solid = cube(0.5)
    assert render(*solid, close, SIZE).masks[:, :, -1].max() == 1  # it does touch the edge
    assert hull_of(solid, close).volume > 1


def test_one_wrong_view_carves_nothing_that_needs_two_denials():
    masks = render(*cube(0.5), RING, SIZE).masks
    masks[3, :, 30:70, 30:70] = 0
    strict, lenient = (Mesh(*visual_hull(masks, RING, 48, denials=n)[:2]).volume for n in (1, 2))
    assert strict < 0.9 and lenient > 1


def test_silhouettes_that_share_no_point_are_refused():
    masks = torch.zeros(2, 1, 32, 32)
    masks[0, :, :4], masks[1, :, -4:] = 1, 1  # the top of one view, the bottom of the other
    with pytest.raises(ValueError, match="contradict"):
        visual_hull(masks, Cameras.orbit(2, elevation=0), 32)


def test_wrong_arguments_are_named():
    masks = torch.ones(2, 1, 16, 16)
    for arguments, name in (((masks[:, 0], Cameras.orbit(2)), "masks"), ((masks, Cameras.orbit(3)), "cameras"),
                            ((masks * 0, Cameras.orbit(2)), "view 0")):
        with pytest.raises(ValueError, match=name):
            visual_hull(*arguments, 16)
    with pytest.raises(ValueError, match="denials"):
        visual_hull(masks, Cameras.orbit(2), 16, denials=3)


def test_two_objects_make_two_hulls():
    mesh = hull_of(joined(sphere(0.3, 16, (-0.6, 0, 0)), sphere(0.3, 16, (0.6, 0, 0))), resolution=56)
    assert not (np.abs(mesh.vertices[:, 0]) < 0.1).any()
