"""One picture as it was taken: read, freed of its background, cropped to its object, with its lens and its camera."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from coser.picture_files import PictureFiles, decode_depth, decode_picture
from coser.reconstruction.keying import key_background, views_from_pictures
from coser.transforms import Frame

SOLID = 128  # of 255; where a mask is at least that, the object is


@dataclass(frozen=True)
class Photograph:
    """One picture as it was taken, cropped to its object.

    pixels: uint8 [h,w,4], straight alpha, the crop whose top left corner is `corner` (x, y) of the whole picture of
    size `whole` (width, height). camera_to_world: [4,4] float64, y up. lens: focal lengths fx, fy and principal point
    cx, cy in pixels of the whole picture. distortion: (k1, k2, k3, k4, p1, p2), OpenCV's. depth: [h',w'] float32,
    world units along the axis, 0 = nothing; depth_lens and depth_corner are to it what lens and corner are to the
    pixels. cut: the object touches the edge.
    """

    name: str
    pixels: np.ndarray
    corner: tuple[int, int]
    whole: tuple[int, int]
    camera_to_world: np.ndarray
    lens: tuple[float, float, float, float]
    distortion: tuple[float, ...] = (0.0,) * 6
    depth: np.ndarray | None = None
    depth_lens: tuple[float, float, float, float] | None = None
    depth_corner: tuple[int, int] = (0, 0)
    cut: bool = False

    def rim(self) -> np.ndarray:
        """Sight lines of the silhouette's rim in the camera, [P,3] float64 with z = -1: the first and the last solid
        pixel's outer edge in each row."""
        solid = self.pixels[..., 3] >= SOLID
        rows = np.flatnonzero(solid.any(1))
        first, last = solid[rows].argmax(1), solid.shape[1] - solid[rows, ::-1].argmax(1)
        x, y = np.concatenate([first, last]), np.concatenate([rows, rows]) + 0.5
        x = np.concatenate([x, [first[0] + 0.5, last[-1] - 0.5]])  # and the upper and lower edge
        y = np.concatenate([y, [rows[0], rows[-1] + 1.0]])
        fx, fy, cx, cy = self.lens
        xy = undistort(np.stack([(x + self.corner[0] - cx) / fx, (y + self.corner[1] - cy) / fy], -1), self.distortion)
        return np.stack([xy[:, 0], -xy[:, 1], -np.ones(len(xy))], -1)

    def moved(self, middle: np.ndarray, scale: float) -> "Photograph":
        """The same in a world whose origin is the old one's `middle` and whose unit is 1 / `scale` old ones."""
        pose = self.camera_to_world.copy()
        pose[:3, 3] = (pose[:3, 3] - middle) * scale
        return replace(self, camera_to_world=pose, depth=None if self.depth is None else self.depth * np.float32(scale))

    def aimed(self, aim: np.ndarray) -> "Photograph":
        """The same with its principal point moved to `aim` (x right, y up, focal lengths)."""
        fx, fy, cx, cy = self.lens
        return replace(self, lens=(fx, fy, cx + aim[0] * fx, cy - aim[1] * fy))


def distort(xy: Tensor, distortion: tuple[float, ...]) -> Tensor:
    """Where a lens puts what a pinhole puts at xy [...,2] (focal lengths, y down): OpenCV's radial and tangential
    model."""
    k1, k2, k3, k4, p1, p2 = distortion
    x, y = xy.unbind(-1)
    r2 = x * x + y * y
    radial = 1 + r2 * (k1 + r2 * (k2 + r2 * (k3 + r2 * k4)))
    return torch.stack([x * radial + 2 * p1 * x * y + p2 * (r2 + 2 * x * x),
                        y * radial + p1 * (r2 + 2 * y * y) + 2 * p2 * x * y], -1)


def undistort(xy: np.ndarray, distortion: tuple[float, ...]) -> np.ndarray:
    """The inverse of `distort`, xy [P,2] float64, by fixed-point steps. ValueError where they do not settle: the
    distortion is too strong for its model."""
    if not any(distortion):
        return xy
    wanted = torch.from_numpy(xy)
    found = wanted.clone()
    for _ in range(30):
        found = found + (wanted - distort(found, distortion))
    if not bool(((distort(found, distortion) - wanted).abs() < 1e-4).all()):
        raise ValueError("distortion must be small enough to be undone over the whole object, got k1, k2, k3, k4, p1, "
                         f"p2 = {', '.join(f'{k:g}' for k in distortion)}: undistort the pictures first")
    return found.numpy()


def read_photograph(files: PictureFiles, name: str, frame: Frame | np.ndarray, size: int, *, depth: str | None = None,
                    depth_scale: float = 1.0, mask: str | None = None, fov: float | None = None) -> Photograph:
    """Reads the picture `name`: `frame` of a transforms.json, or a pose [4,4] with a `fov` (degrees, longer side).

    Pictures much larger than a view of `size` pixels needs are reduced. depth, mask: names of files that belong to it;
    a step of the depth map is `depth_scale` world units. Without an alpha channel or mask the background is keyed out.
    ValueError, naming the file, for what cannot be read, shows nothing or has no plain background.
    """
    posed = isinstance(frame, Frame)
    told = frame.lens.size if posed and None not in frame.lens.size else None
    image = decode_picture(name, files.read(name), told, upright=not posed)
    width, height = image.size
    if posed:
        lens = frame.lens.pinhole(width, height)
    else:
        focal = max(width, height) / 2 / math.tan(math.radians(fov) / 2)
        lens = focal, focal, width / 2, height / 2
    shrink = min(1.0, max(1024, 2 * size) / max(width, height))
    if shrink < 1:
        image = image.resize((max(1, round(width * shrink)), max(1, round(height * shrink))), Image.Resampling.BOX)
        lens = tuple(number * image.size[k % 2] / (width, height)[k % 2] for k, number in enumerate(lens))
    pixels = np.array(image)
    if mask is not None:
        covered = decode_picture(mask, files.read(mask)).convert("L").resize(image.size, Image.Resampling.BOX)
        pixels[..., 3] = np.minimum(pixels[..., 3], np.asarray(covered))
    if pixels[..., 3].min() >= SOLID:
        pixels = _keyed(name, pixels)
    solid = pixels[..., 3] >= SOLID
    if not solid.any():
        raise ValueError(f"{name} must show the object, got a picture that is transparent everywhere")
    edge = bool(solid[0].any() or solid[-1].any() or solid[:, 0].any() or solid[:, -1].any())
    pixels, corner = _cropped(pixels, pixels[..., 3] > 0)
    photograph = Photograph(name, pixels, corner, image.size, frame.camera_to_world if posed else frame, lens,
                            frame.lens.distortion if posed else (0.0,) * 6, cut=edge)
    return photograph if depth is None else _with_depth(photograph, files, depth, depth_scale)


def _keyed(name: str, pixels: np.ndarray) -> np.ndarray:
    picture = torch.from_numpy(pixels[..., :3].copy()).permute(2, 0, 1)[None].float() / 255
    try:
        view = views_from_pictures(picture, key_background(picture))
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
    colors = (view.views / view.masks.clamp_min(1e-3)).clamp(0, 1)
    return (torch.cat([colors, view.masks], 1)[0] * 255).round().byte().permute(1, 2, 0).numpy()


def _with_depth(photograph: Photograph, files: PictureFiles, name: str, scale: float) -> Photograph:
    """The photograph with its depth map, of whatever size, but of the picture's shape."""
    whole = photograph.whole
    steps = decode_depth(name, files.read(name))
    height, width = steps.shape
    if abs(width * whole[1] / (height * whole[0]) - 1) > 0.02:
        raise ValueError(f"{name} must have the shape of {photograph.name}, {whole[0]} x {whole[1]}, got {width} x "
                         f"{height}")
    ratio = width / whole[0], height / whole[1]
    low = [int(photograph.corner[k] * ratio[k]) for k in (0, 1)]
    high = [math.ceil((photograph.corner[k] + photograph.pixels.shape[1 - k]) * ratio[k]) for k in (0, 1)]
    inside = np.zeros(steps.shape, bool)
    inside[low[1]:high[1], low[0]:high[0]] = True
    steps, corner = _cropped(steps, inside)
    lens = tuple(number * ratio[k % 2] for k, number in enumerate(photograph.lens))
    return replace(photograph, depth=steps * np.float32(scale), depth_lens=lens, depth_corner=corner)


def _cropped(values: np.ndarray, wanted: np.ndarray) -> tuple[np.ndarray, tuple[int, int]]:
    """values [H,W,...] cut to the box of what is `wanted` [H,W] and a pixel around it; its corner (x, y)."""
    rows, columns = np.flatnonzero(wanted.any(1)), np.flatnonzero(wanted.any(0))
    top, left = max(0, rows[0] - 1), max(0, columns[0] - 1)
    return values[top:rows[-1] + 2, left:columns[-1] + 2].copy(), (int(left), int(top))
