"""Vertex colours from posed views: the squarest view of a place decides, unseen places ask their neighbours."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from scipy.sparse import csr_matrix, diags
from scipy.sparse.csgraph import dijkstra
from scipy.sparse.linalg import cg
from torch import Tensor

from coser.cameras import Cameras
from coser.reconstruction.mesh import Mesh
from coser.views import ViewSet

SQUARENESS = 6.0  # a view's weight is cos^6 of the angle between ray and normal: the squarest view wins
MIN_COS = 0.1
# where on a face its colour is looked up: weights of its corners
SAMPLES = ((1 / 3, 1 / 3, 1 / 3), (2 / 3, 1 / 6, 1 / 6), (1 / 6, 2 / 3, 1 / 6), (1 / 6, 1 / 6, 2 / 3))
AT_ONCE = 65536  # places that are looked up in all views at once
STIFFNESS = 0.05  # how strongly a vertex is held to the mean of its neighbours, against one looked-up colour


def color_vertices(mesh: Mesh, views: ViewSet, cameras: Cameras, tolerance: float) -> np.ndarray:
    """Mesh => colours [V,3] float32 in [0,1] that, interpolated over the faces, agree best with the views.

    tolerance: how far (world units) a view's depth usually lies from the mesh where it sees it; views further off count
    less, and from three times as far not at all. Colours that several samples ask of a vertex are settled by least
    squares; vertices without a sample take the colour of the nearest coloured vertex along the surface. Raises
    ValueError when no view sees any of the mesh.
    """
    device = views.views.device
    corners = torch.as_tensor(mesh.vertices[mesh.faces], device=device)
    weights = torch.tensor(SAMPLES, device=device)
    points = torch.einsum("sk,fkc->fsc", weights, corners).reshape(-1, 3)
    normals = torch.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0], dim=-1)
    area = normals.norm(dim=-1) / 2
    normals = F.normalize(normals, dim=-1).repeat_interleave(len(SAMPLES), 0)
    parts = zip(points.split(AT_ONCE), normals.split(AT_ONCE))
    colors, trust = map(torch.cat, zip(*(sample_colors(*part, views, cameras, tolerance) for part in parts)))
    trust = (trust > 0) * area.repeat_interleave(len(SAMPLES))
    return _settle(mesh, colors.cpu().numpy(), trust.cpu().numpy())


def sample_colors(points: Tensor, normals: Tensor, views: ViewSet, cameras: Cameras,
                  tolerance: float) -> tuple[Tensor, Tensor]:
    """Surface points [P,3], unit normals [P,3] => colours [P,3] and the weight of the views that see them [P]."""
    n, _, size, _ = views.views.shape
    uv, depth = cameras.project(points)
    grid = (uv * 2 - 1)[:, None]
    picture = F.grid_sample(torch.cat([views.views, views.masks], 1), grid, align_corners=False)[:, :, 0]
    seen = F.grid_sample(views.depths, grid, mode="nearest", align_corners=False)[:, 0, 0]
    to_camera = F.normalize(cameras.centers[:, None] - points, dim=-1)
    cosine = (to_camera * normals).sum(-1)
    off = (seen - depth).abs() * cosine / tolerance
    visible = (picture[:, 3] > 0.9) & (cosine > MIN_COS) & (off < 3)
    weight = torch.where(visible, cosine.clamp_min(0) ** SQUARENESS * torch.exp(-off.square()), 0.0)
    color = picture[:, :3] / picture[:, 3:].clamp_min(1e-3)
    total = weight.sum(0)
    return ((weight[:, None] * color).sum(0) / total.clamp_min(1e-9)).T, total


def _settle(mesh: Mesh, colors: np.ndarray, trust: np.ndarray) -> np.ndarray:
    """Colours [F*S,3] wanted at the samples of the faces, trusted [F*S] => the vertices' colours [V,3]."""
    count = len(mesh.vertices)
    used = np.flatnonzero(trust > 0)
    if not len(used):
        raise ValueError("views do not see the mesh: no sample of any face is visible in any view")
    weight = np.sqrt(trust[used] / trust[used].mean())
    shares = np.tile(np.asarray(SAMPLES), (len(mesh.faces), 1))[used] * weight[:, None]
    corners = np.repeat(mesh.faces, len(SAMPLES), 0)[used]
    design = csr_matrix((shares.ravel(), corners.ravel(), np.arange(0, 3 * len(used) + 1, 3)), (len(used), count))
    edges = mesh.edges()
    links = csr_matrix((np.ones(len(edges)), tuple(edges.T)), (count, count))
    links = links + links.T
    wanted, mass = design.T @ (colors[used] * weight[:, None]), design.T @ weight
    known = mass > 0
    start = _spread(mesh, links, known, wanted / np.maximum(mass, 1e-9)[:, None])
    normal = design.T @ design + STIFFNESS * (diags(np.asarray(links.sum(1)).ravel()) - links)
    settled = np.stack([cg(normal, wanted[:, k], x0=start[:, k], rtol=1e-3, maxiter=30)[0] for k in range(3)], -1)
    return np.where(known[:, None], settled, start).clip(0, 1).astype(np.float32)


def _spread(mesh: Mesh, links: csr_matrix, known: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Values [V,C] of the known vertices => of all: an unknown vertex takes those of the nearest along the surface."""
    if known.all():
        return values
    rows, columns = links.nonzero()
    lengths = np.linalg.norm(mesh.vertices[rows] - mesh.vertices[columns], axis=1)
    graph = csr_matrix((np.maximum(lengths, 1e-9), (rows, columns)), links.shape)
    _, _, source = dijkstra(graph, indices=np.flatnonzero(known), min_only=True, return_predecessors=True)
    reached = source >= 0
    out = values.copy()
    out[reached] = values[source[reached]]
    out[~reached] = values[known].mean(0)  # a part that no view sees at all
    return out
