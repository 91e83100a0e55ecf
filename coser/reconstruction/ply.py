"""PLY for scientific programs: binary, little endian, the welded triangles and a colour for each vertex.

Axes and units are the mesh's own: y up, metres. Colours are sRGB, 8 bits a channel.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import trimesh

from coser.reconstruction.mesh import Mesh
from coser.reconstruction.reload import expect_close, expect_mesh
from coser.reconstruction.sampling import vertex_colors_of

VERTEX = np.dtype([("place", "<f4", 3), ("color", "u1", 3)])
FACE = np.dtype([("count", "u1"), ("corners", "<i4", 3)])


def save_ply(mesh: Mesh, path: str | Path) -> Path:
    """Writes `mesh` as binary PLY, with its vertex colours or its texture's colours at the vertices; returns the
    path."""
    vertices, faces = np.zeros(len(mesh.vertices), VERTEX), np.zeros(len(mesh.faces), FACE)
    vertices["place"], vertices["color"] = mesh.vertices, _colors(mesh)
    faces["count"], faces["corners"] = 3, mesh.faces
    header = ["ply", "format binary_little_endian 1.0", "comment y up, metres", f"element vertex {len(vertices)}",
              *(f"property float {axis}" for axis in "xyz"),
              *(f"property uchar {channel}" for channel in ("red", "green", "blue")),
              f"element face {len(faces)}", "property list uchar int vertex_indices", "end_header"]
    Path(path).write_bytes("\n".join(header).encode("ascii") + b"\n" + vertices.tobytes() + faces.tobytes())
    return Path(path)


def check_ply(mesh: Mesh, path: str | Path) -> None:
    """Reads the file back; raises ValueError where its triangles or colours are not the mesh's."""
    back = trimesh.load(path, file_type="ply", process=False)
    expect_mesh(back, mesh, mesh.vertices)
    expect_close("vertex colours", back.visual.vertex_colors[:, :3], _colors(mesh), 0)


def _colors(mesh: Mesh) -> np.ndarray:
    return (vertex_colors_of(mesh) * 255).round().astype(np.uint8)
