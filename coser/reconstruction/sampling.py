"""Points on a mesh's surface: where they lie and what colours they have."""

from __future__ import annotations

import numpy as np

from coser.reconstruction.mesh import Mesh

PLAIN = 0.7  # brightness of meshes without colours


def colors_at(mesh: Mesh, faces: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Colours [P,3] float32 in [0,1], sRGB, of points in faces [P] at barycentric weights [P,3]: the texture's, else
    the vertex colours', else a plain grey."""
    if mesh.texture is not None:
        return _texels(mesh.texture, np.einsum("pk,pkc->pc", weights, mesh.uvs[faces]))
    if mesh.vertex_colors is not None:
        return np.einsum("pk,pkc->pc", weights, mesh.vertex_colors[mesh.faces[faces]]).astype(np.float32)
    return np.full((len(faces), 3), PLAIN, np.float32)


def vertex_colors_of(mesh: Mesh) -> np.ndarray:
    """The mesh's vertex colours [V,3] in [0,1], sRGB; where it has none, the mean of its texture at a vertex' corners,
    and a plain grey without a texture."""
    if mesh.vertex_colors is not None:
        return mesh.vertex_colors.clip(0, 1)
    corner = mesh.faces.ravel()
    colors = colors_at(mesh, np.repeat(np.arange(len(mesh.faces)), 3), np.tile(np.eye(3), (len(mesh.faces), 1)))
    sums = np.stack([np.bincount(corner, colors[:, k], len(mesh.vertices)) for k in range(3)], -1)
    return sums / np.maximum(np.bincount(corner, minlength=len(mesh.vertices)), 1)[:, None]


def _texels(texture: np.ndarray, uv: np.ndarray) -> np.ndarray:
    """Bilinear lookups of a texture [S,S,3] uint8 at uv [P,2] (v down) => colours [P,3] in [0,1]."""
    size = len(texture)
    place = (uv * size - 0.5).clip(0, size - 1)
    low = np.minimum(place.astype(np.int64), max(size - 2, 0))
    (u, v), (x, y) = (place - low).T[..., None], low.T
    right, below = np.minimum(x + 1, size - 1), np.minimum(y + 1, size - 1)
    top = texture[y, x] * (1 - u) + texture[y, right] * u
    bottom = texture[below, x] * (1 - u) + texture[below, right] * u
    return ((top * (1 - v) + bottom * v) / 255).astype(np.float32)
