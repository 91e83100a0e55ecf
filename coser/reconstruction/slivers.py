"""Triangles without an area to speak of: taken out of a closed mesh, which stays closed."""

from __future__ import annotations

import numpy as np

from coser.reconstruction.mesh import Mesh

THIN = 1e-5  # of the mesh's longest side: triangles lower than this have no use and no sure normal
PASSES = 5


def without_slivers(mesh: Mesh) -> Mesh:
    """The mesh without triangles lower than THIN of its longest side: a short edge is collapsed, a long one across from
    the middle vertex turned. What cannot go without tearing the surface or turning a triangle over stays. Colours,
    normals and uvs are dropped where anything changes."""
    edit = _Edit(mesh)
    for _ in range(PASSES):
        thin = np.flatnonzero((_heights(edit.vertices[edit.faces]) < edit.least) & ~edit.gone)
        if not any([edit.mend(face) for face in thin]):
            break
    if not edit.changed:
        return mesh
    faces = edit.faces[~edit.gone]
    used, index = np.unique(faces, return_inverse=True)
    return Mesh(mesh.vertices[used], index.reshape(-1, 3).astype(np.int64))


def _heights(triangles: np.ndarray) -> np.ndarray:
    """Triangles [F,3,3] => their lowest heights [F], in the same units."""
    triangles = triangles.astype(np.float64)
    edges = np.roll(triangles, -1, 1) - triangles
    longest = np.linalg.norm(edges, axis=2).max(1)
    return np.linalg.norm(np.cross(edges[:, 0], edges[:, 1]), axis=1) / np.maximum(longest, 1e-30)


class _Edit:
    """A mesh that single edges are collapsed and turned in."""

    def __init__(self, mesh: Mesh):
        self.vertices, self.faces = mesh.vertices.astype(np.float64), mesh.faces.copy()
        self.gone = np.zeros(len(mesh.faces), bool)
        self.least = THIN * float(np.ptp(mesh.vertices, axis=0).max())
        self.changed = False
        order = np.argsort(mesh.faces.ravel(), kind="stable")
        self._around = order // 3, np.searchsorted(mesh.faces.ravel()[order], np.arange(len(mesh.vertices) + 1))
        self._sets: dict[int, set[int]] = {}

    def around(self, vertex: int) -> set[int]:
        """The faces around a vertex."""
        if vertex not in self._sets:
            faces, first = self._around
            self._sets[vertex] = set(faces[first[vertex]:first[vertex + 1]].tolist())
        return self._sets[vertex]

    def neighbours(self, vertex: int) -> set[int]:
        return set(self.faces[list(self.around(vertex))].ravel().tolist()) - {vertex}

    def mend(self, face: int) -> bool:
        """Collapses or turns an edge of a thin face; whether that could be done."""
        if self.gone[face] or _heights(self.vertices[self.faces[face]][None])[0] >= self.least:
            return False
        corners = self.faces[face].tolist()
        edges = [(corners[k], corners[(k + 1) % 3]) for k in range(3)]
        edges.sort(key=lambda e: (float(np.linalg.norm(self.vertices[e[0]] - self.vertices[e[1]])), e))
        done = any(self.collapse(*way) for way in (edges[0], edges[0][::-1])) or self.turn(*edges[2])
        self.changed |= done
        return done

    def collapse(self, stays: int, goes: int) -> bool:
        shared = self.around(stays) & self.around(goes)
        if len(shared) != 2 or len(self.neighbours(stays) & self.neighbours(goes)) != 2:
            return False  # the surface would be pinched
        if float(np.linalg.norm(self.vertices[stays] - self.vertices[goes])) > 100 * self.least:
            return False  # that would be seen
        moved = list(self.around(goes) - shared)
        after = np.where(self.faces[moved] == goes, stays, self.faces[moved])
        if not moved or self._worse(self.faces[moved], after):
            return False
        self.faces[moved] = after
        for face in shared:
            self.gone[face] = True
            for vertex in self.faces[face].tolist():
                self.around(vertex).discard(face)
        self.around(stays).update(moved)
        self._sets[goes] = set()
        return True

    def turn(self, a: int, b: int) -> bool:
        pair = sorted(self.around(a) & self.around(b))
        if len(pair) != 2:
            return False
        if self._across(pair[0], a, b) is None:  # the one that runs a -> b comes first
            pair.reverse()
        c, d = self._across(pair[0], a, b), self._across(pair[1], b, a)
        if c is None or d is None or c == d or d in self.neighbours(c):
            return False
        after = np.array([[a, d, c], [d, b, c]])
        triangles = self.vertices[after]
        if _heights(triangles).min() < self.least or self._worse(self.faces[pair], after, mean=True):
            return False
        self.faces[pair] = after
        for vertex in (a, b, c, d):
            self.around(vertex)
        for face, corners in zip(pair, after.tolist()):
            for vertex in (a, b, c, d):
                (self._sets[vertex].add if vertex in corners else self._sets[vertex].discard)(face)
        return True

    def _across(self, face: int, a: int, b: int) -> int | None:
        """The corner across from the edge a -> b, None where the face runs through it the other way."""
        corners = self.faces[face].tolist()
        start = corners.index(a)
        return corners[(start + 2) % 3] if corners[(start + 1) % 3] == b else None

    def _worse(self, before: np.ndarray, after: np.ndarray, mean: bool = False) -> bool:
        """Whether faces [F,3] would turn over (against their mean before, or each its own), or become thin."""
        old, new = (np.cross(t[:, 1] - t[:, 0], t[:, 2] - t[:, 0]) for t in (self.vertices[before],
                                                                           self.vertices[after]))
        if mean:
            old = np.broadcast_to(old.sum(0), new.shape)
        thinner = (_heights(self.vertices[after]) < self.least) & (_heights(self.vertices[before]) >= self.least)
        told = _heights(self.vertices[before]) >= self.least if not mean else np.ones(len(new), bool)
        return bool(thinner.any() or (((old * new).sum(1) < 0) & told).any())
