"""One picture as it was taken: read, freed of its background, cropped to its object, with its lens and its camera."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageChops
from torch import Tensor

from coser.picture_files import PictureFiles, decode_depth, decode_picture
from coser.reconstruction.keying import key_background, views_from_pictures
from coser.transforms import Frame

SOLID = 128  # of 255; where a mask is at least that, the object is
KEYED = 512  # pixels a side; backgrounds are keyed out at this size
ENOUGH = 1.5  # an object's pixels a side, of a view's
SAME_MASK = 0.9  # intersection over union of two keyings of one picture that found the same object
AIR = 0.15  # of the object's size: background left around it to be keyed


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
    corner: tuple[float, float]
    whole: tuple[float, float]
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
    try:
        lens = frame.lens.pinhole(*image.size) if posed else _plain_lens(image.size, fov)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
    if mask is not None:
        covered = decode_picture(mask, files.read(mask))
        covered = ImageChops.multiply(covered.convert("L"), covered.getchannel("A"))
        covered = covered.resize(image.size, Image.Resampling.BOX)
        image.putalpha(Image.fromarray(np.minimum(image.getchannel("A"), covered)))
    opaque = image.getchannel("A").getextrema()[0] >= SOLID
    small = _keyed(name, _reduced(image, KEYED)) if opaque else image
    alpha = np.asarray(small.getchannel("A"))
    solid = alpha >= SOLID
    if not solid.any():
        raise ValueError(f"{name} must show the object, got a picture that is "
                         f"{'nothing but background' if opaque else 'transparent everywhere'}")
    edge = bool(solid[0].any() or solid[-1].any() or solid[:, 0].any() or solid[:, -1].any())
    box = _box(alpha > 0, [side / reduced for side, reduced in zip(image.size, small.size)], AIR if opaque else 0.0)
    crop = (small if small.size == image.size else image).crop(box)
    crop = _reduced(crop, max(KEYED, math.ceil(ENOUGH * size)))
    if opaque and small.size != image.size:
        corners = [corner / side * reduced for corner, side, reduced in zip(box, image.size * 2, small.size * 2)]
        crop = _keyed(name, crop, small.getchannel("A").resize(crop.size, Image.Resampling.BILINEAR, corners))
    if crop.getchannel("A").getextrema()[1] < SOLID:
        raise ValueError(f"{name} must show something that is wider than a pixel where the picture is "
                         f"{max(crop.size)} pixels long, got thinner lines alone")
    ratio = crop.width / (box[2] - box[0]), crop.height / (box[3] - box[1])

    def scaled(numbers: tuple) -> tuple:
        return tuple(number * ratio[k % 2] for k, number in enumerate(numbers))

    photograph = Photograph(name, np.array(crop), scaled(box[:2]), scaled(image.size),
                            frame.camera_to_world if posed else frame, scaled(lens),
                            frame.lens.distortion if posed else (0.0,) * 6, cut=edge)
    return photograph if depth is None else _with_depth(photograph, files, depth, depth_scale)


def _plain_lens(size: tuple[int, int], fov: float) -> tuple[float, float, float, float]:
    focal = max(size) / 2 / math.tan(math.radians(fov) / 2)
    return focal, focal, size[0] / 2, size[1] / 2


def _reduced(image: Image.Image, longest: int) -> Image.Image:
    """The picture with at most `longest` pixels on its longer side."""
    scale = longest / max(image.size)
    if scale >= 1:
        return image
    return image.resize(tuple(max(1, round(side * scale)) for side in image.size), Image.Resampling.BOX)


def _box(wanted: np.ndarray, scale: list[float], air: float) -> tuple[int, int, int, int]:
    """left, top, right, bottom of what is `wanted` [h,w], with a pixel and `air` (of its longer side) around it, in
    pixels of a picture `scale` (x, y) times as large."""
    rows, columns = np.flatnonzero(wanted.any(1)), np.flatnonzero(wanted.any(0))
    more = 1 + round(air * max(rows[-1] - rows[0], columns[-1] - columns[0]))
    left, top = max(0, columns[0] - more), max(0, rows[0] - more)
    right, bottom = min(wanted.shape[1], columns[-1] + 1 + more), min(wanted.shape[0], rows[-1] + 1 + more)
    return round(left * scale[0]), round(top * scale[1]), round(right * scale[0]), round(bottom * scale[1])


def _keyed(name: str, image: Image.Image, before: Image.Image | None = None) -> Image.Image:
    """The picture with its background keyed out of a version of at most KEYED pixels a side.

    before: the mask [0..255] that a coarser keying found. It stays where a finer one finds another: noise that was
    averaged there hides a faint object here.
    """
    def tensor(picture: Image.Image) -> Tensor:
        return torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1)[None].float() / 255

    try:
        masks = key_background(tensor(_reduced(image, KEYED)))
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
    masks = F.interpolate(masks, image.size[::-1], mode="bilinear").clamp(0, 1)
    if before is not None:
        coarse = torch.from_numpy(np.array(before))[None, None].float() / 255
        both, either = (torch.logical_and, torch.logical_or)
        inside = masks >= 0.5, coarse >= 0.5
        if both(*inside).sum() < SAME_MASK * either(*inside).sum():
            masks = coarse
    view = views_from_pictures(tensor(image), masks)
    colors = (view.views / view.masks.clamp_min(1e-3)).clamp(0, 1)
    return Image.fromarray((torch.cat([colors, masks], 1)[0] * 255).round().byte().permute(1, 2, 0).numpy())


def _with_depth(photograph: Photograph, files: PictureFiles, name: str, scale: float) -> Photograph:
    """The photograph with its depth map, of whatever size, but of the picture's shape."""
    whole = photograph.whole
    steps = decode_depth(name, files.read(name))
    height, width = steps.shape
    if abs(width * whole[1] / (height * whole[0]) - 1) > 0.02:
        raise ValueError(f"{name} must have the shape of {photograph.name}, {whole[0]:.0f} x {whole[1]:.0f}, got "
                         f"{width} x {height}")
    ratio = width / whole[0], height / whole[1]
    left, top = (max(0, int(photograph.corner[k] * ratio[k]) - 1) for k in (0, 1))
    right, bottom = (math.ceil((photograph.corner[k] + photograph.pixels.shape[1 - k]) * ratio[k]) + 1 for k in (0, 1))
    lens = tuple(number * ratio[k % 2] for k, number in enumerate(photograph.lens))
    return replace(photograph, depth=steps[top:bottom, left:right] * np.float32(scale), depth_lens=lens,
                   depth_corner=(left, top))
