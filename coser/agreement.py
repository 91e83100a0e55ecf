"""How well a ring of views agrees with itself in three dimensions: figures without a reference, for CPU.

All take the N views of a closed ring (view 0 is the neighbour of view N-1) and their cameras. A figure means something
beside that of true renders (what the measure itself loses) and of `shuffled_ring` (what views of the same object give
by chance).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from coser.cameras import Cameras, pixel_centers
from coser.metrics import psnr, render_mesh, silhouette_iou, ssim
from coser.reconstruction import QUICK, Mesh, reconstruct
from coser.reconstruction.maps import pixel_size, surface_points
from coser.surface_metrics import sample_surface, surface_distances
from coser.views import ViewSet

HULL_RADIUS = 1.3  # of the sphere in which hulls are looked for; objects lie in the unit sphere, hulls are larger
COARSE, FINE = 32, 10  # depths a ray, and depths a coarse one where it may touch the hull


@dataclass(frozen=True)
class CrossRender:
    """The even views against the odd ones: psnr [N // 2], decibels on white of views 1, 3, 5, ... against the mesh of
    the even ones; chamfer, symmetric Chamfer distance of the two halves' meshes, in the object's radius."""

    psnr: Tensor
    chamfer: float


def cross_render(views: ViewSet, cameras: Cameras, **options) -> CrossRender:
    """The mesh of the even views against the odd views, and against their mesh; `options` go to `reconstruct`.

    Raises ValueError for fewer than 4 views, and where either half shows no surface.
    """
    mesh = _half_mesh(views, cameras, 0, options)
    return CrossRender(_odd_psnr(mesh, views, cameras), chamfer_distance(mesh, _half_mesh(views, cameras, 1, options)))


def cross_render_psnr(views: ViewSet, cameras: Cameras, **options) -> Tensor:
    """`cross_render` without the Chamfer distance, in half the time: decibels of views 1, 3, 5, ..., [N // 2].

    The lowest one contradicts the others most.
    """
    return _odd_psnr(_half_mesh(views, cameras, 0, options), views, cameras)


def held_out_rerender(views: ViewSet, cameras: Cameras, every: int = 4, **options) -> tuple[Tensor, Tensor]:
    """The mesh of all but views 1, 1 + every, ..., rendered at those: psnr (decibels) and ssim [H], on white.

    `options` go to `reconstruct`. Raises ValueError for fewer than 2 views, for `every` below 2, and where the other
    views show no surface.
    """
    check_ring(views, cameras, 2, "hold one out")
    if every < 2:
        raise ValueError(f"every must be at least 2 to leave views to reconstruct from, got {every}")
    held = torch.arange(len(views)) % every == 1
    mesh = reconstruct(views[~held], cameras[~held], **(QUICK | options))
    pictures = _pictures(mesh, views, cameras, held)
    return psnr(*pictures), ssim(*pictures)


def chamfer_distance(mesh: Mesh, other: Mesh, samples: int = 20_000, seed: int = 0) -> float:
    """Symmetric Chamfer distance: the mean of both surfaces' mean distance to the other, in world units.

    From `samples` points on each, drawn evenly over its area; distances are to the triangles, not to points drawn on
    them, so that equal surfaces are nearly 0 apart however they are cut into triangles.
    """
    (points, faces), (other_points, other_faces) = (sample_surface(m, samples, seed) for m in (mesh, other))
    there, _ = surface_distances(points, other, other_points, other_faces)
    back, _ = surface_distances(other_points, mesh, points, faces)
    return float(there.mean() + back.mean()) / 2


def leave_one_out_hull_iou(views: ViewSet, cameras: Cameras, resolution: int = 96) -> Tensor:
    """IoU [N] of each view's silhouette with that of the visual hull of all other silhouettes (Laurentini 1994).

    Silhouettes are where coverage is at least 0.5. They are compared at resolution x resolution points of the picture.
    Whether the hull covers such a point is asked along its ray in steps below a pixel, not of a grid of voxels, which
    would lose what is thinner than a voxel (image-based visual hulls: Matusik et al. 2000). A hull is larger than its
    object, the more so the fewer views there are. Raises ValueError for fewer than 2 views, and where none shows
    anything.
    """
    check_ring(views, cameras, 2, "leave one out")
    masks, cameras = views.masks.float().cpu(), cameras.to("cpu")
    if not (masks >= 0.5).any():
        raise ValueError("views show nothing: no pixel has a mask of at least 0.5")
    uv = pixel_centers(resolution)
    own = F.grid_sample(masks, uv.expand(len(views), 1, -1, -1) * 2 - 1, align_corners=False)[:, 0, 0] >= 0.5
    distances = cameras.centers.norm(dim=-1)
    step = 2 * HULL_RADIUS / COARSE
    # how far, in pixels of any view, a point may lie from the nearest coarse one of its ray
    reach = 0.5 * step * 1.2 / float(pixel_size(cameras, masks.shape[-1], distances.min() - HULL_RADIUS))
    wide = 2 * math.ceil(reach + 0.5) + 1
    nearby = F.max_pool2d(F.max_pool2d(masks, (wide, 1), 1, (wide // 2, 0)), (1, wide), 1, (0, wide // 2)) >= 0.5
    covered = torch.stack([_hull_covers(i, uv, masks, nearby, cameras) for i in range(len(views))])
    shape = (len(views), 1, resolution, resolution)
    return silhouette_iou(covered.reshape(shape).float(), own.reshape(shape).float())


def neighbour_depth_agreement(views: ViewSet, cameras: Cameras, tolerance: float = 0.02) -> Tensor:
    """The share [N] of what view i and its neighbour i + 1 show that the other of the two does not contradict.

    Every pixel of the surface is carried into the other view by its depth. It is contradicted where it lands on
    nothing, or more than `tolerance` (world units) in front of what is seen there; it may be hidden behind something.
    The nearest of the four pixels around the landing point counts; what lands outside the picture does not. 0 where a
    pair shows nothing. Raises ValueError for fewer than 2 views, and for views without depth.
    """
    check_ring(views, cameras, 2, "compare neighbours")
    views, cameras = views.to("cpu", torch.float32), cameras.to("cpu")
    points, shown = surface_points(views, cameras)
    if not shown.any():
        raise ValueError("views have no depth: no pixel has a mask of at least 0.5 and a depth")
    depths = torch.where(shown.view_as(views.depths), views.depths, torch.inf)
    nearest = -F.max_pool2d(-F.pad(depths, (1, 1, 1, 1), value=torch.inf), 2, 1)[:, 0]  # of the 4 around each corner
    shares = []
    for i in range(len(views)):
        j = (i + 1) % len(views)
        fates = [_uncontradicted(points[a][shown[a]], nearest[b], cameras[b], tolerance) for a, b in ((i, j), (j, i))]
        shares.append(torch.cat(fates).float().sum() / max(1, sum(map(len, fates))))
    return torch.stack(shares)


def neighbour_color_psnr(views: ViewSet, truth: ViewSet, cameras: Cameras, tolerance: float = 0.02) -> float:
    """How alike views i and i + 1 paint the same places of the true surface: PSNR in decibels over all of them.

    Every pixel of the true surface is carried into the next view by its true depth, and counts where that one truly
    sees it (within `tolerance`, world units); pixels that the background shares in do not. Needs no mesh of the views,
    so it also measures views that are far from finished. Raises ValueError for fewer than 2 views, and where no place
    is seen twice.
    """
    check_ring(views, cameras, 2, "compare neighbours")
    points, shown = surface_points(truth, cameras)
    pictures, squares = views.on_background().float(), []
    size = pictures.shape[-1]
    for i in range(len(views)):
        j = (i + 1) % len(views)
        uv, depth = (t[0] for t in cameras[j:j + 1].project(points[i][shown[i]]))
        grid = (uv * 2 - 1)[None, None]
        there = F.grid_sample(truth.depths[j:j + 1].float(), grid, mode="nearest", align_corners=False)[0, 0, 0]
        inside = F.grid_sample(truth.masks[j:j + 1].float(), grid, align_corners=False)[0, 0, 0]
        inside = torch.minimum(inside, truth.masks[i].flatten()[shown[i].flatten()])
        seen = ((there - depth).abs() < tolerance) & (inside > 0.99)
        color = F.grid_sample(pictures[j:j + 1], grid, align_corners=False)[0, :, 0].T
        own = pictures[i].flatten(1).T[shown[i].flatten()]
        squares.append((color - own)[seen].square().mean(-1))
    errors = torch.cat(squares)
    if not len(errors):
        raise ValueError(f"views of {size} pixels share no place of the true surface")
    return float(-10 * errors.mean().clamp_min(1e-10).log10())


def shuffled_ring(views: ViewSet, seed: int = 0) -> ViewSet:
    """The same views in a random order: none in its own place, and not just the ring turned. What chance gives.

    Raises ValueError for fewer than 4 views, which have no such order.
    """
    count = len(views)
    if count < 4:
        raise ValueError(f"views must be at least 4 to be shuffled without turning the ring, got {count}")
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(count, generator=generator)
        turned_by = (order - torch.arange(count)) % count
        if turned_by.all() and (turned_by != turned_by[0]).any():
            return views[order.to(views.views.device)]


def check_ring(views: ViewSet, cameras: Cameras, least: int, purpose: str) -> None:
    """Raises ValueError where there are fewer than `least` views, or cameras for other than these."""
    if len(views) != len(cameras):
        raise ValueError(f"cameras must be as many as the views ({len(views)}), got {len(cameras)}")
    if len(views) < least:
        raise ValueError(f"views must be at least {least} to {purpose}, got {len(views)}")


def _half_mesh(views: ViewSet, cameras: Cameras, first: int, options: dict) -> Mesh:
    check_ring(views, cameras, 4, "set odd against even ones")
    half = slice(first, None, 2)
    return reconstruct(views[half], cameras[half], **(QUICK | options))


def _odd_psnr(mesh: Mesh, views: ViewSet, cameras: Cameras) -> Tensor:
    return psnr(*_pictures(mesh, views, cameras, slice(1, None, 2)))


def _pictures(mesh: Mesh, views: ViewSet, cameras: Cameras, which) -> tuple[Tensor, Tensor]:
    """The mesh at some of the cameras, and those views, on white."""
    seen = render_mesh(mesh, cameras[which], views.views.shape[-1])
    return seen.on_background(), views[which].on_background().float().cpu()


def _hull_covers(view: int, uv: Tensor, masks: Tensor, nearby: Tensor, cameras: Cameras) -> Tensor:
    """Whether the hull of all other silhouettes covers the points uv [P,2] of a view's picture, [P] bool."""
    axes = cameras.camera_to_world[:, :3, 2]
    others = [j for j in (axes @ axes[view]).abs().argsort().tolist() if j != view]  # from the side: they say most
    origins, directions = (t[0] for t in cameras[view].rays(uv))
    start, step = cameras.centers[view].norm() - HULL_RADIUS, 2 * HULL_RADIUS / COARSE
    depths = (start + (torch.arange(COARSE) + 0.5) * step).expand(len(uv), -1).reshape(-1)
    rays = torch.arange(len(uv)).repeat_interleave(COARSE)

    def kept(rays: Tensor, depths: Tensor, says) -> tuple[Tensor, Tensor]:
        for j in others:
            seen_at, _ = cameras[j].project(origins[rays] + depths[:, None] * directions[rays])
            inside = says(j, seen_at[0])
            rays, depths = rays[inside], depths[inside]
        return rays, depths

    def may_lie_inside(j: int, at: Tensor) -> Tensor:
        column, row = (at * masks.shape[-1]).floor().long().unbind(-1)
        size = masks.shape[-1]
        index = row.clamp(0, size - 1) * size + column.clamp(0, size - 1)
        return nearby[j].reshape(-1)[index]

    def lies_inside(j: int, at: Tensor) -> Tensor:
        return F.grid_sample(masks[j:j + 1], at[None, None] * 2 - 1, align_corners=False)[0, 0, 0] >= 0.5

    rays, depths = kept(rays, depths, may_lie_inside)
    covered = torch.zeros(len(uv), dtype=torch.bool)
    covered[kept(rays, depths, lies_inside)[0]] = True
    open_ = ~covered[rays]
    between = ((torch.arange(FINE) + 0.5) / FINE - 0.5) * step
    rays, depths = rays[open_].repeat_interleave(FINE), (depths[open_, None] + between).reshape(-1)
    covered[kept(rays, depths, lies_inside)[0]] = True
    return covered


def _uncontradicted(points: Tensor, nearest: Tensor, camera: Cameras, tolerance: float) -> Tensor:
    """Of points [P,3] that land in the picture of a camera, whether they lie on or behind what it sees: bool.

    nearest [S+1,S+1]: the least depth of the four pixels around each pixel's corner, infinite where there is nothing.
    """
    uv, depth = (t[0] for t in camera.project(points))
    lands = ((uv >= 0) & (uv < 1)).all(-1) & (depth > 0)
    column, row = (uv[lands] * (len(nearest) - 1) + 0.5).long().unbind(-1)
    return depth[lands] >= nearest[row, column] - tolerance
