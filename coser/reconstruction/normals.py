"""Normals of face corners: smooth where the surface bends, hard where it folds."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

from coser.reconstruction.mesh import Mesh

HARD_ANGLE = 40.0  # degrees between two faces; an edge that folds more is shown as an edge


def with_normals(mesh: Mesh, hard_angle: float = HARD_ANGLE) -> Mesh:
    """The mesh with normals [F,3,3]: around a vertex, the faces between two hard edges share one normal, the mean of
    theirs weighted by their corner's angle.

    hard_angle: degrees, 0..180; edges whose faces' normals differ by more are hard. At 180 all are smooth.
    """
    if not 0 <= hard_angle <= 180:
        raise ValueError(f"hard_angle must lie between 0 and 180 degrees, got {hard_angle}")
    face, angle = _face_normals_and_angles(mesh)
    fan = _fans(mesh.faces, face, hard_angle)
    count = fan.max() + 1 if len(fan) else 0
    share = angle.ravel()
    per_corner = np.repeat(face, 3, 0)
    sums = np.stack([np.bincount(fan, share * per_corner[:, k], count) for k in range(3)], -1)
    length = np.linalg.norm(sums, axis=1, keepdims=True)
    smooth = np.where(length > 1e-9, sums / np.maximum(length, 1e-9), (0.0, 1.0, 0.0))
    return replace(mesh, normals=smooth[fan].reshape(-1, 3, 3).astype(np.float32))


def _face_normals_and_angles(mesh: Mesh) -> tuple[np.ndarray, np.ndarray]:
    """Unit normals [F,3] and the angle at each corner [F,3], radians."""
    corners = mesh.vertices[mesh.faces].astype(np.float64)
    face = np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])
    face /= np.maximum(np.linalg.norm(face, axis=1, keepdims=True), 1e-20)
    ahead, back = np.roll(corners, -1, 1) - corners, np.roll(corners, 1, 1) - corners
    lengths = np.linalg.norm(ahead, axis=2) * np.linalg.norm(back, axis=2)
    return face, np.arccos(np.clip((ahead * back).sum(2) / np.maximum(lengths, 1e-20), -1, 1))


def _fans(faces: np.ndarray, face_normals: np.ndarray, hard_angle: float) -> np.ndarray:
    """A number for each face corner [3F]: corners of one vertex have the same where no hard edge lies between."""
    corner = np.arange(faces.size)
    ahead_of = corner // 3 * 3 + (corner + 1) % 3
    start, end = faces.ravel(), np.roll(faces, -1, 1).ravel()
    count = faces.max() + 1 if faces.size else 1
    forward, backward = start * count + end, end * count + start
    order = np.argsort(forward, kind="stable")
    place = np.searchsorted(forward[order], backward).clip(max=max(len(order) - 1, 0))
    twin = order[place]
    paired = forward[twin] == backward
    cosine = (face_normals[corner // 3] * face_normals[twin // 3]).sum(1)
    smooth = paired & (cosine >= np.cos(np.radians(hard_angle)) - 1e-9)
    # along a smooth edge, a half-edge's start is its twin's end
    links = coo_matrix((np.ones(smooth.sum(), bool), (corner[smooth], ahead_of[twin[smooth]])), (faces.size,) * 2)
    return connected_components(links, directed=False)[1]
