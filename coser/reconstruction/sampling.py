"""Points on a mesh's surface: where they lie and what colours they have."""

from __future__ import annotations

import numpy as np
from scipy.spatial import cKDTree

from coser.reconstruction.mesh import Mesh

PLAIN = 0.7  # brightness of meshes without colours
CROWD = 5  # candidates for each point that is kept
APART = 0.70  # least distance of two points, in sides of the square that is a point's share; about as many fit as asked


def spread_points(mesh: Mesh, count: int) -> tuple[np.ndarray, np.ndarray]:
    """About `count` (>= 1) points all over the surface, evenly and without a pattern: faces [P] int64 and barycentric
    weights [P,3].

    Poisson discs by dart throwing (Cook 1986): of a random crowd, stratified by area over the faces and the same every
    time, each point goes in unless one of the same side of the surface is in that is nearer than the least distance.
    """
    if count < 1:
        raise ValueError(f"count must be at least 1, got {count}")
    corners, normals = _corners_and_normals(mesh)
    area = np.linalg.norm(normals, axis=1) / 2
    if not area.sum() > 0:
        raise ValueError("mesh must have a surface, got one without any area")
    crowd = np.arange(count * CROWD)
    total = np.cumsum(area)
    faces = np.searchsorted(total, (crowd + 0.5) / len(crowd) * total[-1]).clip(max=len(area) - 1)
    u, v = np.random.default_rng(0).random((2, len(crowd)))
    u, v = np.where(u + v > 1, (1 - u, 1 - v), (u, v))
    weights = np.stack([1 - u - v, u, v], -1)
    normals = normals[faces] / np.maximum(2 * area[faces, None], 1e-30)
    places = np.einsum("pk,pkc->pc", weights, corners[faces])
    kept = _apart(places, normals, APART * np.sqrt(total[-1] / count))
    return faces[kept], weights[kept]


def face_areas(mesh: Mesh) -> np.ndarray:
    """The faces' areas [F], square metres."""
    return np.linalg.norm(_corners_and_normals(mesh)[1], axis=1) / 2


def _corners_and_normals(mesh: Mesh) -> tuple[np.ndarray, np.ndarray]:
    """Float64 corners [F,3,3] and normals [F,3], twice as long as a face's area."""
    corners = mesh.vertices[mesh.faces].astype(np.float64)
    return corners, np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])


def _apart(places: np.ndarray, normals: np.ndarray, least: float) -> np.ndarray:
    """Which places [P,3] go in when asked in a random order, each unless one that is in is nearer than `least`."""
    pairs = cKDTree(places).query_pairs(least, output_type="ndarray")
    pairs = pairs[np.einsum("pk,pk->p", normals[pairs[:, 0]], normals[pairs[:, 1]]) > 0]  # not through thin parts
    rank = np.random.default_rng(0).permutation(len(places))
    first = np.where(rank[pairs[:, 0]] < rank[pairs[:, 1]], pairs[:, 0], pairs[:, 1])
    second = pairs.sum(1) - first
    asked, kept = np.ones(len(places), bool), np.zeros(len(places), bool)
    while len(first):  # all at once that have nobody before them any more
        waits = np.zeros(len(places), bool)
        waits[second] = True
        now = asked & ~waits
        kept |= now
        asked &= ~now
        asked[second[now[first]]] = False
        open_pairs = asked[first] & asked[second]
        first, second = first[open_pairs], second[open_pairs]
    return kept | asked


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
