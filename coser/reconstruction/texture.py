"""A base-colour texture from posed views: the squarest views of a place decide, unseen places ask their neighbours."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from scipy.sparse import coo_matrix, diags
from scipy.sparse.csgraph import connected_components
from scipy.sparse.linalg import spsolve
from torch import Tensor

from coser.cameras import Cameras
from coser.reconstruction.mesh import Mesh
from coser.reconstruction.projection import NOTHING, project_views
from coser.reconstruction.texels import Texels, padded, texels_of
from coser.reconstruction.unwrap import unwrap
from coser.views import ViewSet

ENOUGH = 1 << 20  # texels tell the vertices' colours


def bake_texture(mesh: Mesh, views: ViewSet, cameras: Cameras, texture_size: int, tolerance: float = 0.02) -> Mesh:
    """The mesh with uvs, a texture of `texture_size` pixels a side, and vertex colours read off the same views.

    views: N >= 1 square views, with or without depths; cameras: their N perspective cameras. tolerance: how far (world
    units) a view's depth usually lies from the mesh where it sees it; places that a view saw elsewhere count less.
    Raises ValueError when no view sees any of the mesh.
    """
    uvs = unwrap(mesh, texture_size)
    texels = texels_of(torch.from_numpy(uvs), texture_size)
    colors, trust = project_views(mesh, texels, views.to("cpu"), cameras.to("cpu"), tolerance)
    vertex_colors = spread_colors(mesh, texels, colors, trust)
    around = texels.blend(torch.from_numpy(vertex_colors[mesh.faces]))
    colors = torch.lerp(around, colors, (trust / (trust + NOTHING))[:, None])
    return replace(mesh, uvs=uvs, texture=padded(texels, colors, texture_size), vertex_colors=vertex_colors)


def spread_colors(mesh: Mesh, texels: Texels, colors: Tensor, trust: Tensor) -> np.ndarray:
    """Texels' colours => vertices' [V,3] float32: the mean around a vertex where views see that, else as smooth a
    continuation along the surface as there is."""
    count = len(mesh.vertices)
    seen = (trust > NOTHING).nonzero()[:, 0]
    if not len(seen):
        raise ValueError("views do not see the mesh: no texel is visible in any view")
    seen = seen[::-(-len(seen) // ENOUGH)]  # as many as tell enough
    share = (texels.weights[seen]**3).double().numpy().ravel()  # those nearest to a vertex count most
    vertex = mesh.faces[texels.face[seen].numpy()].ravel()
    mass = np.bincount(vertex, share, count)
    wanted = colors[seen].double().numpy().repeat(3, 0) * share[:, None]
    sums = np.stack([np.bincount(vertex, wanted[:, k], count) for k in range(3)], -1)
    known = mass > 1e-3
    values = sums / np.maximum(mass, 1e-9)[:, None]
    if not known.all():
        values = _harmonic(mesh, values, known)
    return values.clip(0, 1).astype(np.float32)


def _harmonic(mesh: Mesh, values: np.ndarray, known: np.ndarray) -> np.ndarray:
    """Values [V,C] with the unknown ones the weighted means of their neighbours; parts without any known take the mean
    of all known."""
    count = len(mesh.vertices)
    edges = mesh.edges()
    length = np.linalg.norm(mesh.vertices[edges[:, 0]] - mesh.vertices[edges[:, 1]], axis=1)
    links = coo_matrix((1 / np.maximum(length, 1e-6), tuple(edges.T)), (count, count))
    links = (links + links.T).tocsr()
    values = np.where(known[:, None], values, values[known].mean(0))
    _, part = connected_components(links, directed=False)
    asked = ~known & (np.bincount(part, known)[part] > 0)
    if asked.any():
        rows = links[asked]
        system = diags(np.asarray(rows.sum(1)).ravel()) - rows[:, asked]
        values[asked] = spsolve(system.tocsc(), rows[:, known] @ values[known]).reshape(-1, values.shape[1])
    return values
