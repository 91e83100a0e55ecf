"""From posed views to an asset: fuse the depth maps, simplify the surface, colour it."""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F

from coser.cameras import Cameras
from coser.rasterizer import rasterize
from coser.reconstruction.color import color_vertices
from coser.reconstruction.consensus import fuse_consensus
from coser.reconstruction.fuse import fuse
from coser.reconstruction.mesh import Mesh, keep_parts, save_glb, simplify, with_normals
from coser.views import ViewSet

__all__ = ["Mesh", "reconstruct", "save_glb"]

SPECK = 4.0  # voxels; parts that span less are noise
# Mean IoU of a mesh with the views it was made of. Views of a real object give .97 and more.
CONTRADICTION = 0.93
CHECKED_SIZE = 64  # pixels; contradictions worth a second fusion are larger than a pixel of this picture
TOLERANCE = 1.5  # voxels; how far a view's depth usually lies from the surface


def reconstruct(views: ViewSet, cameras: Cameras, *, resolution: int = 128, max_faces: int = 20_000) -> Mesh:
    """Posed views with depth, generated, rendered or photographed => one closed, coloured mesh.

    Where carving by every view leaves a mesh that does not look like its own views, they contradict each other, and
    what they agree on at large is made instead if that fits them better.

    views: N >= 1 square views; cameras: their N perspective cameras. resolution: the fusion grid holds at most
    resolution^3 cells. max_faces: the budget of triangles (passed over only where keeping it would tear the surface).
    Raises ValueError when the views and cameras do not belong together or the views show nothing.
    """
    height, width = views.views.shape[2:]
    if len(views) != len(cameras):
        raise ValueError(f"cameras must be as many as the views ({len(views)}), got {len(cameras)}")
    if height != width:
        raise ValueError(f"views must be square, got {height} x {width}")
    if cameras.orthographic:
        raise ValueError("cameras must be perspective to reconstruct, got orthographic ones")
    if not 8 <= resolution <= 512:
        raise ValueError(f"resolution must lie between 8 and 512, got {resolution}")
    views, cameras = views.to(dtype=cameras.camera_to_world.dtype), cameras.to(views.views.device)
    shown = ((views.masks >= 0.5) & (views.depths > 0)).flatten(1).any(1)
    if not shown.any():
        raise ValueError("views show nothing: no pixel has a mask of at least 0.5 and a depth")
    views, cameras = views[shown], cameras[shown]  # an empty view has failed: it would carve everything away
    mesh, voxel = _carved_or_agreed(views, cameras, resolution, max_faces)
    return with_normals(replace(mesh, vertex_colors=color_vertices(mesh, views, cameras, TOLERANCE * voxel)))


def _carved_or_agreed(views: ViewSet, cameras: Cameras, resolution: int, max_faces: int) -> tuple[Mesh, float]:
    """The tidy mesh without colours, and the voxel's side of the grid it comes from."""
    best, error = None, None
    for method, side in ((fuse, resolution), (fuse_consensus, max(8, resolution // 2))):  # the second is smooth
        try:
            vertices, faces, voxel = method(views, cameras, side)
        except ValueError as nothing_found:
            error = error or nothing_found
            continue
        mesh = simplify(keep_parts(Mesh(vertices, faces), SPECK * voxel), max_faces)
        fit = _fit(mesh, views, cameras)
        if best is None or fit > best[0]:
            best = fit, mesh, voxel
        if best[0] >= CONTRADICTION:
            break
    if best is None:
        raise error
    return best[1:]


def _fit(mesh: Mesh, views: ViewSet, cameras: Cameras) -> float:
    """Mean IoU of the mesh's silhouettes with the views', in small pictures."""
    vertices, faces = torch.from_numpy(mesh.vertices), torch.from_numpy(mesh.faces)
    seen = rasterize(vertices, faces, cameras.to("cpu"), CHECKED_SIZE).faces >= 0
    masks = F.interpolate(views.masks.cpu(), (CHECKED_SIZE, CHECKED_SIZE), mode="area")[:, 0] >= 0.5
    union = (seen | masks).sum((1, 2)).clamp_min(1)
    return float(((seen & masks).sum((1, 2)) / union).mean())
