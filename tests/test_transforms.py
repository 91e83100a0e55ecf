"""transforms.json: what other programs read there is what our cameras see, and what they write is read alike."""

import json
import math

import numpy as np
import pytest
import torch
from solids import cube, joined

from coser.cameras import Cameras
from coser.rasterizer import render
from coser.transforms import cameras_to_transforms, depth_scale_of, read_frames, transforms_to_cameras

POINTS = np.array([[0.7, 0, 0], [0, 0.5, 0], [0, 0, 0.9], [0.1, -0.4, 0.2]])  # y up
SIZE = 96


def pinhole_of_nerf(transforms: dict, frame: dict, points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Points [P,3] of the file's world => pixels [P,2] and distances along the axis, by the convention as published."""
    matrix = np.array(frame["transform_matrix"])
    x, y, z = (np.linalg.inv(matrix) @ np.c_[points, np.ones(len(points))].T)[:3]
    focal = 0.5 * transforms["w"] / math.tan(0.5 * transforms["camera_angle_x"])
    return np.stack([transforms["w"] / 2 + focal * x / -z, transforms["h"] / 2 - focal * y / -z], -1), -z


def to_file(points: np.ndarray) -> np.ndarray:
    """y up => z up."""
    return np.stack([points[:, 0], -points[:, 2], points[:, 1]], -1)


def some_cameras() -> Cameras:
    rings = [Cameras.orbit(5, elevation=e, start=11, distance=2.7, fov=33) for e in (-35, 0, 20, 60)]
    return Cameras(torch.cat([ring.camera_to_world for ring in rings]), 33)


def test_cameras_come_back_from_transforms():
    cameras = some_cameras()
    back = transforms_to_cameras(json.loads(json.dumps(cameras_to_transforms(cameras, 256))))
    assert torch.allclose(back.camera_to_world, cameras.camera_to_world, atol=1e-6)
    assert back.fov == pytest.approx(cameras.fov, abs=1e-9)


def test_a_nerf_pinhole_sees_points_where_our_cameras_do():
    cameras = some_cameras()
    transforms = json.loads(json.dumps(cameras_to_transforms(cameras, SIZE)))
    uv, depth = cameras.project(torch.tensor(POINTS, dtype=torch.float32))
    for i, frame in enumerate(transforms["frames"]):
        pixels, distances = pinhole_of_nerf(transforms, frame, to_file(POINTS))
        assert np.allclose(pixels, uv[i].numpy() * SIZE, atol=1e-3)
        assert np.allclose(distances, depth[i].numpy(), atol=1e-5)


def test_blobs_of_an_asymmetric_solid_are_drawn_where_a_nerf_pinhole_puts_them():
    cameras = Cameras.orbit(6, elevation=25, start=17)
    solids = [(vertices, faces, torch.eye(3)[i].expand(len(faces), 3, 3)) for i, (vertices, faces, _) in
              enumerate(cube(0.06, tuple(p)) for p in POINTS[:3].tolist())]
    views = render(*joined(*solids), cameras, SIZE, shade=False)
    transforms = cameras_to_transforms(cameras, SIZE)
    looked_at = 0
    for i, frame in enumerate(transforms["frames"]):
        pixels, _ = pinhole_of_nerf(transforms, frame, to_file(POINTS[:3]))
        for k in range(3):
            rows, columns = np.nonzero(views.views[i, k].numpy() > 0.5)
            if len(rows) > 20:  # not hidden behind another
                assert np.allclose([columns.mean() + 0.5, rows.mean() + 0.5], pixels[k], atol=1.2)
                looked_at += 1
    assert looked_at >= 15


def test_the_file_has_z_up_and_the_front_towards_minus_y():
    front, right = cameras_to_transforms(Cameras.orbit(4, elevation=0, distance=2), 64)["frames"][:2]
    assert np.allclose(np.array(front["transform_matrix"])[:3, 3], [0, -2, 0], atol=1e-6)
    assert np.allclose(np.array(right["transform_matrix"])[:3, 3], [2, 0, 0], atol=1e-6)
    assert np.allclose(np.array(front["transform_matrix"])[:3, 1], [0, 0, 1], atol=1e-6)


def test_a_lens_is_read_from_an_angle_and_from_a_focal_length_alike():
    pose = cameras_to_transforms(Cameras.orbit(1), 100)["frames"]
    by_angle, = read_frames({"camera_angle_x": 2 * math.atan(50 / 120), "frames": pose})
    by_length, = read_frames({"fl_x": 240, "w": 200, "h": 100, "frames": pose})
    assert by_angle.lens.pinhole(100, 50) == pytest.approx((120, 120, 50, 25))
    assert by_length.lens.pinhole(100, 50) == pytest.approx((120, 120, 50, 25))


def test_a_reduced_picture_has_its_lens_reduced():
    frame, = read_frames({"fl_x": 240, "fl_y": 250, "cx": 90, "cy": 61, "w": 200, "h": 100,
                          "frames": cameras_to_transforms(Cameras.orbit(1), 100)["frames"]})
    assert frame.lens.pinhole(50, 25) == pytest.approx((60, 62.5, 22.5, 15.25))
    with pytest.raises(ValueError, match="200 x 100"):
        frame.lens.pinhole(100, 200)


def test_a_frame_s_own_lens_goes_before_the_file_s():
    frames = cameras_to_transforms(Cameras.orbit(2), 100)["frames"]
    frames[1]["fl_x"] = 77
    one, two = read_frames({"fl_x": 66, "k1": 0.1, "frames": frames})
    assert (one.lens.focal[0], two.lens.focal[0]) == (66, 77)
    assert one.lens.distortion[0] == two.lens.distortion[0] == 0.1


def test_rounded_matrices_become_rigid():
    transforms = cameras_to_transforms(some_cameras(), 64)
    for frame in transforms["frames"]:
        frame["transform_matrix"] = np.round(frame["transform_matrix"], 3).tolist()
    poses = np.stack([frame.camera_to_world[:3, :3] for frame in read_frames(transforms)])
    assert np.allclose(poses @ poses.transpose(0, 2, 1), np.eye(3), atol=1e-9)
    assert np.allclose(poses, some_cameras().camera_to_world[:, :3, :3], atol=2e-3)


def test_depth_scale_is_the_file_s_or_millimetres():
    assert depth_scale_of({"depth_scale": 0.25}) == 0.25
    assert depth_scale_of({"integer_depth_scale": 0.0005}) == 0.0005
    assert depth_scale_of({}) == 0.001


def changed(**changes) -> dict:
    transforms = cameras_to_transforms(Cameras.orbit(3), 64)
    transforms["frames"][1].update(changes)
    return transforms


SCALED, MIRRORED = np.diag([2.0, 2, 2, 1]).tolist(), np.diag([-1.0, 1, 1, 1]).tolist()


@pytest.mark.parametrize("transforms, said", [
    (changed(transform_matrix=SCALED), r"frames\[1\].*scaled"),
    (changed(transform_matrix=MIRRORED), r"frames\[1\].*mirrors"),
    (changed(transform_matrix=[[1, 0], [0, 1]]), r"frames\[1\].*shape"),
    (changed(transform_matrix=None), r"frames\[1\].*got none"),
    (changed(transform_matrix=[["a"] * 4] * 4), r"frames\[1\]"),
    (changed(transform_matrix=[[10**400] * 4] * 4), r"frames\[1\]"),
    (changed(transform_matrix=np.full((4, 4), math.nan).tolist()), r"frames\[1\].*finite"),
    (changed(fl_x=0), r"frames\[1\].*positive"),
    (changed(fl_x="wide"), r"fl_x of frames\[1\]"),
    (changed(fl_x=10**400), r"fl_x of frames\[1\] must be a finite number"),
    (changed(camera_model="OPENCV_FISHEYE"), r"frames\[1\].*FISHEYE"),
    (changed(file_path=None), r"frames\[1\].file_path"),
    ({"frames": []}, "1 to"),
    ([], "frames"),
    ({"frames": [7]}, r"frames\[0\]"),
    ({"frames": [{"file_path": "a", "transform_matrix": np.eye(4).tolist()}]}, "lens")])
def test_unusable_transforms_are_refused_by_name(transforms, said):
    with pytest.raises(ValueError, match=said):
        read_frames(transforms)


@pytest.mark.parametrize("wrong", [
    lambda: cameras_to_transforms(Cameras.orbit(3), 64, file_paths=["a"]),
    lambda: cameras_to_transforms(Cameras.orbit(1), 64, depth_file_paths=["a"]),
    lambda: cameras_to_transforms(Cameras.orbit(1, orthographic=True), 64),
    lambda: cameras_to_transforms(Cameras.orbit(1), 0),
    lambda: transforms_to_cameras(changed(fl_x=50)),
    lambda: transforms_to_cameras(changed(w=128)),
    lambda: transforms_to_cameras(changed(k1=0.1))])
def test_what_a_ring_of_square_cameras_cannot_say_is_refused(wrong):
    with pytest.raises(ValueError):
        wrong()
