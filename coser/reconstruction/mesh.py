"""The Mesh, and what keeps it tidy: parts, simplification, closedness."""

from __future__ import annotations

from dataclasses import dataclass

import fast_simplification
import numpy as np
import trimesh
from scipy.optimize import linear_sum_assignment
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

HAIRS = (3e-4, 1e-3, 3e-3)  # of the mesh's longest side
# how quickly collapses become dearer: the careful way keeps silhouettes (IoU at 500 triangles .943, in haste .934), but
# does not always get that far
HASTES = 4.0, 5.0


@dataclass(frozen=True)
class Mesh:
    """A triangle mesh, y up, faces counter-clockwise seen from outside, corners at one place sharing one vertex.

    vertices [V,3] float32; faces [F,3] int64; vertex_colors [V,3] float32 in [0,1], sRGB as in the views, or None.
    What may differ between the faces around a vertex belongs to their corners: normals [F,3,3] float32 of unit length
    or None; uvs [F,3,2] float32 in [0,1], v DOWN from the texture's top left corner (as in glTF), or None, together
    with texture [S,S,3] uint8, sRGB. Exporters split vertices where that is needed (`coser.reconstruction.primitive`).
    """

    vertices: np.ndarray
    faces: np.ndarray
    vertex_colors: np.ndarray | None = None
    normals: np.ndarray | None = None
    uvs: np.ndarray | None = None
    texture: np.ndarray | None = None

    def __post_init__(self):
        for name, width in (("vertices", 3), ("faces", 3)):
            if getattr(self, name).ndim != 2 or getattr(self, name).shape[1] != width:
                raise ValueError(f"{name} must be [*,{width}], got {list(getattr(self, name).shape)}")
        corners = len(self.faces), 3
        for name, shape in (("vertex_colors", self.vertices.shape), ("normals", (*corners, 3)), ("uvs", (*corners, 2))):
            values = getattr(self, name)
            if values is not None and values.shape != shape:
                raise ValueError(f"{name} must be {list(shape)}, got {list(values.shape)}")
        if (self.uvs is None) != (self.texture is None):
            raise ValueError("uvs and texture must come together, got only one of them")
        if self.texture is not None and (self.texture.dtype != np.uint8 or self.texture.ndim != 3
                                         or self.texture.shape[0] != self.texture.shape[1]
                                         or self.texture.shape[2] != 3):
            raise ValueError(f"texture must be square uint8 [S,S,3], got {self.texture.dtype} "
                             f"{list(self.texture.shape)}")

    def edges(self) -> np.ndarray:
        """Each edge once, [E,2], smaller vertex first."""
        low, high = _half_edges(self.faces).T
        return np.stack(np.divmod(np.unique(low * len(self.vertices) + high), len(self.vertices)), -1)

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
    """The mesh without bubbles (parts turned inside out) and without specks: parts that span less than `smallest`
    (world units) or enclose less than a thousandth of the largest part."""
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


def smooth(mesh: Mesh, rounds: int) -> Mesh:
    """The mesh after `rounds` in which every vertex moves half the way to the mean of its neighbours (Laplacian
    smoothing), without colours, normals and uvs."""
    smoothed = trimesh.Trimesh(mesh.vertices, mesh.faces, process=False)
    trimesh.smoothing.filter_laplacian(smoothed, lamb=0.5, iterations=rounds, volume_constraint=False)
    return Mesh(np.asarray(smoothed.vertices, np.float32), mesh.faces)


def simplify(mesh: Mesh, max_faces: int) -> Mesh:
    """The mesh with at most `max_faces` faces by quadric edge collapses, still watertight when it was.

    Should a collapse ever tear the surface, or collapses come to an end, it is simplified less far instead: closedness
    goes before the budget.
    """
    if max_faces < 100:
        raise ValueError(f"max_faces must be at least 100, got {max_faces}")
    target, least = max_faces, 4  # a closed surface has no fewer
    while target < len(mesh.faces):
        simple = part_pinches(_collapse(mesh, target))
        if not simple.is_watertight:
            least = target + 1
            target = max(least, target * 3 // 2)
        elif len(simple.faces) > max_faces and least < target <= max_faces:  # parting a pinch adds a face or two
            target = max(least, target - (len(simple.faces) - max_faces))
        else:
            return simple
    return mesh


def _collapse(mesh: Mesh, target: int) -> Mesh:
    """Quadric edge collapses down to `target` faces. On perfectly flat sides they lock each other: where they end
    early, they begin again from vertices shaken by a hair."""
    length = float(np.ptp(mesh.vertices, axis=0).max())
    best = mesh
    for hair in (0.0, *HAIRS):
        noise = np.random.default_rng(0).standard_normal(mesh.vertices.shape)
        vertices, faces = (mesh.vertices + hair * length * noise).astype(np.float32), mesh.faces
        for haste in HASTES:
            if len(faces) > target:
                vertices, faces = fast_simplification.simplify(vertices, faces, target_count=target, agg=haste)
        if len(faces) < len(best.faces):
            best = _compact(vertices.astype(np.float32), faces.astype(np.int64))
        if len(faces) <= target:
            break
    return best


def part_pinches(mesh: Mesh) -> Mesh:
    """The mesh cut apart where collapses pinched it: at edges of more than two faces and vertices of more than one fan.

    Every half-edge gets exactly one twin, such that the two bound one piece of the solid; corners joined by twins then
    share a vertex, others do not. The copies of a parted vertex move a hundredth of the way into their own faces.
    """
    faces = _without_folds(mesh.faces)
    count, half_edges = len(mesh.vertices), np.arange(faces.size)
    ahead_of = half_edges // 3 * 3 + (half_edges + 1) % 3  # the next half-edge of the same face
    start, end = faces.ravel(), np.roll(faces, -1, 1).ravel()
    forward, backward = start * count + end, end * count + start
    order, twin_order = np.argsort(forward, kind="stable"), np.argsort(backward, kind="stable")
    if not np.array_equal(forward[order], backward[twin_order]):
        return mesh  # open or turned edges: nothing to pair with
    twin = np.empty_like(half_edges)
    twin[order] = twin_order
    keys, first, crowd = np.unique(forward[order], return_index=True, return_counts=True)
    for key, i, n in zip(keys[crowd > 1], first[crowd > 1], crowd[crowd > 1]):
        if key // count < key % count:
            going, coming = order[i:i + n], twin_order[i:i + n]
            coming = coming[_pair_around(mesh.vertices, faces, start, end, going, coming)]
            twin[going], twin[coming] = coming, going
    corners = coo_matrix((np.ones(2 * faces.size, bool), (np.concatenate([half_edges, ahead_of]),
                                                          np.concatenate([ahead_of[twin], twin]))), (faces.size,) * 2)
    parts, label = connected_components(corners, directed=False)
    origin = np.empty(parts, np.int64)
    origin[label] = start
    parted = np.bincount(origin, minlength=count)[origin] > 1
    middle = mesh.vertices[faces].mean(1)[half_edges // 3]
    around = np.stack([np.bincount(label, middle[:, k], parts) for k in range(3)], -1)
    around /= np.bincount(label, minlength=parts)[:, None]
    vertices = mesh.vertices[origin]
    vertices = np.where(parted[:, None], vertices + 0.01 * (around - vertices), vertices).astype(np.float32)
    return _part_double_edges(Mesh(vertices, label.reshape(-1, 3).astype(np.int64)), twin)


def _part_double_edges(mesh: Mesh, twin: np.ndarray) -> Mesh:
    """Where two pairs of half-edges still run between the same two vertices, all but one get a vertex in the middle."""
    count = len(mesh.vertices)
    start, end = mesh.faces.ravel(), np.roll(mesh.faces, -1, 1).ravel()
    upward = np.flatnonzero(start < end)
    _, first = np.unique(start[upward] * count + end[upward], return_index=True)
    vertices, faces, touched = list(mesh.vertices), mesh.faces.copy(), set()
    for edge in np.setdiff1d(np.arange(len(upward)), first):
        halves = upward[edge], twin[upward[edge]]
        if touched.isdisjoint(h // 3 for h in halves):
            touched.update(h // 3 for h in halves)
            a, b, c, d = (mesh.vertices[i] for i in (start[halves[0]], end[halves[0]],
                                                     *(mesh.faces[h // 3, (h + 2) % 3] for h in halves)))
            middle = len(vertices)
            vertices.append(np.float32(0.495) * (a + b) + np.float32(0.005) * (c + d))
            for h in halves:
                triangle = mesh.faces[h // 3]
                faces[h // 3] = np.where(triangle == end[h], middle, triangle)
                faces = np.concatenate([faces, np.where(triangle == start[h], middle, triangle)[None]])
    parted = Mesh(np.stack(vertices), faces)
    return part_pinches(parted) if touched else parted


def _without_folds(faces: np.ndarray) -> np.ndarray:
    """Faces without pairs that lie back to back on the same three vertices."""
    corners = np.sort(faces, 1)
    turned = (faces.argmin(1)[:, None] + [0, 1]) % 3
    second = np.take_along_axis(faces, turned, 1)[:, 1]
    side = np.where(second == corners[:, 1], 1, -1)
    count = faces.max() + 1
    _, group = np.unique((corners[:, 0] * count + corners[:, 1]) * count + corners[:, 2], return_inverse=True)
    balance, size = np.bincount(group, side), np.bincount(group)
    return faces[~((size == 2) & (balance == 0))[group]]


def _pair_around(vertices, faces, start, end, going, coming) -> np.ndarray:
    """Half-edges along one edge, some going a -> b, as many coming b -> a: the partner in `coming` of each going one.

    Seen along a -> b, the solid lies clockwise of a going face, so its partner is the next coming face clockwise.
    """
    a, b = vertices[start[going[0]]].astype(np.float64), vertices[end[going[0]]].astype(np.float64)
    axis = (b - a) / max(np.linalg.norm(b - a), 1e-20)
    side = np.cross(axis, np.eye(3)[np.abs(axis).argmin()])
    side /= np.linalg.norm(side)

    def angle(half_edges):
        third = vertices[faces[half_edges // 3, (half_edges + 2) % 3]] - a
        return np.arctan2(third @ np.cross(axis, side), third @ side)

    gap = (angle(going)[:, None] - angle(coming)[None]) % (2 * np.pi)
    return linear_sum_assignment(gap)[1]
