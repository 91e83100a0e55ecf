"""The formats that an asset leaves in, and the one way out: written aside, read back, checked, and only then there."""

from __future__ import annotations

import os
import struct
import tempfile
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import av
import trimesh

from coser.cameras import Cameras
from coser.reconstruction.glb import save_glb, srgb_to_linear
from coser.reconstruction.mesh import Mesh
from coser.reconstruction.obj import SUFFIX as OBJ_SUFFIX
from coser.reconstruction.obj import check_obj, save_obj
from coser.reconstruction.ply import check_ply, save_ply
from coser.reconstruction.reload import EXACT, expect_close, expect_equal, expect_mesh, expect_texture
from coser.reconstruction.splat import SUFFIX as SPLAT_SUFFIX
from coser.reconstruction.splat import check_splat, save_splat
from coser.reconstruction.stl import check_stl, save_stl
from coser.reconstruction.turntable import SUFFIX_GIF, SUFFIX_MP4, check_gif, check_mp4, save_gif, save_mp4
from coser.reconstruction.views_zip import SUFFIX as VIEWS_SUFFIX
from coser.reconstruction.views_zip import check_views, save_views
from coser.views import ViewSet


# what readers raise at broken files, beside ValueError
UNREADABLE = (AttributeError, AssertionError, EOFError, LookupError, TypeError, struct.error, zlib.error,
              zipfile.BadZipFile, av.FFmpegError)


@dataclass(frozen=True)
class Asset:
    """All that an export may need: the placed mesh, the views that it was made of, their cameras, the run's words."""

    mesh: Mesh
    views: ViewSet | None
    cameras: Cameras | None
    extras: dict | None
    should_stop: Callable[[], bool]


@dataclass(frozen=True)
class Format:
    """A file's kind. suffix: how its name ends; label: its name for people; write: an Asset to a path, returns the path
    or None when it was stopped; check: whether a path holds an Asset; needs_views: whether it is made of the views."""

    suffix: str
    label: str
    write: Callable[[Asset, Path], Path | None]
    check: Callable[[Asset, Path], None]
    needs_views: bool = False


FORMATS: dict[str, Format] = {
    "glb": Format(".glb", "GLB: game engines, web", lambda asset, path: save_glb(asset.mesh, path, asset.extras),
                  lambda asset, path: check_glb(asset.mesh, path)),
    "obj": Format(OBJ_SUFFIX, "OBJ + MTL + PNG (zip): modelling", lambda asset, path: save_obj(asset.mesh, path),
                  lambda asset, path: check_obj(asset.mesh, path)),
    "stl": Format(".stl", "STL: printing, millimetres", lambda asset, path: save_stl(asset.mesh, path),
                  lambda asset, path: check_stl(asset.mesh, path)),
    "ply": Format(".ply", "PLY: vertex colours", lambda asset, path: save_ply(asset.mesh, path),
                  lambda asset, path: check_ply(asset.mesh, path)),
    "splat": Format(SPLAT_SUFFIX, "Gaussian splats (.ply)", lambda asset, path: save_splat(asset.mesh, path),
                    lambda asset, path: check_splat(asset.mesh, path)),
    "views": Format(VIEWS_SUFFIX, "Views + cameras (zip): NeRF programs",
                    lambda asset, path: save_views(asset.views, asset.cameras, path, asset.extras),
                    lambda asset, path: check_views(asset.views, asset.cameras, path), needs_views=True),
    "mp4": Format(SUFFIX_MP4, "Turntable (MP4)", lambda asset, path: save_mp4(asset.mesh, path, asset.should_stop),
                  lambda asset, path: check_mp4(asset.mesh, path)),
    "gif": Format(SUFFIX_GIF, "Turntable (GIF)", lambda asset, path: save_gif(asset.mesh, path, asset.should_stop),
                  lambda asset, path: check_gif(asset.mesh, path)),
}


def export(format: str, mesh: Mesh, views: ViewSet | None, cameras: Cameras | None, path: str | Path, *,
           extras: dict | None = None, should_stop: Callable[[], bool] = lambda: False) -> Path | None:
    """Writes one file of a format in FORMATS and returns its path once it has been read back and found right; None
    where `should_stop` ended it.

    mesh: placed as it shall be exported, metres, y up. views, cameras: those that it was made of; None where the format
    does not need them. path: its folder must exist and its name end with the format's suffix; what was there is
    replaced in one step. extras: JSON values that tell the run, for formats with room for them (glb, views). Whatever
    happens, nothing unfinished lies at `path` or beside it. Raises ValueError when an argument is wrong or the file
    does not hold what it should, and OSError when the folder cannot be written to or the disk is full.
    """
    if format not in FORMATS:
        raise ValueError(f"format must be one of {', '.join(FORMATS)}, got {format!r}")
    path, kind = Path(path), FORMATS[format]
    if not path.name.endswith(kind.suffix) or path.name == kind.suffix:
        raise ValueError(f"path must end with a name and {kind.suffix} for {format}, got {path}")
    if not len(mesh.faces):
        raise ValueError("mesh must have at least one face, got none")
    if kind.needs_views and (views is None or cameras is None):
        raise ValueError(f"views and cameras must be given for {format}, got none")
    asset = Asset(mesh, views, cameras, extras, should_stop)
    # a folder, so that the file has its own name from the start and no reader is misled by its ending
    with tempfile.TemporaryDirectory(prefix=".export-", dir=path.parent) as folder:
        aside = Path(folder) / path.name
        if should_stop() or kind.write(asset, aside) is None:
            return None
        try:
            kind.check(asset, aside)
        except UNREADABLE as error:
            raise ValueError(f"the written file must be readable as {format}, got {error}") from error
        os.replace(aside, path)
    return path


def check_glb(mesh: Mesh, path: str | Path) -> None:
    """Reads the file back; raises ValueError where its triangles, normals, texture or colours are not the mesh's."""
    parts = trimesh.load(path, file_type="glb", process=False).geometry  # made one mesh, it would lose its normals
    expect_equal("this many meshes:", len(parts), 1)
    (back,) = parts.values()
    expect_mesh(back, mesh, mesh.vertices)
    if mesh.normals is not None:
        expect_close("normals", back.vertex_normals[back.faces], mesh.normals, EXACT)
    if mesh.texture is not None:
        expect_texture(back, back.visual.material.baseColorTexture, mesh)
    elif mesh.vertex_colors is not None:
        colors = back.visual.vertex_attributes.get("color")  # of a material and no texture
        if colors is None:
            raise ValueError("the written file must hold colours at its vertices, got none")
        expect_close("colours", colors[back.faces], srgb_to_linear(mesh.vertex_colors)[mesh.faces], EXACT)
