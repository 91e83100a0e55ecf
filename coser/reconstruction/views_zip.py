"""The views as a zip that NeRF programs, and this one, read: RGBA pictures, 16-bit depths and transforms.json.

Everything is in the frame of the reconstruction, whatever became of the mesh: see `coser.transforms` for the axes.
"""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

import numpy as np
from PIL import Image

from coser.cameras import Cameras
from coser.reconstruction.archive import add
from coser.reconstruction.glb import png_bytes
from coser.reconstruction.reload import expect_close, expect_equal
from coser.transforms import cameras_to_transforms, transforms_to_cameras
from coser.views import ViewSet

SUFFIX = "-views.zip"
STEPS = 65535  # of a 16-bit depth; 0 = nothing


def save_views(views: ViewSet, cameras: Cameras, path: str | Path, extras: dict | None = None) -> Path:
    """Writes views/000.png (RGBA, colours not premultiplied), depth/000.png where there are depths, and transforms.json
    with `extras` (JSON values) beside the frames; returns the path.

    Raises ValueError when the views and cameras do not belong together or the pictures are not square.
    """
    count, size, width = len(views), *views.views.shape[2:]
    if count != len(cameras):
        raise ValueError(f"cameras must be as many as the views ({count}), got {len(cameras)}")
    if size != width:
        raise ValueError(f"views must be square, got {size} x {width}")
    depths, step = _depth_steps(views)
    names = [f"views/{i:03d}.png" for i in range(count)]
    depth_names = [f"depth/{i:03d}.png" for i in range(count)] if step else None
    transforms = cameras_to_transforms(cameras, size, file_paths=names, depth_file_paths=depth_names, depth_scale=step)
    if extras:
        transforms["extras"] = extras
    with zipfile.ZipFile(path, "w") as archive:
        add(archive, "transforms.json", json.dumps(transforms, indent=1).encode("utf-8"))
        for name, picture in zip(names, _rgba(views)):
            add(archive, name, png_bytes(picture))
        for name, picture in zip(depth_names or [], depths):
            add(archive, name, png_bytes(picture))
    return Path(path)


def check_views(views: ViewSet, cameras: Cameras, path: str | Path) -> None:
    """Reads the zip back; raises ValueError where its cameras, pictures or depths are not those that were given."""
    with zipfile.ZipFile(path) as archive:
        transforms = json.loads(archive.read("transforms.json"))
        back = transforms_to_cameras(transforms)
        expect_close("cameras", back.camera_to_world.numpy(), cameras.camera_to_world.cpu().numpy(), 1e-5)
        expect_close("the field of view", back.fov, cameras.fov, 1e-5)
        depths, step = _depth_steps(views)
        for frame, picture, depth in zip(transforms["frames"], _rgba(views), depths):
            expect_close("pictures", _read(archive, frame["file_path"]), picture, 0)
            expect_equal("depths:", "depth_file_path" in frame, step is not None)
            if step:
                expect_close("depths", _read(archive, frame["depth_file_path"]), depth, 0)


def _rgba(views: ViewSet) -> np.ndarray:
    """Pictures [N,S,S,4] uint8, colours not premultiplied."""
    masks = views.masks.float().clamp(0, 1)
    colors = (views.views.float() / masks.clamp_min(1e-6)).clamp(0, 1) * (masks > 0)
    pictures = np.concatenate([colors.cpu().numpy(), masks.cpu().numpy()], 1).transpose(0, 2, 3, 1)
    return (pictures * 255).round().astype(np.uint8)


def _depth_steps(views: ViewSet) -> tuple[np.ndarray, float | None]:
    """Depths [N,S,S] uint16 and the world units of a step; None where no pixel has a depth."""
    depths = views.depths.cpu().numpy()[:, 0].astype(np.float64)
    farthest = float(depths.max(initial=0.0))
    if farthest <= 0:
        return np.zeros(depths.shape, np.uint16), None
    step = farthest / STEPS
    return np.where(depths > 0, (depths / step).round().clip(1, STEPS), 0).astype(np.uint16), step


def _read(archive: zipfile.ZipFile, name: str) -> np.ndarray:
    with Image.open(archive.open(name)) as picture:
        return np.asarray(picture)
