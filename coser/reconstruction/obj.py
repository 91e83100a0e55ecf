"""OBJ: a zip of the mesh (.obj), its material (.mtl) and its texture (.png), for modelling programs.

Axes and units are the mesh's own: y up, metres. Texture places count v from below, as OBJ wants. Where there is no
texture, vertex colours stand behind the places (`v x y z r g b`), which Blender, MeshLab and others read.
"""

from __future__ import annotations

import re
import zipfile
from pathlib import Path

import numpy as np
import trimesh

from coser.reconstruction.archive import add
from coser.reconstruction.glb import png_bytes
from coser.reconstruction.mesh import Mesh
from coser.reconstruction.normals import with_normals
from coser.reconstruction.reload import expect_close, expect_equal, expect_mesh, expect_texture

SUFFIX = "-obj.zip"


def save_obj(mesh: Mesh, path: str | Path) -> Path:
    """Writes `mesh` as one zip of .obj, .mtl and, with a texture, .png, named after the zip; returns the path."""
    name = _inner_name(path)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        add(archive, f"{name}.obj", _obj_text(mesh, name).encode("ascii"))
        add(archive, f"{name}.mtl", _mtl_text(f"{name}.png" if mesh.texture is not None else None).encode("ascii"))
        if mesh.texture is not None:
            add(archive, f"{name}.png", png_bytes(mesh.texture))
    return Path(path)


def check_obj(mesh: Mesh, path: str | Path) -> None:
    """Reads the zip back; raises ValueError where its triangles, texture or colours are not the mesh's."""
    name = _inner_name(path)
    with zipfile.ZipFile(path) as archive:
        wanted = {f"{name}.obj", f"{name}.mtl"} | ({f"{name}.png"} if mesh.texture is not None else set())
        expect_equal("the files", sorted(archive.namelist()), sorted(wanted))
        beside = trimesh.resolvers.ZipResolver({n: archive.open(n) for n in archive.namelist()})
        back = trimesh.load(archive.open(f"{name}.obj"), file_type="obj", force="mesh", process=False,
                            resolver=beside, skip_materials=mesh.texture is None)
    expect_mesh(back, mesh, mesh.vertices)
    if mesh.texture is not None:
        expect_texture(back, back.visual.material.image, mesh)
    elif mesh.vertex_colors is not None:
        colors = np.asarray(back.visual.vertex_colors)[back.faces][..., :3] / 255
        expect_close("vertex colours", colors, mesh.vertex_colors[mesh.faces], 1.01 / 255)


def _inner_name(path: str | Path) -> str:
    """What the files in the zip are called: no spaces and plain letters, or the .obj's words would end in between."""
    return re.sub(r"[^A-Za-z0-9_-]+", "-", Path(path).name.removesuffix(SUFFIX)).strip("-") or "object"


def _obj_text(mesh: Mesh, name: str) -> str:
    mesh = mesh if mesh.normals is not None else with_normals(mesh)
    colored = mesh.texture is None and mesh.vertex_colors is not None
    places = np.concatenate([mesh.vertices, mesh.vertex_colors], 1) if colored else mesh.vertices
    normals, normal = _distinct(mesh.normals.reshape(-1, 3))
    columns = [mesh.faces.ravel(), normal]
    parts = [f"# y up, metres\nmtllib {name}.mtl\no {name}\n", _lines("v", places, 9), _lines("vn", normals, 6)]
    if mesh.uvs is not None:
        uvs, uv = _distinct(mesh.uvs.reshape(-1, 2))
        parts.append(_lines("vt", uvs * (1, -1) + (0, 1), 9))
        columns.insert(1, uv)
    corner = "%d/%d/%d" if mesh.uvs is not None else "%d//%d"
    corners = np.stack(columns, 1) + 1
    parts += ["usemtl matt\n", (f"f {corner} {corner} {corner}\n" * len(mesh.faces)) % tuple(corners.ravel().tolist())]
    return "".join(parts)


def _mtl_text(texture: str | None) -> str:
    lines = ["newmtl matt", "Ka 0 0 0", "Kd 1 1 1", "Ks 0 0 0", "d 1", "illum 1"]
    return "\n".join(lines + ([f"map_Kd {texture}"] if texture else [])) + "\n"


def _lines(keyword: str, rows: np.ndarray, digits: int) -> str:
    line = " ".join([keyword] + [f"%.{digits}g"] * rows.shape[1]) + "\n"
    return (line * len(rows)) % tuple(rows.ravel().tolist())


def _distinct(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rows [N,K] => the different ones and, for each row, which of them it is [N]."""
    rows = np.ascontiguousarray(rows + 0.0)
    keys = rows.view(f"V{rows.strides[0]}").ravel()
    _, first, index = np.unique(keys, return_index=True, return_inverse=True)
    return rows[first], index.ravel()
