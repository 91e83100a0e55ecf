"""STL for printing: binary, the welded and closed triangles alone, in the slicers' units and axes.

STL files carry neither units nor axes. Slicers read millimetres and print upwards along z, so a mesh in metres is
multiplied by 1000 and turned by 90 degrees about x: (x, y, z) => (x, -z, y). The object stands on the plate and its
front looks along -y, towards the person before the printer; nothing is mirrored.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import trimesh

from coser.reconstruction.mesh import Mesh
from coser.reconstruction.reload import expect_equal, expect_mesh

RECORD = np.dtype([("normal", "<f4", 3), ("corners", "<f4", (3, 3)), ("attribute", "<u2")])
HEADER = b"binary STL, millimetres, z up".ljust(80)


def save_stl(mesh: Mesh, path: str | Path) -> Path:
    """Writes `mesh` (metres, y up) as binary STL (millimetres, z up); returns the path."""
    records = np.zeros(len(mesh.faces), RECORD)
    records["corners"] = corners = printed(mesh.vertices)[mesh.faces]
    normals = np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])
    records["normal"] = normals / np.maximum(np.linalg.norm(normals, axis=1, keepdims=True), 1e-20)
    Path(path).write_bytes(HEADER + np.uint32(len(records)).astype("<u4").tobytes() + records.tobytes())
    return Path(path)


def check_stl(mesh: Mesh, path: str | Path) -> None:
    """Reads the file back; raises ValueError where its triangles are not the mesh's or do not close as they do."""
    back = trimesh.load(path, file_type="stl", process=False)
    expect_mesh(back, mesh, printed(mesh.vertices))
    back.merge_vertices()
    expect_equal("a closed surface:", bool(back.is_watertight and back.is_winding_consistent), mesh.is_watertight)


def printed(vertices: np.ndarray) -> np.ndarray:
    """Places [V,3], metres, y up => millimetres, z up."""
    return (vertices * 1000.0)[:, [0, 2, 1]] * np.array([1, -1, 1], np.float32)
