"""Cameras to and from transforms.json, the file of NeRF, instant-ngp, nerfstudio and Blender's add-ons.

Conventions of that file: right-handed world with z UP; `transform_matrix` is camera-to-world, the camera has x right,
y up and looks along its own -z (OpenGL); lengths of the lens in pixels, a picture's top left CORNER being (0, 0), so
that the middle of a picture w pixels wide lies at w / 2. Cameras' world has y up: (x, y, z) there is (x, -z, y) in the
file. `depth_file_path` names a 16-bit picture; a value times `depth_scale` is the distance along the camera's axis in
the file's units, 0 = nothing there. `unit_sphere` is ours: the object lies in the unit sphere around the origin.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass

import numpy as np
import torch

from coser.cameras import Cameras

FILE_TO_WORLD = np.array([[1.0, 0, 0, 0], [0, 0, 1, 0], [0, -1, 0, 0], [0, 0, 0, 1]])  # z up => y up
DEPTH_SCALE = 1e-3  # where a file does not tell: millimetres, as nerfstudio has it
RIGID = 0.02  # how far the columns of a rotation may be from orthonormal: rounding in files, not scale or shear
MAX_FRAMES = 10_000  # more than anybody's capture has; keeps a file from being endless
SIDES = (1, 100_000)  # pixels a side
FISHEYE = ("fisheye", "equirectangular", "panorama", "orthographic")


@dataclass(frozen=True)
class Lens:
    """What a file says of a lens: focal lengths and principal point in pixels of a picture of size (w, h), or angles.

    Each of focal, center, size and angles is a pair (x, y) of numbers or None. distortion: (k1, k2, k3, k4, p1, p2) of
    OpenCV's model with radial terms in r^2, r^4, r^6 and r^8.
    """

    focal: tuple[float | None, float | None]
    center: tuple[float | None, float | None]
    size: tuple[float | None, float | None]
    angles: tuple[float | None, float | None]
    distortion: tuple[float, float, float, float, float, float] = (0.0,) * 6

    def pinhole(self, width: int, height: int) -> tuple[float, float, float, float]:
        """Focal lengths fx, fy and principal point cx, cy in pixels of the picture at hand, `width` x `height`.

        A picture that was reduced or enlarged since the file was written has its lens scaled. Raises ValueError when
        its shape is not that of the file.
        """
        at_hand, scale, focal = (width, height), [1.0, 1.0], [0.0, 0.0]
        for k in (0, 1):
            if self.size[k] is not None:
                scale[k] = at_hand[k] / self.size[k]
        if None not in self.size and abs(scale[0] / scale[1] - 1) > 0.02:
            raise ValueError(f"pictures must have the shape that transforms.json tells, {self.size[0]:g} x "
                             f"{self.size[1]:g} pixels, got {width} x {height}")
        for k in (0, 1):
            if self.focal[k] is not None:
                focal[k] = self.focal[k] * scale[k]
            elif self.angles[k] is not None:
                focal[k] = at_hand[k] / 2 / math.tan(self.angles[k] / 2)
        focal = [focal[0] or focal[1], focal[1] or focal[0]]  # one alone: square pixels
        center = [at_hand[k] / 2 if self.center[k] is None else self.center[k] * scale[k] for k in (0, 1)]
        return focal[0], focal[1], center[0], center[1]


@dataclass(frozen=True)
class Frame:
    """One picture of a transforms.json: its files as written there, its camera [4,4] (y up, rigid) and its lens."""

    file_path: str
    camera_to_world: np.ndarray
    lens: Lens
    depth_file_path: str | None = None
    mask_path: str | None = None


def cameras_to_transforms(cameras: Cameras, size: int, *, file_paths: list[str] | None = None,
                          depth_file_paths: list[str] | None = None, depth_scale: float | None = None,
                          unit_sphere: bool = True) -> dict:
    """N perspective cameras of pictures `size` pixels a side => what `json.dump` writes as transforms.json.

    file_paths: N names relative to the file, views/000.png and so on if none are given. depth_file_paths: N names of
    16-bit depth pictures, with `depth_scale` world units a step. unit_sphere: the object lies in the unit sphere around
    the origin, so that who reads it leaves the world as it is. `transforms_to_cameras` is the inverse. Raises
    ValueError when the names are not N, for a depth without a scale and for orthographic cameras.
    """
    if cameras.orthographic:
        raise ValueError("cameras must be perspective for a transforms.json, got orthographic ones")
    if not isinstance(size, int) or not SIDES[0] <= size <= SIDES[1]:
        raise ValueError(f"size must be a whole number of pixels from {SIDES[0]} to {SIDES[1]}, got {size!r}")
    names = file_paths if file_paths is not None else [f"views/{i:03d}.png" for i in range(len(cameras))]
    for word, given in (("file_paths", names), ("depth_file_paths", depth_file_paths)):
        if given is not None and len(given) != len(cameras):
            raise ValueError(f"{word} must be as many as the cameras ({len(cameras)}), got {len(given)}")
    if depth_file_paths is not None and not (depth_scale is not None and 0 < depth_scale < math.inf):
        raise ValueError(f"depth_scale must be a positive number where there are depths, got {depth_scale!r}")
    angle, focal = math.radians(cameras.fov), cameras.focal * size / 2
    transforms = {"camera_model": "PINHOLE", "camera_angle_x": angle, "camera_angle_y": angle, "fl_x": focal,
                  "fl_y": focal, "cx": size / 2, "cy": size / 2, "w": size, "h": size, "unit_sphere": unit_sphere}
    if depth_file_paths is not None:
        transforms["depth_scale"] = depth_scale
    poses = FILE_TO_WORLD.T @ cameras.camera_to_world.detach().cpu().double().numpy()
    transforms["frames"] = frames = []
    for i, pose in enumerate(poses + 0.0):  # + 0.0: no "-0.0" in the file
        frame = {"file_path": names[i], "transform_matrix": pose.tolist()}
        if depth_file_paths is not None:
            frame["depth_file_path"] = depth_file_paths[i]
        frames.append(frame)
    return transforms


def transforms_to_cameras(transforms: dict) -> Cameras:
    """A read transforms.json => its N cameras, where they share one lens with the principal point in the middle of
    square pictures; otherwise ValueError (`read_frames` reads those). The inverse of `cameras_to_transforms`.
    """
    frames = read_frames(transforms)
    fovs = []
    for i, frame in enumerate(frames):
        width, height = (round(side) if side is not None else 512 for side in frame.lens.size)
        fx, fy, cx, cy = frame.lens.pinhole(width, height)
        off = max(abs(fx / fy - 1), abs(2 * cx / width - 1), abs(2 * cy / height - 1), *map(abs, frame.lens.distortion))
        if width != height or off > 1e-4:
            raise ValueError(f"frames[{i}] must be a square picture of an undistorted lens with its principal point in "
                             f"the middle, got {width} x {height} with focal lengths {fx:g}, {fy:g} and the point at "
                             f"{cx:g}, {cy:g}")
        fovs.append(math.degrees(2 * math.atan(width / 2 / fx)))
    if max(fovs) - min(fovs) > 1e-3:
        raise ValueError(f"frames must share one fov, got {min(fovs):g} to {max(fovs):g} degrees")
    poses = torch.from_numpy(np.stack([frame.camera_to_world for frame in frames])).float()
    return Cameras(poses, sum(fovs) / len(fovs))


def read_frames(transforms: dict) -> list[Frame]:
    """A read transforms.json => its frames, with y up.

    A frame's own lens goes before the file's. Raises ValueError, naming the frame, for matrices that are missing, hold
    no finite numbers, or are scaled, sheared or mirrored; for lenses that are not a pinhole's with OpenCV's distortion;
    and where there are no frames.
    """
    if not isinstance(transforms, dict) or not isinstance(transforms.get("frames"), list):
        raise ValueError('transforms.json must be an object with a list "frames", got '
                         f"{type(transforms).__name__} without one")
    frames = transforms["frames"]
    if not 1 <= len(frames) <= MAX_FRAMES:
        raise ValueError(f"transforms.json must have 1 to {MAX_FRAMES} frames, got {len(frames)}")
    return [_frame(transforms, frame, f"frames[{i}]") for i, frame in enumerate(frames)]


def depth_scale_of(transforms: dict) -> float:
    """World units of one step of the file's depth pictures, a positive number; ValueError otherwise."""
    for key in ("depth_scale", "depth_unit_scale_factor", "integer_depth_scale"):
        value = _number(transforms, key, "transforms.json")
        if value is not None:
            if value <= 0:
                raise ValueError(f"{key} in transforms.json must be positive, got {value:g}")
            return value
    return DEPTH_SCALE


def _frame(transforms: dict, frame: object, where: str) -> Frame:
    if not isinstance(frame, dict):
        raise ValueError(f"{where} in transforms.json must be an object, got {type(frame).__name__}")
    paths = [frame.get(key) for key in ("file_path", "depth_file_path", "mask_path")]
    paths[1] = paths[1] if paths[1] is not None else frame.get("depth_path")
    if not isinstance(paths[0], str) or not paths[0].strip():
        raise ValueError(f"{where}.file_path in transforms.json must name a picture, got {paths[0]!r}")
    if any(not isinstance(path, (str, type(None))) for path in paths):
        raise ValueError(f"{where} in transforms.json must name files by text, got {paths}")
    return Frame(paths[0], _pose(frame.get("transform_matrix"), where), _lens(transforms, frame, where), *paths[1:])


def _pose(matrix: object, where: str) -> np.ndarray:
    """transform_matrix => camera-to-world [4,4] with y up, exactly rigid."""
    problem = f"{where}.transform_matrix in transforms.json must be 4 rows of 4 finite numbers"
    if matrix is None:
        raise ValueError(f"{problem}, got none")
    try:
        pose = np.array(matrix, np.float64)
    except (TypeError, ValueError, OverflowError):
        raise ValueError(f"{problem}, got something else") from None
    if pose.shape == (3, 4):
        pose = np.concatenate([pose, [[0, 0, 0, 1.0]]])
    if pose.shape != (4, 4):
        raise ValueError(f"{problem}, got shape {list(pose.shape)}")
    if not np.isfinite(pose).all():
        raise ValueError(f"{problem}, got some that are not finite")
    rotation = pose[:3, :3]
    if np.abs(pose[3] - (0, 0, 0, 1)).max() > 1e-4:
        raise ValueError(f"{where}.transform_matrix in transforms.json must end with the row 0 0 0 1, got {pose[3]}")
    if np.abs(rotation.T @ rotation - np.eye(3)).max() > RIGID:
        lengths = ", ".join(f"{length:.3g}" for length in np.linalg.norm(rotation, axis=0))
        raise ValueError(f"{where}.transform_matrix in transforms.json must be rigid (a rotation and a place), got one "
                         f"that is scaled or sheared: its axes have lengths {lengths}")
    if np.linalg.det(rotation) < 0:
        raise ValueError(f"{where}.transform_matrix in transforms.json must be rigid, got one that mirrors")
    if np.abs(rotation.T @ rotation - np.eye(3)).max() > 1e-6:
        left, _, right = np.linalg.svd(rotation)
        pose[:3, :3] = left @ right
    pose[3] = 0, 0, 0, 1
    return FILE_TO_WORLD @ pose


def _lens(transforms: dict, frame: dict, where: str) -> Lens:
    def pair(x: str, y: str) -> tuple[float | None, float | None]:
        return value(x), value(y)

    def value(key: str) -> float | None:
        own = _number(frame, key, where)
        return own if own is not None else _number(transforms, key, "transforms.json")

    model = str(frame.get("camera_model", transforms.get("camera_model", "")))
    if any(word in model.lower() for word in FISHEYE) or any(d.get("is_fisheye") is True for d in (transforms, frame)):
        raise ValueError(f"{where} in transforms.json must have a pinhole camera, got {model or 'a fisheye'}: "
                         "undistort the pictures first")
    lens = Lens(pair("fl_x", "fl_y"), pair("cx", "cy"), pair("w", "h"), pair("camera_angle_x", "camera_angle_y"),
                tuple(value(key) or 0.0 for key in ("k1", "k2", "k3", "k4", "p1", "p2")))
    if lens.focal == lens.angles == (None, None):
        raise ValueError(f"{where} in transforms.json must have a lens, camera_angle_x or fl_x, got neither")
    if any(f is not None and f <= 0 for f in lens.focal):
        raise ValueError(f"fl_x and fl_y of {where} in transforms.json must be positive, got {lens.focal}")
    if any(a is not None and not 0 < a < math.pi for a in lens.angles):
        raise ValueError(f"camera_angle_x of {where} in transforms.json must lie between 0 and pi (radians), got "
                         f"{lens.angles}")
    if any(s is not None and not SIDES[0] <= s <= SIDES[1] for s in lens.size):
        raise ValueError(f"w and h of {where} in transforms.json must lie between {SIDES[0]} and {SIDES[1]} pixels, "
                         f"got {lens.size}")
    return lens


def _number(holder: dict, key: str, where: str) -> float | None:
    value = holder.get(key)
    if value is None:
        return None
    try:
        number = math.nan if isinstance(value, bool) or not isinstance(value, (int, float)) else float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise ValueError(f"{key} of {where} must be a finite number, got {json.dumps(value)[:60]}")
    return number
