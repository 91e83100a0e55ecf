"""Captures of a rendered solid, as folders and zips that other programs might have written."""

from __future__ import annotations

import io
import json
import zipfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from solids import cube, joined, sphere

from coser.cameras import Cameras
from coser.own_views import PosedViews
from coser.rasterizer import render
from coser.transforms import cameras_to_transforms
from coser.views import ViewSet

SIZE = 64
STEP = 1e-4  # depth_scale
SOLID = joined(cube(0.3, (0.35, 0, 0)), sphere(0.25, rows=16, center=(-.3, .4, 0.1)), cube(0.2, (-.1, -.5, .4)))
FILE_AXES = torch.tensor([[1.0, 0, 0, 0], [0, 0, -1, 0], [0, 1, 0, 0], [0, 0, 0, 1]], dtype=torch.float64)


def straight(views: ViewSet) -> np.ndarray:
    """ViewSet => uint8 [N,H,W,4], alpha straight."""
    colors = (views.views / views.masks.clamp_min(1e-6)).clamp(0, 1)
    return (torch.cat([colors, views.masks], 1) * 255).round().byte().permute(0, 2, 3, 1).numpy()


def encoded(picture: np.ndarray | Image.Image, kind: str = "PNG", **options) -> bytes:
    file = io.BytesIO()
    (picture if isinstance(picture, Image.Image) else Image.fromarray(picture)).save(file, kind, **options)
    return file.getvalue()


def capture(views: ViewSet, transforms: dict | None, depth_scale: float = STEP) -> dict[str, bytes]:
    """The files of a capture: views/000.png and so on, depth/000.png where the transforms name them."""
    files = {f"views/{i:03d}.png": encoded(picture) for i, picture in enumerate(straight(views))}
    if transforms is not None:
        files["transforms.json"] = json.dumps(transforms).encode()
        for i, frame in enumerate(transforms["frames"]):
            if "depth_file_path" in frame:
                steps = (views.depths[i, 0] / depth_scale).round().numpy().astype(np.uint16)
                files[frame["depth_file_path"]] = encoded(steps)
    return files


def zipped(files: dict[str, bytes], path: Path) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return path


def in_folder(files: dict[str, bytes], folder: Path) -> Path:
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


def placed(scale: float, middle: tuple[float, float, float]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return SOLID[0] * scale + torch.tensor(middle), *SOLID[1:]


def around(middle: tuple[float, float, float], num_views: int, distance: float, fov: float) -> Cameras:
    poses = Cameras.orbit(num_views, elevation=25, start=20, distance=distance, fov=fov).camera_to_world.clone()
    poses[:, :3, 3] += torch.tensor(middle)
    return Cameras(poses, fov)


def truth(own: PosedViews, solid: tuple, size: int) -> ViewSet:
    """The solid, moved as the pictures' world was, seen by the cameras that were made of theirs."""
    back = torch.linalg.inv(own.world_to_source) @ FILE_AXES
    vertices = (solid[0].double() @ back[:3, :3].T + back[:3, 3]).float()
    return render(vertices, *solid[1:], own.cameras, size)


def six_views() -> tuple[ViewSet, Cameras]:
    """A ring of the solid."""
    cameras = Cameras.orbit(6, elevation=20)
    return render(*SOLID, cameras, SIZE), cameras


REFUSED = {  # what is wrong with views of one's own: how it is said, at every door
    "one view": "own views must be 2 to 200 pictures", "too many": "2 to 200 .*got 201",
    "no camera": r"frames\[0\].transform_matrix .*got none", "cameras of other pictures": "cameras must belong",
    "cut short": "6.png .*must be", "no zip": "own views must be a folder, a .zip or"}


def refused(wrong: str, folder: Path) -> Path:
    """A zip of own views with what REFUSED names wrong about them."""
    views, cameras = six_views()
    files = capture(views, None)
    pictures = list(files.values())
    transforms = cameras_to_transforms(cameras, SIZE)
    if wrong == "one view":
        files = {"0.png": pictures[0]}
    elif wrong == "too many":
        files = {f"{i}.png": pictures[i % 6] for i in range(201)}
    elif wrong == "no camera":
        del transforms["frames"][0]["transform_matrix"]
        files = capture(views, transforms)
    elif wrong == "cameras of other pictures":
        files = capture(views[[0, 3, 1, 5, 2, 4]], transforms)
    elif wrong == "cut short":
        files["views/6.png"] = pictures[0][:100]
    path = zipped(files, folder / "wrong.zip")
    if wrong == "no zip":
        path.write_bytes(b"no zip")
    return path
