"""Cameras: conventions worked out by hand, and round trips."""

import math

import pytest
import torch

from coser.cameras import DISTANCE, FOV, Cameras, pixel_centers


def test_azimuth_zero_stands_on_plus_z_and_grows_towards_plus_x():
    centers = Cameras.look_at_origin([0, 90, 180, 270], 0, distance=2).centers
    assert torch.allclose(centers, torch.tensor([[0., 0, 2], [2, 0, 0], [0, 0, -2], [-2, 0, 0]]), atol=1e-6)


def test_elevation_raises_the_camera():
    center = Cameras.look_at_origin([0], 30, distance=2).centers[0]
    assert torch.allclose(center, torch.tensor([0, 1, math.sqrt(3)]), atol=1e-6)


def test_pose_of_the_front_camera_is_a_plain_step_back():
    pose = Cameras.look_at_origin([0], 0, distance=3).camera_to_world[0]
    expected = torch.eye(4)
    expected[2, 3] = 3
    assert torch.allclose(pose, expected, atol=1e-6)


def test_poses_are_rigid():
    pose = Cameras.orbit(7, elevation=25, start=13).camera_to_world[:, :3, :3]
    assert torch.allclose(pose @ pose.transpose(1, 2), torch.eye(3).expand(7, 3, 3), atol=1e-6)
    assert torch.allclose(torch.linalg.det(pose), torch.ones(7), atol=1e-6)


def test_camera_looks_along_its_minus_z():
    cameras = Cameras.orbit(5, elevation=20)
    forward = -cameras.camera_to_world[:, :3, 2]
    assert torch.allclose(forward, -cameras.centers / DISTANCE, atol=1e-6)


def test_origin_projects_to_the_middle_at_the_camera_distance():
    uv, depth = Cameras.orbit(6, elevation=15).project(torch.zeros(1, 3))
    assert torch.allclose(uv, torch.full_like(uv, 0.5), atol=1e-6)
    assert torch.allclose(depth, torch.full_like(depth, DISTANCE), atol=1e-5)


def test_picture_u_grows_right_and_v_grows_down():
    points = torch.tensor([[0.1, 0, 0], [0, 0.1, 0]])
    uv, depth = Cameras.look_at_origin([0], 0).project(points)
    reach = 0.1 / DISTANCE / math.tan(math.radians(FOV / 2)) / 2
    assert torch.allclose(uv[0], torch.tensor([[0.5 + reach, 0.5], [0.5, 0.5 - reach]]), atol=1e-6)
    assert torch.allclose(depth, torch.full_like(depth, DISTANCE))
    from_the_right, _ = Cameras.look_at_origin([90], 0).project(torch.tensor([[0, 0, 0.1]]))
    assert from_the_right[0, 0, 0] < 0.5  # seen from +x, the front (+z) lies to the left


def test_unit_sphere_just_fits_the_picture():
    slope = math.tan(math.asin(1 / DISTANCE))
    assert 0.9 < slope / math.tan(math.radians(FOV / 2)) < 1


@pytest.mark.parametrize("orthographic", [False, True])
def test_unproject_inverts_project(orthographic):
    cameras = Cameras.orbit(5, elevation=17, start=3, orthographic=orthographic)
    points = torch.randn(40, 3, generator=torch.Generator().manual_seed(0)) * 0.4
    assert torch.allclose(cameras.unproject(*cameras.project(points)), points.expand(5, -1, -1), atol=1e-5)


@pytest.mark.parametrize("orthographic", [False, True])
def test_rays_advance_one_unit_of_depth_a_step(orthographic):
    cameras = Cameras.orbit(3, elevation=-10, orthographic=orthographic)
    uv = torch.rand(9, 2, generator=torch.Generator().manual_seed(1))
    origins, directions = cameras.rays(uv)
    seen, depth = cameras.project(origins + 2.5 * directions)
    assert torch.allclose(depth, torch.full_like(depth, 2.5), atol=1e-5)
    assert torch.allclose(seen, uv.expand(3, -1, -1), atol=1e-5)


def test_orthographic_picture_spans_minus_one_to_one_at_any_depth():
    cameras = Cameras.look_at_origin([0], 0, orthographic=True)
    uv, _ = cameras.project(torch.tensor([[1., 0, 0.7], [-1, 1, -0.7]]))
    assert torch.allclose(uv[0], torch.tensor([[1, 0.5], [0, 0]]), atol=1e-6)


def test_orbit_is_a_closed_ring():
    cameras = Cameras.orbit(8, elevation=20, start=5)
    steps = (cameras.azimuths.roll(-1) - cameras.azimuths) % 360
    assert torch.allclose(steps, torch.full((8,), 45.0), atol=1e-3)
    assert torch.allclose(cameras.elevations, torch.full((8,), 20.0), atol=1e-4)
    assert cameras.azimuths[0].item() == pytest.approx(5, abs=1e-4)


def test_indexing_keeps_cameras():
    cameras = Cameras.orbit(6, fov=30)
    assert len(cameras[2]) == 1 and len(cameras[::2]) == 3 and cameras[1:3].fov == 30
    assert torch.equal(cameras[2].camera_to_world[0], cameras.camera_to_world[2])


def test_pixel_centers_run_row_by_row_from_the_top_left():
    assert torch.allclose(pixel_centers(2), torch.tensor([[.25, .25], [.75, .25], [.25, .75], [.75, .75]]))


@pytest.mark.parametrize("wrong", [
    lambda: Cameras.orbit(0), lambda: Cameras.look_at_origin([0], 90),
    lambda: Cameras.look_at_origin([0], 0, distance=0),
    lambda: Cameras(torch.eye(4)), lambda: Cameras(torch.eye(4)[None], fov=180)])
def test_impossible_cameras_are_refused(wrong):
    with pytest.raises(ValueError):
        wrong()
