"""A Mesh as graphics cards and file formats want it: one index for place, normal, texture place and colour."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from coser.reconstruction.mesh import Mesh
from coser.reconstruction.normals import with_normals


@dataclass(frozen=True)
class Primitive:
    """P vertices, each with all that belongs to it: positions [P,3], normals [P,3], uvs [P,2] or None, colors [P,3]
    (sRGB) or None, all float32; faces [F,3] int64 in the mesh's order; vertices [P] int64, the mesh's own numbers."""

    positions: np.ndarray
    normals: np.ndarray
    uvs: np.ndarray | None
    colors: np.ndarray | None
    faces: np.ndarray
    vertices: np.ndarray


def split_vertices(mesh: Mesh) -> Primitive:
    """The mesh's vertices, in their order, each as often as its corners differ in normal or texture place."""
    if mesh.normals is None:
        mesh = with_normals(mesh)
    corner = mesh.faces.ravel()
    parts = [mesh.normals.reshape(-1, 3)] + ([] if mesh.uvs is None else [mesh.uvs.reshape(-1, 2)])
    attributes = np.ascontiguousarray(np.concatenate(parts, 1), dtype=np.float32)
    # rows of bits compare quicker than rows of numbers; the vertex comes first, so that its order stays
    rows = np.concatenate([corner[:, None].astype(">u4").view(np.uint8).reshape(-1, 4),
                           (attributes + 0.0).view(np.uint8).reshape(len(corner), -1)], 1)
    _, first, index = np.unique(np.ascontiguousarray(rows).view(f"V{rows.shape[1]}").ravel(), return_index=True,
                                return_inverse=True)
    vertex = corner[first]
    return Primitive(mesh.vertices[vertex].astype(np.float32), attributes[first, :3],
                     None if mesh.uvs is None else attributes[first, 3:],
                     None if mesh.vertex_colors is None else mesh.vertex_colors[vertex].astype(np.float32),
                     index.reshape(-1, 3).astype(np.int64), vertex)
