"""The Mesh, what keeps it tidy (parts, simplification, closedness), and the only writer of GLB files."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import fast_simplification
import numpy as np
import pygltflib
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

ROUGHNESS = 0.9


@dataclass(frozen=True)
class Mesh:
    """A triangle mesh, y up, faces counter-clockwise seen from outside.

    vertices [V,3] float32; faces [F,3] int64; vertex_colors [V,3] float32 in [0,1], sRGB as in the views, or None;
    normals [V,3] float32 of unit length or None.
    """

    vertices: np.ndarray
    faces: np.ndarray
    vertex_colors: np.ndarray | None = None
    normals: np.ndarray | None = None

    def __post_init__(self):
        for name, width in (("vertices", 3), ("faces", 3)):
            if getattr(self, name).ndim != 2 or getattr(self, name).shape[1] != width:
                raise ValueError(f"{name} must be [*,{width}], got {list(getattr(self, name).shape)}")
        for name in ("vertex_colors", "normals"):
            values = getattr(self, name)
            if values is not None and values.shape != self.vertices.shape:
                raise ValueError(f"{name} must be {list(self.vertices.shape)}, got {list(values.shape)}")

    def edges(self) -> np.ndarray:
        """Each edge once, [E,2], smaller vertex first."""
        return np.unique(_half_edges(self.faces), axis=0)

    @property
    def is_watertight(self) -> bool:
        """Whether every edge lies between exactly two faces that run through it in opposite directions."""
        if not len(self.faces):
            return False
        start, end = self.faces, np.roll(self.faces, -1, 1)
        count = len(self.vertices)
        ahead, back = np.sort((start * count + end).ravel()), np.sort((end * count + start).ravel())
        return bool((ahead == back).all() and (np.diff(ahead) > 0).all() and (start != end).all())

    @property
    def volume(self) -> float:
        """Enclosed volume, negative when the faces are turned inside out."""
        return float(_face_volumes(self.vertices, self.faces).sum())


def _half_edges(faces: np.ndarray) -> np.ndarray:
    """The three edges of every face, [3F,2], smaller vertex first."""
    return np.sort(np.stack([faces, np.roll(faces, -1, 1)], -1).reshape(-1, 2), axis=1)


def _face_volumes(vertices: np.ndarray, faces: np.ndarray) -> np.ndarray:
    a, b, c = (vertices[faces[:, k]].astype(np.float64) for k in range(3))
    return np.einsum("fk,fk->f", np.cross(a, b), c) / 6


def keep_parts(mesh: Mesh, smallest: float) -> Mesh:
    """The mesh without bubbles (parts turned inside out) and without specks: parts that span less than `smallest` (world
    units) or enclose less than a thousandth of the largest part."""
    edges = _half_edges(mesh.faces)
    count = len(mesh.vertices)
    links = coo_matrix((np.ones(len(edges), bool), tuple(edges.T)), (count, count))
    parts, label = connected_components(links, directed=False)
    volume = np.bincount(label[mesh.faces[:, 0]], _face_volumes(mesh.vertices, mesh.faces), parts)
    order = np.argsort(label, kind="stable")
    starts = np.searchsorted(label[order], np.arange(parts))
    ordered = mesh.vertices[order]
    span = np.linalg.norm(np.maximum.reduceat(ordered, starts) - np.minimum.reduceat(ordered, starts), axis=1)
    keep = (volume > 1e-3 * volume.max()) & (span >= smallest)
    keep[volume.argmax()] = True
    return _compact(mesh.vertices, mesh.faces[keep[label[mesh.faces[:, 0]]]])


def _compact(vertices: np.ndarray, faces: np.ndarray) -> Mesh:
    """Only the vertices that faces use."""
    used = np.zeros(len(vertices), bool)
    used[faces] = True
    return Mesh(vertices[used], (np.cumsum(used) - 1)[faces])


def simplify(mesh: Mesh, max_faces: int) -> Mesh:
    """The mesh with at most `max_faces` faces by quadric edge collapses, still watertight when it was.

    A collapse may pinch a thin place shut, which no later step can mend; then the mesh is simplified less eagerly, and, when
    even that pinches, less far: closedness goes before the budget.
    """
    if max_faces < 4:
        raise ValueError(f"max_faces must be at least 4, got {max_faces}")
    target = max_faces
    while target < len(mesh.faces):
        for eagerness in (5.0, 3.0):
            vertices, faces = fast_simplification.simplify(mesh.vertices, mesh.faces, target_count=target, agg=eagerness)
            simple = _compact(vertices.astype(np.float32), faces.astype(np.int64))
            if simple.is_watertight:
                return simple
        target = target * 3 // 2
    return mesh


def with_normals(mesh: Mesh) -> Mesh:
    """The mesh with smooth normals: the mean of the faces around each vertex, weighted by their corner's angle."""
    corners = mesh.vertices[mesh.faces].astype(np.float64)
    face = np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])
    face /= np.maximum(np.linalg.norm(face, axis=1, keepdims=True), 1e-20)
    ahead, back = np.roll(corners, -1, 1) - corners, np.roll(corners, 1, 1) - corners
    lengths = np.linalg.norm(ahead, axis=2) * np.linalg.norm(back, axis=2)
    angle = np.arccos(np.clip((ahead * back).sum(2) / np.maximum(lengths, 1e-20), -1, 1))
    index = mesh.faces.ravel()
    normals = np.stack([np.bincount(index, (angle * face[:, k:k + 1]).ravel(), len(mesh.vertices)) for k in range(3)], -1)
    length = np.linalg.norm(normals, axis=1, keepdims=True)
    normals = np.where(length > 1e-9, normals / np.maximum(length, 1e-9), (0.0, 1.0, 0.0))
    return replace(mesh, normals=normals.astype(np.float32))


def srgb_to_linear(colors: np.ndarray) -> np.ndarray:
    """Colours in [0,1] as pictures store them => linear light, which glTF asks of vertex colours (IEC 61966-2-1)."""
    return np.where(colors <= 0.04045, colors / 12.92, ((colors + 0.055) / 1.055) ** 2.4).astype(np.float32)


def save_glb(mesh: Mesh, path: str | Path, extras: dict | None = None) -> Path:
    """Writes `mesh` as one GLB file: y up, one matt material, normals, linear COLOR_0, `extras` (JSON) in asset.extras.

    The views' own shading is part of the colours, and viewers light the mesh once more; a matt, non-metallic material
    keeps that second light soft. Returns the path.
    """
    if mesh.normals is None:
        mesh = with_normals(mesh)
    attributes = {"POSITION": mesh.vertices, "NORMAL": mesh.normals}
    if mesh.vertex_colors is not None:
        attributes["COLOR_0"] = srgb_to_linear(mesh.vertex_colors)
    index_type = np.uint16 if len(mesh.vertices) < 65535 else np.uint32
    arrays = [a.astype("<f4") for a in attributes.values()] + [mesh.faces.astype(index_type).ravel()]
    gltf = pygltflib.GLTF2(
        asset=pygltflib.Asset(version="2.0", generator="CoSER", extras=extras or {}),
        scene=0, scenes=[pygltflib.Scene(nodes=[0])], nodes=[pygltflib.Node(mesh=0, name="object")],
        materials=[pygltflib.Material(name="matt", pbrMetallicRoughness=pygltflib.PbrMetallicRoughness(
            metallicFactor=0.0, roughnessFactor=ROUGHNESS))],
        meshes=[pygltflib.Mesh(name="object", primitives=[pygltflib.Primitive(
            attributes=pygltflib.Attributes(**{name: i for i, name in enumerate(attributes)}),
            indices=len(attributes), material=0)])])
    blob = b""
    for i, array in enumerate(arrays):
        vertex = i < len(attributes)
        data = array.tobytes()
        gltf.bufferViews.append(pygltflib.BufferView(
            buffer=0, byteOffset=len(blob), byteLength=len(data),
            target=pygltflib.ARRAY_BUFFER if vertex else pygltflib.ELEMENT_ARRAY_BUFFER))
        component = pygltflib.FLOAT if vertex else (
            pygltflib.UNSIGNED_SHORT if index_type is np.uint16 else pygltflib.UNSIGNED_INT)
        gltf.accessors.append(pygltflib.Accessor(
            bufferView=i, componentType=component, count=len(array), type="VEC3" if vertex else "SCALAR",
            min=array.min(0).tolist() if i == 0 else None, max=array.max(0).tolist() if i == 0 else None))
        blob += data + b"\0" * (-len(data) % 4)
    gltf.buffers = [pygltflib.Buffer(byteLength=len(blob))]
    gltf.set_binary_blob(blob)
    Path(path).write_bytes(b"".join(gltf.save_to_bytes()))
    return Path(path)
