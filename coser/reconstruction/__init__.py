"""From posed views to an asset: fuse the depth maps, simplify the surface, colour it."""

from __future__ import annotations

from dataclasses import replace

from coser.cameras import Cameras
from coser.reconstruction.color import color_vertices
from coser.reconstruction.fuse import fuse
from coser.reconstruction.mesh import Mesh, keep_parts, save_glb, simplify, with_normals
from coser.views import ViewSet

__all__ = ["Mesh", "reconstruct", "save_glb"]

SPECK = 4.0  # voxels; parts that span less are noise
TOLERANCE = 1.5  # voxels; how far a view's depth usually lies from the surface


def reconstruct(views: ViewSet, cameras: Cameras, *, resolution: int = 128, max_faces: int = 20_000) -> Mesh:
    """Posed views with depth, generated, rendered or photographed => one closed, coloured mesh.

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
    vertices, faces, voxel = fuse(views, cameras, resolution)
    mesh = simplify(keep_parts(Mesh(vertices, faces), SPECK * voxel), max_faces)
    return with_normals(replace(mesh, vertex_colors=color_vertices(mesh, views, cameras, TOLERANCE * voxel)))
