"""A base-colour texture from posed views: the squarest view of a place decides, unseen places ask their neighbours."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from scipy.sparse import coo_matrix, diags
from scipy.sparse.csgraph import connected_components
from scipy.sparse.linalg import spsolve
from torch import Tensor

from coser.cameras import Cameras
from coser.rasterizer import covered_pixels, rasterize
from coser.reconstruction.mesh import Mesh
from coser.reconstruction.normals import with_normals
from coser.reconstruction.unwrap import unwrap
from coser.views import ViewSet

SQUARENESS = 8.0  # a view's weight is cos^8 of the angle between ray and normal: the squarest view wins
MIN_COS = 0.05
MOST_VIEWS = 4  # a place is coloured by this many views at most
RASTER_SIZE = 256  # pixels a side at least, of the pictures that say which view sees what
JUMP = 0.02  # world units between neighbouring pixels' depths, on top of what a slope explains: one hides the other
EDGE_TRUST = 1e-2  # what a view says of places beside its silhouettes and depth edges, against inside
SEEN = 1e-8  # total weight below which neighbours on the surface join in
DILATION = 4  # texels; beyond, gaps are filled with ever coarser means
CHUNK = 1 << 20  # texels at a time


@dataclass(frozen=True)
class Texels:
    """P texels that lie on the mesh: row, column [P], their face [P] and where on it, as weights [P,3] of its corners."""

    row: Tensor
    column: Tensor
    face: Tensor
    weights: Tensor


def bake_texture(mesh: Mesh, views: ViewSet, cameras: Cameras, texture_size: int, tolerance: float = 0.02) -> Mesh:
    """The mesh with uvs, a texture of `texture_size` pixels a side, and vertex colours read off the same views.

    views: N >= 1 square views, with or without depths; cameras: their N perspective cameras. tolerance: how far (world
    units) a view's depth usually lies from the mesh where it sees it; places that a view saw elsewhere count less.
    Raises ValueError when no view sees any of the mesh.
    """
    if mesh.normals is None:
        mesh = with_normals(mesh)
    uvs = unwrap(mesh, texture_size)
    texels = texels_of(torch.from_numpy(uvs), texture_size)
    views, cameras = views.to("cpu"), cameras.to("cpu")
    pairs, pictures = visible_faces(mesh, views, cameras, tolerance)
    colors, trust = sample_views(mesh, texels, pairs, pictures, cameras)
    vertex_colors = spread_colors(mesh, texels, colors, trust)
    own = blend(texels, torch.from_numpy(vertex_colors[mesh.faces]))
    share = trust / (trust + SEEN)
    colors = torch.lerp(own, colors, share[:, None])
    texture = padded(texels, colors, texture_size)
    return replace(mesh, uvs=uvs, texture=texture, vertex_colors=vertex_colors)


def texels_of(uvs: Tensor, texture_size: int) -> Texels:
    """uvs [F,3,2] => the texels whose centres lie on a face; a face too small for any gets the texel at its middle,
    unless that belongs to another."""
    corners = uvs.double() * texture_size
    face, row, column = covered_pixels(corners, texture_size)
    taken = torch.zeros(texture_size, texture_size, dtype=torch.bool)
    taken[row, column] = True
    small = torch.bincount(face, minlength=len(uvs)) == 0
    middle = corners[small].mean(1).long().clamp(0, texture_size - 1)
    free = ~taken[middle[:, 1], middle[:, 0]]
    face = torch.cat([face, small.nonzero()[:, 0][free]])
    row, column = torch.cat([row, middle[free, 1]]), torch.cat([column, middle[free, 0]])
    x, y, constant = _plane_weights(corners).index_select(0, face).unbind(2)
    weights = torch.addcmul(torch.addcmul(constant, x, column[:, None] + 0.5), y, row[:, None] + 0.5).clamp(0, 1)
    return Texels(row, column, face, weights / weights.sum(1, keepdim=True).clamp_min(1e-9))


def _plane_weights(corners: Tensor) -> Tensor:
    """Corners [F,3,2] in pixels => [F,3,3]: times (x, y, 1), a pixel's barycentric weights; thirds where degenerate."""
    a, b, c = corners.unbind(1)
    ab, ac = b - a, c - a
    area = ab[:, 0] * ac[:, 1] - ab[:, 1] * ac[:, 0]
    flat = area.abs() < 1e-9
    area = torch.where(flat, 1.0, area)[:, None]
    second = torch.stack([ac[:, 1], -ac[:, 0], ac[:, 0] * a[:, 1] - ac[:, 1] * a[:, 0]], 1) / area
    third = torch.stack([-ab[:, 1], ab[:, 0], ab[:, 1] * a[:, 0] - ab[:, 0] * a[:, 1]], 1) / area
    first = -second - third
    first[:, 2] += 1
    weights = torch.stack([first, second, third], 1)
    weights[flat] = torch.tensor([0.0, 0, 1 / 3], dtype=weights.dtype)
    return weights.float()


def visible_faces(mesh: Mesh, views: ViewSet, cameras: Cameras, tolerance: float) -> tuple[Tensor, Tensor]:
    """Which views see which faces [F,N], and the views as pictures [N,6,R,R]: colour, premultiplied; mask; how far both
    are to be trusted; and 1 / depth of the mesh."""
    size = views.views.shape[-1]
    side = size * max(1, -(-RASTER_SIZE // size))
    fragments = rasterize(torch.from_numpy(mesh.vertices), torch.from_numpy(mesh.faces), cameras, side)
    hit = fragments.faces >= 0
    view = torch.arange(len(cameras))[:, None, None].expand_as(fragments.faces)[hit]
    # faces around a seen vertex are seen: single ones may be smaller than a pixel
    corners = torch.from_numpy(mesh.faces)
    seen = torch.zeros(len(mesh.vertices), len(cameras), dtype=torch.bool)
    seen[corners[fragments.faces[hit]], view[:, None]] = True
    pairs = seen[corners].any(1)
    nearness = torch.where(hit, 1 / fragments.depths.clamp_min(1e-6), 0.0)[:, None]
    trust = edge_trust(nearness, views, tolerance, cameras)
    shown = F.interpolate(torch.cat([views.views, views.masks], 1), (side, side), mode="bilinear")
    return pairs, torch.cat([shown, trust, nearness], 1)


def edge_trust(nearness: Tensor, views: ViewSet, tolerance: float, cameras: Cameras) -> Tensor:
    """[N,1,R,R] in [0,1]: 0 where a view does not show the mesh, EDGE_TRUST beside edges, 1 two pixels inside."""
    side, size = nearness.shape[-1], views.views.shape[-1]
    reach = side // size  # raster pixels a pixel of the views
    window = 2 * reach + 1
    near, far = F.max_pool2d(nearness, 3, 1, 1), -F.max_pool2d(-nearness, 3, 1, 1)
    # a plane's nearness is linear: the bend of it tells edges from slopes
    bend = (near + far - 2 * nearness).abs()
    edge = bend > JUMP * nearness.square()
    masks = F.interpolate(views.masks, (side, side), mode="bilinear")
    edge = edge | (nearness == 0) | (masks < 0.98)
    inside = 1 - F.max_pool2d(edge.float(), window, 1, reach)
    inside = F.avg_pool2d(inside, window, 1, reach) * inside
    trust = torch.where((nearness > 0) & (masks > 0.5), EDGE_TRUST + inside, 0.0)
    if bool((views.depths > 0).any()):
        depths = F.interpolate(views.depths, (side, side), mode="nearest")
        off = torch.where(nearness > 0, (depths - 1 / nearness.clamp_min(1e-6)).abs() / tolerance, 0.0)
        trust = trust * torch.where(depths > 0, torch.exp(-(off / 2).square()) * (off < 6), 0.0)
    return trust


def sample_views(mesh: Mesh, texels: Texels, pairs: Tensor, pictures: Tensor,
                 cameras: Cameras) -> tuple[Tensor, Tensor]:
    """Texels => colours [P,3] and the weight [P] of the views that see them."""
    corners = torch.from_numpy(mesh.vertices[mesh.faces])
    points, normals = blend(texels, corners), F.normalize(blend(texels, torch.from_numpy(mesh.normals)), dim=-1)
    chosen = best_views(corners, pairs, cameras)
    colors, trust = torch.zeros_like(points), points.new_zeros(len(points))
    for view in range(len(cameras)):
        asked = chosen[:, view].contiguous().index_select(0, texels.face).nonzero()[:, 0]
        for index in asked.split(CHUNK):
            point = points.index_select(0, index)
            uv, depth = (t[0] for t in cameras[view].project(point))
            grid = (uv * 2 - 1)[None, None]
            picture = F.grid_sample(pictures[view:view + 1], grid, align_corners=False)[0, :, 0]
            # cubics blur less, but swing beside silhouettes
            sharp = F.grid_sample(pictures[view:view + 1, :3], grid, "bicubic", align_corners=False)[0, :, 0]
            color = torch.where(picture[3] > 0.98, sharp, picture[:3] / picture[3].clamp_min(1e-3))
            to_camera = cameras.centers[view] - point
            cosine = (to_camera * normals.index_select(0, index)).sum(-1) / to_camera.norm(dim=-1)
            allowed = depth * (4 / (cameras.focal * pictures.shape[-1])) + 1e-3  # two pixels
            weight = cosine.clamp_min(0)**SQUARENESS + 1e-6
            weight = weight * picture[4] * (depth - 1 / picture[5].clamp_min(1e-6) < allowed)
            colors.index_add_(0, index, (color * weight).T)
            trust.index_add_(0, index, weight)
    return colors / trust.clamp_min(1e-20)[:, None], trust


def best_views(corners: Tensor, pairs: Tensor, cameras: Cameras) -> Tensor:
    """Faces' corners [F,3,3], and which views see them [F,N] => the MOST_VIEWS squarest ones of these [F,N]."""
    normals = F.normalize(torch.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0], dim=-1), dim=-1)
    cosine = (F.normalize(cameras.centers[:, None] - corners.mean(1), dim=-1) * normals).sum(-1).T
    cosine = torch.where(pairs & (cosine > MIN_COS), cosine, 0.0)
    best = cosine.topk(min(MOST_VIEWS, len(cameras)), 1)
    return torch.zeros_like(pairs).scatter_(1, best.indices, best.values > 0)


def blend(texels: Texels, values: Tensor) -> Tensor:
    """What the faces' corners carry, [F,3,C] => the texels' [P,C]."""
    parts = values.reshape(len(values), -1).index_select(0, texels.face).view(-1, *values.shape[1:])
    return torch.einsum("pk,pkc->pc", texels.weights, parts)


def spread_colors(mesh: Mesh, texels: Texels, colors: Tensor, trust: Tensor) -> np.ndarray:
    """Texels' colours => vertices' [V,3] float32: the mean around a vertex where views see that, else as smooth a
    continuation along the surface as there is."""
    count = len(mesh.vertices)
    seen = trust > SEEN
    if not bool(seen.any()):
        raise ValueError("views do not see the mesh: no texel is visible in any view")
    share = (texels.weights[seen]**3).numpy().ravel().astype(np.float64)
    vertex = mesh.faces[texels.face[seen].numpy()].ravel()
    mass = np.bincount(vertex, share, count)
    sums = np.stack([np.bincount(vertex, share * colors[seen, k].numpy().repeat(3), count) for k in range(3)], -1)
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


def padded(texels: Texels, colors: Tensor, texture_size: int) -> np.ndarray:
    """Colours [P,3] in [0,1] at their texels, continued over the gaps => texture uint8 [S,S,3]."""
    picture = np.zeros((texture_size, texture_size, 3), np.float32)
    covered = np.zeros((texture_size + 2, texture_size + 2), bool)
    inside = covered[1:-1, 1:-1]
    row, column = texels.row.numpy(), texels.column.numpy()
    picture[row, column], inside[row, column] = colors.clamp(0, 1).numpy(), True
    ways = [(y, x) for y in (-1, 0, 1) for x in (-1, 0, 1) if (y, x) != (0, 0)]
    for _ in range(DILATION):
        near = np.zeros_like(inside)
        for y, x in ways:
            near |= covered[1 + y:texture_size + 1 + y, 1 + x:texture_size + 1 + x]
        row, column = np.nonzero(near & ~inside)
        total, count = np.zeros((len(row), 3), np.float32), np.zeros((len(row), 1), np.float32)
        for y, x in ways:
            known = covered[row + 1 + y, column + 1 + x]
            total[known] += picture[row[known] + y, column[known] + x]
            count[known] += 1
        picture[row, column], inside[row, column] = total / count, True
    _fill(picture, inside)
    return (picture * 255 + 0.5).astype(np.uint8)


def _fill(picture: np.ndarray, covered: np.ndarray) -> None:
    """Gives the places of a picture [S,S,3] that are not covered [S,S] the mean of what lies around them, taken over
    squares of 2, 4, 8, ... as far as it takes."""
    row, column = np.nonzero(~covered)
    if not len(row) or len(row) == covered.size:
        return
    half = -(-len(picture) // 2)
    sums, count = np.zeros((half, half, 3), np.float32), np.zeros((half, half), np.float32)
    for y in (0, 1):
        for x in (0, 1):
            part, there = picture[y::2, x::2], covered[y::2, x::2]
            height, width = there.shape
            sums[:height, :width] += part * there[..., None]
            count[:height, :width] += there
    coarse = sums / np.maximum(count, 1)[..., None]
    _fill(coarse, count > 0)
    picture[row, column] = coarse[row // 2, column // 2]
