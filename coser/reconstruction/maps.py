"""What single views know: silhouettes finer than a pixel, and depth maps as small planes."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from coser.cameras import Cameras, pixel_centers
from coser.views import ViewSet

REACH = 4  # pixels; silhouette distances are exact up to here


@dataclass(frozen=True)
class ViewMaps:
    """What each pixel of N views knows about the surface it sees.

    silhouettes [N,S,S]: signed distance to the silhouette, pixels, positive outside. nearness [N,S,S]: 1 / depth, 0 =
    nothing; it is linear along a plane, and slopes [N,2,S,S] are its derivatives a pixel to the right and down.
    cosines [N,S,S]: between the pixel's ray and the surface's normal, times the ray's length for a unit of depth, so
    that (depth difference) * cosine = distance from the plane; 0 = nothing. normals [N,3,S,S]: of the surface, towards
    the camera, in the world.
    """

    silhouettes: Tensor
    nearness: Tensor
    slopes: Tensor
    cosines: Tensor
    normals: Tensor


def view_maps(views: ViewSet, cameras: Cameras) -> ViewMaps:
    """The ViewMaps of N views; pixels covered by less than half continue their neighbours' surface."""
    masks, depths = views.masks[:, 0], views.depths[:, 0]
    valid = (depths > 0) & (masks >= 0.5)
    nearness = torch.where(valid, 1 / depths.clamp_min(1e-6), 0.0)
    maps = torch.stack([nearness, *_slopes(nearness, valid)], 1)
    for _ in range(2):  # silhouettes are finer than pixels: the surface must reach a little beyond the covered ones
        count = F.avg_pool2d(valid[:, None].float(), 3, 1, 1)
        mean = F.avg_pool2d(maps * valid[:, None], 3, 1, 1) / count.clamp_min(1e-6)
        maps = torch.where(valid[:, None], maps, mean)
        valid = valid | (count[:, 0] > 0)
    nearness, slopes = maps[:, 0], maps[:, 1:]
    size = nearness.shape[-1]
    x, y = ((pixel_centers(size, nearness.device) * 2 - 1) / cameras.focal).T.reshape(2, size, size)
    gx, gy = (slopes * (size * cameras.focal / 2)).unbind(1)  # a pixel => a unit of the picture plane at depth 1
    normals = torch.stack([-gx, gy, nearness - gx * x - gy * y], 1)  # of the plane, in the camera's axes
    steep = normals.square().sum(1).sqrt().clamp_min(1e-9)  # `norm` takes 145 ms for 12 views here, this 2
    normals = torch.einsum("ncij,ncw->nwij", normals / steep[:, None], cameras.rotations)
    return ViewMaps(silhouette_distances(masks), nearness, slopes, torch.where(valid, nearness / steep, 0.0), normals)


def surface_points(views: ViewSet, cameras: Cameras) -> tuple[Tensor, Tensor]:
    """All pixels' points [N,S*S,3], and which of them are of the surface [N,S*S]."""
    n, _, size, _ = views.views.shape
    points = cameras.unproject(pixel_centers(size, views.views.device), views.depths.reshape(n, -1))
    return points, ((views.masks >= 0.5) & (views.depths > 0)).reshape(n, -1)


def silhouette_distances(masks: Tensor, reach: int = REACH) -> Tensor:
    """Coverage [N,S,S] in [0,1] => signed distances to the silhouette in pixels, positive outside, within +-reach.

    A pixel covered by a part m lies 0.5 - m from the edge, which makes the result finer than a pixel: each pixel takes
    the smallest (its way to another pixel) + (that pixel's way to the edge).
    """
    n, h, w = masks.shape
    padded = F.pad(masks[:, None], (reach,) * 4, mode="replicate")[:, 0]  # beyond the picture nobody knows better
    outside = torch.where(padded > 0, 0.5 - padded, 2.0 * reach)
    inside = torch.where(padded < 1, padded - 0.5, 2.0 * reach)
    to_object, to_air = torch.full_like(masks, reach), torch.full_like(masks, reach)
    for dy in range(-reach, reach + 1):
        for dx in range(-reach, reach + 1):
            way = math.hypot(dy, dx)
            if way <= reach:
                window = (slice(None), slice(reach + dy, reach + dy + h), slice(reach + dx, reach + dx + w))
                to_object = torch.minimum(to_object, outside[window] + way)
                to_air = torch.minimum(to_air, inside[window] + way)
    return torch.where(masks < 0.5, to_object, -to_air)


def pixel_size(cameras: Cameras, size: int, depth: Tensor) -> Tensor:
    """The side (world units) of a pixel of a picture of `size` pixels a side at these depths."""
    return depth * (2 / (cameras.focal * size))


def _slopes(values: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    """Derivatives a pixel of `values` [N,S,S] to the right and down: the smaller of both neighbours' differences, so
    that a step in depth beside a pixel does not tilt it."""
    slopes = []
    for dim in (2, 1):
        length = values.shape[dim] - 1
        both = valid.narrow(dim, 1, length) & valid.narrow(dim, 0, length)
        step = torch.where(both, values.diff(dim=dim), torch.inf)
        end = torch.full_like(values.narrow(dim, 0, 1), torch.inf)
        ahead, back = torch.cat([step, end], dim), torch.cat([end, step], dim)
        slope = torch.where(ahead.abs() < back.abs(), ahead, back)
        slopes.append(torch.where(slope.isinf(), 0.0, slope))
    return tuple(slopes)
