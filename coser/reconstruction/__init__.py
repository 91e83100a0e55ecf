"""From posed views to an asset: a closed surface first, then, as often as wished, triangles and colours for it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial

import torch

from coser.cameras import Cameras
from coser.rasterizer import rasterize
from coser.reconstruction.color import color_vertices
from coser.reconstruction.consensus import fuse_consensus
from coser.reconstruction.fit import stream_fit
from coser.reconstruction.fuse import fuse
from coser.reconstruction.glb import save_glb
from coser.reconstruction.likeness import silhouette_likeness
from coser.reconstruction.mesh import Mesh, keep_parts, simplify, smooth
from coser.reconstruction.normals import with_normals
from coser.reconstruction.slivers import without_slivers
from coser.reconstruction.texture import bake_texture
from coser.views import ViewSet

__all__ = ["QUICK", "Mesh", "Surface", "SurfaceStep", "find_surface", "finish", "reconstruct", "save_glb",
           "stream_surface"]

SPECK = 4.0  # voxels; parts that span less are noise
# Mean IoU of a mesh with the views it was made of. Views of a real object give .97 and more.
CONTRADICTION = 0.93
CHECKED_FACES = 20_000
QUICK = {"max_faces": CHECKED_FACES, "texture_size": None}  # where a mesh is only looked at, never handed out
TOLERANCE = 1.5  # voxels; how far a view's depth usually lies from the surface
# of views that a model drew: what a cell's neighbours count beside a view, and how often vertices move to the middle of
# theirs. Measured in docs/reconstruction.md
DRAWN_NEIGHBOURS, DRAWN_ROUNDS = 1.0, 5


@dataclass(frozen=True)
class Surface:
    """The closed surface that views show, before anything is decided about triangles and colours.

    mesh: dense, without colours. voxel: the side (world units) of the grid that it comes from. views, cameras: those
    that it was made of and is coloured from. checked: the mesh at CHECKED_FACES triangles, where it was needed before.
    """

    mesh: Mesh
    voxel: float
    views: ViewSet
    cameras: Cameras
    checked: Mesh | None = None


@dataclass(frozen=True)
class SurfaceStep:
    """One moment of finding a surface: index of total, in words for a progress line, and at the end the surface."""

    index: int
    total: int
    message: str
    surface: Surface | None = None


def reconstruct(views: ViewSet, cameras: Cameras, *, resolution: int = 128, drawn: bool = False,
                generous: bool = False, max_faces: int = 10_000, texture_size: int | None = 1024) -> Mesh:
    """Posed views, generated, rendered or photographed => one closed, coloured mesh: `finish` of `find_surface`."""
    surface = find_surface(views, cameras, resolution, drawn, generous)
    return finish(surface, max_faces=max_faces, texture_size=texture_size)


def find_surface(views: ViewSet, cameras: Cameras, resolution: int = 128, drawn: bool = False,
                 generous: bool = False) -> Surface:
    """`stream_surface` drained: arguments and errors as there."""
    for step in stream_surface(views, cameras, resolution, drawn, generous):
        pass
    return step.surface


def stream_surface(views: ViewSet, cameras: Cameras, resolution: int = 128, drawn: bool = False,
                   generous: bool = False) -> Iterator[SurfaceStep]:
    """Posed views => the steps of finding their closed surface; the last one carries it.

    Where carving by every view leaves a mesh that does not look like its own views, they contradict each other, and
    what they agree on at large is made instead if that fits them better. Views of which none has a depth are fitted by
    their colours and silhouettes (`coser.reconstruction.fit`), in steps that a caller may leave at any time; the
    surface then carries the depths at which they see it.

    views: N >= 1 square views; cameras: their N perspective cameras. resolution: the fusion grid holds at most
    resolution^3 cells. drawn: a model drew the views, whose small contradictions would leave the surface rough: it is
    smoothed, which would cost views of something real their edges. generous: what views agree on at large keeps their
    thin parts, too, wherever each shows them (`coser.reconstruction.consensus.local_levels`). Raises ValueError when
    the views and cameras do not belong together or the views show nothing.
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
    with_depths = bool((views.depths > 0).any())
    shown = ((views.masks >= 0.5) & ((views.depths > 0) | (not with_depths))).flatten(1).any(1)
    if not shown.any():
        raise ValueError("views show nothing: no pixel has a mask of at least 0.5" + " and a depth" * with_depths)
    views, cameras = views[shown], cameras[shown]  # an empty view has failed: it would carve everything away
    if not with_depths:
        for step in stream_fit(views, cameras, resolution):
            if step.grid is None:
                yield SurfaceStep(step.index, step.total, f"Fitting the surface, step {step.index} of {step.total}")
        vertices, faces, voxel = step.grid.surface()
        mesh = keep_parts(Mesh(vertices, faces), SPECK * voxel)
        yield SurfaceStep(step.total, step.total, "Surface found",
                          Surface(mesh, voxel, _with_depths(views, cameras, mesh), cameras))
        return
    yield SurfaceStep(0, 1, "Fusing the views")
    yield SurfaceStep(1, 1, "Surface found", _carved_or_agreed(views, cameras, resolution, drawn, generous))


def finish(surface: Surface, *, max_faces: int = 10_000, texture_size: int | None = 1024) -> Mesh:
    """Surface => mesh with at most `max_faces` triangles (more only where keeping the budget would tear it), normals,
    uvs and a texture of `texture_size` pixels a side; without one (None) in vertex colours alone, which is quicker."""
    known = surface.checked if max_faces == CHECKED_FACES else None
    mesh = with_normals(without_slivers(known or simplify(surface.mesh, max_faces)))
    tolerance = TOLERANCE * surface.voxel
    if texture_size is None:
        return replace(mesh, vertex_colors=color_vertices(mesh, surface.views, surface.cameras, tolerance))
    return bake_texture(mesh, surface.views, surface.cameras, texture_size, tolerance)


def _with_depths(views: ViewSet, cameras: Cameras, mesh: Mesh) -> ViewSet:
    """The views with the depths at which they see the mesh, so that they tell what is hidden."""
    vertices, faces = (torch.from_numpy(part).to(views.views.device) for part in (mesh.vertices, mesh.faces))
    return replace(views, depths=rasterize(vertices, faces, cameras, views.views.shape[-1]).depths[:, None])


def _carved_or_agreed(views: ViewSet, cameras: Cameras, resolution: int, drawn: bool, generous: bool) -> Surface:
    best, error = None, None
    carve = partial(fuse, neighbours=DRAWN_NEIGHBOURS) if drawn else fuse
    # the second is smooth; local levels take long, and fewer cells do nearly as well
    agree, share = (partial(fuse_consensus, local=True), 3 / 8) if generous else (fuse_consensus, 1 / 2)
    for method, side in ((carve, resolution), (agree, max(8, int(share * resolution)))):
        try:
            vertices, faces, voxel = method(views, cameras, side)
        except ValueError as nothing_found:
            error = error or nothing_found
            continue
        mesh = keep_parts(Mesh(vertices, faces), SPECK * voxel)
        mesh = smooth(mesh, DRAWN_ROUNDS) if drawn else mesh
        checked = simplify(mesh, CHECKED_FACES)
        fit = float(silhouette_likeness(checked.vertices, checked.faces, views.masks, cameras).mean())
        if best is None or fit > best[0]:
            best = fit, Surface(mesh, voxel, views, cameras, checked)
        if best[0] >= CONTRADICTION:
            break
    if best is None:
        raise error
    return best[1]
