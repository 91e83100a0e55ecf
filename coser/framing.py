"""Photographs by any lens, of any shape and aimed anywhere => square views of one fov around an object of unit size.

The object's middle is where the sight lines through the middles of its silhouettes meet, by least squares; its radius
is the largest distance of that point from a sight line of a silhouette's rim. Turning a camera on the spot and
exchanging its lens changes no sight line, so views lose nothing but pixels.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from coser.cameras import Cameras
from coser.photographs import Photograph, distort
from coser.reconstruction.hull import visual_hull
from coser.reconstruction.likeness import silhouette_likeness
from coser.views import ViewSet

FINER = 2.0  # a photograph may be as much finer than its view
SAME_DEPTH = 0.03  # neighbours in a depth map that differ by less (of their depth) lie on one surface
SPREAD = 1e-4  # least variance of the sight lines' directions: about half a degree of turn
CHECKED_SIZE = 64  # pixels; cameras that do not belong to pictures show in pictures of this size
CHECKED_CELLS = 48
CAUTION = 1.05  # fov is that much larger than the silhouettes need


def meeting_point(photographs: list[Photograph]) -> tuple[np.ndarray, float]:
    """=> the object's middle [3] float64 and its radius, world units.

    ValueError when the cameras stand in one place or look the same way, so that no depth can be told, and when one
    looks away from the middle.
    """
    rims = [photograph.rim() for photograph in photographs]
    middles = np.stack([(rim.max(0) + rim.min(0)) / 2 for rim in rims])
    poses = np.stack([photograph.camera_to_world for photograph in photographs])
    rotations, centers = poses[:, :3, :3], poses[:, :3, 3]
    whole = np.array([not photograph.cut for photograph in photographs])
    use = whole if whole.sum() >= 3 else np.ones(len(whole), bool)
    if np.ptp(centers, 0).max() <= 1e-6 * np.abs(centers).max():
        raise ValueError(f"cameras must see the object from different sides, got {len(photographs)} in one place")
    rays = np.einsum("nij,nj->ni", rotations, middles / np.linalg.norm(middles, axis=-1, keepdims=True))
    across = np.eye(3) - rays[:, :, None] * rays[:, None]
    if np.linalg.eigvalsh(across[use].mean(0))[0] < SPREAD:
        raise ValueError(f"cameras must see the object from different sides, got {len(photographs)} that look the same "
                         "way")
    middle = np.linalg.solve(across[use].sum(0), np.einsum("nij,nj->i", across[use], centers[use]))
    ahead = np.einsum("ni,ni->n", middle - centers, rays)
    if (ahead <= 0).any():
        worst = photographs[int(ahead.argmin())].name
        raise ValueError(f"cameras must look at one object, got one that looks away from where the others do: {worst}")
    return middle, max(_miss(rim, pose, middle).max() for rim, pose in zip(rims, poses))


def agreement(masks: Tensor, cameras: Cameras) -> Tensor:
    """Silhouettes [N,1,S,S] and their cameras => how far each is that of the hull of all: intersection over union, [N].

    Near 1 where cameras belong to the pictures, all 0 where no hull is left.
    """
    masks = _shrunk(masks)
    try:
        vertices, faces, _ = visual_hull(masks, cameras, CHECKED_CELLS, floor=False)
    except ValueError:
        return torch.zeros(len(masks))
    return silhouette_likeness(vertices, faces, masks, cameras)


def _shrunk(masks: Tensor) -> Tensor:
    """Silhouettes [N,1,S,S] => [N,1,CHECKED_SIZE,CHECKED_SIZE]; what is thinner than a pixel there, an edge-on blade,
    is a pixel thick."""
    size = (CHECKED_SIZE, CHECKED_SIZE)
    area = F.interpolate(masks, size, mode="area")
    thin = F.adaptive_max_pool2d(masks, size) >= 0.5
    thin = thin & (F.max_pool2d((area >= 0.5).float(), 3, 1, 1) == 0)
    return torch.where(thin, 1.0, area)


def turns(photographs: list[Photograph], middle: np.ndarray) -> tuple[np.ndarray, float]:
    """=> rotations [N,3,3] from the views' cameras to the photographs', and half of the views' side in focal lengths.

    Cameras are turned towards `middle` only where that saves a tenth of the picture's side or more.
    """
    rims = [photograph.rim() for photograph in photographs]
    straight = max(np.abs(rim[:, :2]).max() for rim in rims)
    aimed, reach = [], 0.0
    for photograph, rim in zip(photographs, rims):
        pose = photograph.camera_to_world
        towards = pose[:3, :3].T @ (middle - pose[:3, 3])
        rotation = _turn_to(towards / np.linalg.norm(towards))
        seen = rim @ rotation
        reach = max(reach, np.abs(seen[:, :2] / -seen[:, 2:]).max() if (seen[:, 2] < 0).all() else np.inf)
        aimed.append(rotation)
    if reach < 0.9 * straight:
        return np.stack(aimed), CAUTION * reach
    return np.broadcast_to(np.eye(3), (len(rims), 3, 3)), CAUTION * straight


def view_of(photograph: Photograph, rotation: np.ndarray, reach: float, size: int) -> ViewSet:
    """One photograph => the view of `size` pixels a side of a square camera, turned by `rotation` [3,3] (its axes in
    the photograph's camera), half of whose side is `reach` focal lengths. Pixels that coincide stay what they are."""
    fx, fy, cx, cy = photograph.lens
    focal = size / 2 / reach
    grid = np.abs(np.array([fx / focal, fy / focal, 1, 1]) - 1).max() < 1e-5 and np.allclose(rotation, np.eye(3))
    at = np.array([size / 2 - cx, size / 2 - cy]) + photograph.corner
    if grid and not any(photograph.distortion) and np.abs(at - at.round()).max() < 1e-3:
        channels = _placed(_premultiplied(photograph.pixels), at.round().astype(int), size)
    else:
        ratio = max(fx, fy) / focal / FINER
        height, width = photograph.pixels.shape[:2]
        reduced = [max(1, round(side / max(1.0, ratio))) for side in (width, height)]
        pixels = np.asarray(Image.fromarray(photograph.pixels).resize(tuple(reduced), Image.Resampling.BOX))
        places = _places(photograph, photograph.lens, photograph.corner, rotation, reach, 2 * size)[0]
        places = places / torch.tensor([width, height]) * 2 - 1
        channels = F.grid_sample(_premultiplied(pixels)[None], places[None], align_corners=False)
        channels = F.avg_pool2d(channels, 2)[0].clamp(0, 1)
    depth = torch.zeros(1, size, size)
    if photograph.depth is not None:
        depth = torch.where(channels[3:] >= 0.5, _depth_of(photograph, rotation, reach, size), 0.0)
    return ViewSet(channels[None, :3], channels[None, 3:], depth[None])


def _premultiplied(pixels: np.ndarray) -> Tensor:
    """Straight uint8 [h,w,4] => float [4,h,w] in [0,1], colour premultiplied."""
    channels = torch.from_numpy(pixels.copy()).permute(2, 0, 1).float() / 255
    channels[:3] *= channels[3:]
    return channels


def _placed(channels: Tensor, corner: np.ndarray, size: int) -> Tensor:
    """Channels [C,h,w] whose top left pixel belongs at `corner` (x, y) of an empty picture [C,size,size]."""
    out = channels.new_zeros(len(channels), size, size)
    height, width = channels.shape[1:]
    (x, y), (left, top) = corner, np.maximum(corner, 0)
    right, bottom = min(size, x + width), min(size, y + height)
    if right > left and bottom > top:
        out[:, top:bottom, left:right] = channels[:, top - y:bottom - y, left - x:right - x]
    return out


def _places(photograph: Photograph, lens: tuple, corner: tuple, rotation: np.ndarray, reach: float,
            size: int) -> tuple[Tensor, Tensor]:
    """Where the pixels of a view lie in the crop, [size,size,2] (x, y, in its pixels), and how much further along the
    photograph's axis than along the view's what they see is [size,size]."""
    ticks = ((torch.arange(size) + 0.5) / size * 2 - 1) * reach
    y, x = torch.meshgrid(-ticks, ticks, indexing="ij")
    rays = torch.stack([x, y, -torch.ones_like(x)], -1) @ torch.from_numpy(np.array(rotation)).T.float()
    ahead = -rays[..., 2]
    xy = rays[..., :2] * torch.tensor([1.0, -1.0]) / ahead.clamp_min(1e-6)[..., None]
    seen = ahead > 1e-6
    if any(photograph.distortion):
        rim = np.abs(photograph.rim()[:, :2]).max()
        seen = seen & (xy.abs().amax(-1) < 1.1 * rim)  # further out the model may fold back
        xy = distort(xy, photograph.distortion)
    offset = [lens[2] - corner[0], lens[3] - corner[1]]
    places = xy * torch.tensor(lens[:2], dtype=xy.dtype) + torch.tensor(offset, dtype=xy.dtype)
    return torch.where(seen[..., None], places, -1e6), ahead


def _depth_of(photograph: Photograph, rotation: np.ndarray, reach: float, size: int) -> Tensor:
    """Depth map [1,size,size] of the view: between four depths of one surface their mean by nearness, else the
    nearest."""
    places, ahead = _places(photograph, photograph.depth_lens, photograph.depth_corner, rotation, reach, size)
    depth = torch.from_numpy(photograph.depth)[None, None]
    places = (places / torch.tensor([depth.shape[3], depth.shape[2]]) * 2 - 1)[None]
    low = -F.max_pool2d(F.pad(-depth, (0, 1, 0, 1), value=-torch.inf), 2, 1)
    high = F.max_pool2d(F.pad(depth, (0, 1, 0, 1), value=-torch.inf), 2, 1)
    near = F.grid_sample(depth, places, mode="nearest", align_corners=False)[0, 0]
    # the cell of four depths around a place is the one whose top left pixel is half a pixel up and left of it
    half = torch.tensor([1 / depth.shape[3], 1 / depth.shape[2]])
    low, high = (F.grid_sample(m, places - half, mode="nearest", align_corners=False)[0, 0] for m in (low, high))
    mean = F.grid_sample(depth, places, padding_mode="border", align_corners=False)[0, 0]
    smooth = (low > 0) & (high - low < SAME_DEPTH * low)
    return (torch.where(smooth, mean, near) / ahead.clamp_min(1e-6))[None]


def _miss(rays: np.ndarray, pose: np.ndarray, point: np.ndarray) -> np.ndarray:
    """Distances [P] of a world point from a camera's sight lines [P,3]."""
    local = pose[:3, :3].T @ (point - pose[:3, 3])
    return np.linalg.norm(np.cross(rays, local), axis=-1) / np.linalg.norm(rays, axis=-1)


def _turn_to(direction: np.ndarray) -> np.ndarray:
    """The rotation [3,3] by the least angle that takes (0, 0, -1) to a unit `direction` ahead of the camera."""
    axis, cosine = np.cross((0, 0, -1.0), direction), -direction[2]
    if cosine < -0.99:
        raise ValueError("cameras must look at the object, got one that has it behind it")
    cross = np.array([[0, -axis[2], axis[1]], [axis[2], 0, -axis[0]], [-axis[1], axis[0], 0]])
    return np.eye(3) + cross + cross @ cross / (1 + cosine)
