"""What posed views say of the texels of a mesh: what each view sees, how far to trust it, and who decides."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from scipy.sparse import coo_matrix, diags, identity
from torch import Tensor

from coser.cameras import Cameras
from coser.rasterizer import rasterize
from coser.reconstruction.mesh import Mesh
from coser.reconstruction.texels import Texels
from coser.views import ViewSet

SQUARENESS = 8.0  # a view's weight is cos^8 of the angle between ray and normal: the squarest view wins
MOST_VIEWS = 4  # a place is coloured by this many views at most
ROUNDS = 2  # in which weights are shared with the neighbouring vertices
MIN_COS = 0.05  # faces seen flatter are not seen
RASTER_SIZE = 256  # pixels a side at least, of the pictures that say which view sees what
JUMP = 0.02  # world units between neighbouring pixels' depths, beyond what a slope explains: one hides the other
SOFT = 5  # pixels over which trust in a view changes; what changes quicker shows as shards on rough surfaces
EDGE_TRUST = 1e-2  # what a view says of places beside its silhouettes and depth edges, against inside
HIDDEN = 0.5  # tolerances; what lies further behind what a view sees is hidden from it
NOTHING = 1e-8  # total weight below which no view has seen a place
CHUNK = 1 << 20  # texels at a time


def project_views(mesh: Mesh, texels: Texels, views: ViewSet, cameras: Cameras,
                  tolerance: float) -> tuple[Tensor, Tensor]:
    """Texels of the mesh => their colours [P,3] in the views and the weight [P] of those that see them: the MOST_VIEWS
    best of a place, and where these are hidden, all others. tolerance: as in `bake_texture`."""
    corners, faces = torch.from_numpy(mesh.vertices[mesh.faces]), torch.from_numpy(mesh.faces)
    seen, pictures = what_views_see(mesh, views, cameras, tolerance)
    visible = seen[faces].any(1) & (_cosines(corners, cameras) > MIN_COS)
    points = texels.blend(corners)
    colors, trust = torch.zeros_like(points), points.new_zeros(len(points))
    every, best = view_weights(mesh, seen, cameras)
    for weights, asked in ((best, torch.ones_like(trust, dtype=torch.bool)), (every, None)):
        asked = trust <= NOTHING if asked is None else asked
        for view in range(len(cameras) if asked.any() else 0):
            weight = weights[:, view][faces]
            useful = (visible[:, view] & (weight > 0).any(1)).index_select(0, texels.face)
            for index in (useful & asked).nonzero()[:, 0].split(CHUNK):
                color, share = look_up(points.index_select(0, index), pictures[view:view + 1], cameras[view], tolerance)
                share = share * texels[index].blend(weight[..., None])[:, 0]
                colors.index_add_(0, index, (color * share).T)
                trust.index_add_(0, index, share)
    return colors / trust.clamp_min(1e-20)[:, None], trust


def _cosines(corners: Tensor, cameras: Cameras) -> Tensor:
    """Faces' corners [F,3,3] => cosines [F,N] between their normals and the ways to the cameras."""
    normals = F.normalize(torch.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0], dim=-1), dim=-1)
    return (F.normalize(cameras.centers[:, None] - corners.mean(1), dim=-1) * normals).sum(-1).T


def look_up(points: Tensor, picture: Tensor, camera: Cameras, tolerance: float) -> tuple[Tensor, Tensor]:
    """Points [P,3] that face a camera => their colours [3,P] in its picture [1,6,R,R], and the trust in them [P]."""
    uv, depth = (t[0] for t in camera.project(points))
    grid = (uv * 2 - 1)[None, None]
    shown = F.grid_sample(picture, grid, align_corners=False)[0, :, 0]
    # cubics blur less, but swing beside silhouettes
    sharp = F.grid_sample(picture[:, :3], grid, "bicubic", align_corners=False)[0, :, 0]
    color = torch.where(shown[3] > 0.98, sharp, shown[:3] / shown[3].clamp_min(1e-3))
    allowed = depth * (4 / (camera.focal * picture.shape[-1])) + HIDDEN * tolerance  # two pixels more
    return color, shown[4] * (depth - 1 / shown[5].clamp_min(1e-6) < allowed)


def what_views_see(mesh: Mesh, views: ViewSet, cameras: Cameras, tolerance: float) -> tuple[Tensor, Tensor]:
    """Which views see which vertices [V,N] or a face beside them, and the views as pictures [N,6,R,R]: colour,
    premultiplied; mask; how far both are to be trusted; and 1 / depth of the mesh."""
    size = views.views.shape[-1]
    side = size * -(-RASTER_SIZE // size)
    faces = torch.from_numpy(mesh.faces)
    fragments = rasterize(torch.from_numpy(mesh.vertices), faces, cameras, side)
    hit = fragments.faces >= 0
    view = torch.arange(len(cameras))[:, None, None].expand_as(fragments.faces)[hit]
    seen = torch.zeros(len(mesh.vertices), len(cameras), dtype=torch.bool)
    seen[faces[fragments.faces[hit]], view[:, None]] = True
    nearness = torch.where(hit, 1 / fragments.depths.clamp_min(1e-6), 0.0)[:, None]
    trust = view_trust(nearness, views, tolerance)
    shown = F.interpolate(torch.cat([views.views, views.masks], 1), (side, side), mode="bilinear")
    return seen, torch.cat([shown, trust, nearness], 1)


def view_trust(nearness: Tensor, views: ViewSet, tolerance: float) -> Tensor:
    """1 / depth of the mesh in each view [N,1,R,R] => trust in the views' pixels [N,1,R,R]: 0 where a view does not
    show the mesh, EDGE_TRUST beside edges, 1 well inside."""
    side, size = nearness.shape[-1], views.views.shape[-1]
    reach = side // size  # raster pixels a pixel of the views
    near, far = F.max_pool2d(nearness, 3, 1, 1), -F.max_pool2d(-nearness, 3, 1, 1)
    # a plane's nearness is linear: its bend tells edges from slopes
    edge = (near + far - 2 * nearness).abs() > JUMP * nearness.square()
    masks = F.interpolate(views.masks, (side, side), mode="bilinear")
    edge = edge | (nearness == 0) | (masks < 0.98)
    inside = 1 - F.max_pool2d(edge.float(), 2 * reach + 1, 1, reach)
    trust = torch.where((nearness > 0) & (masks > 0.5), EDGE_TRUST + inside, 0.0)
    if (views.depths > 0).any():
        depths = F.interpolate(views.depths, (side, side), mode="nearest")
        hole = F.interpolate(F.max_pool2d(views.depths, 3, 1, 1), (side, side), mode="nearest") == 0
        off = (depths - 1 / nearness.clamp_min(1e-6)).abs() / tolerance
        close = torch.where((depths > 0) & (off < 6), torch.exp(-(off / 2).square()), 0.0)
        trust = trust * torch.where(hole, 1.0, close)  # where its depth map has a hole a view contradicts nothing
    half = SOFT * reach // 2
    soft = F.avg_pool2d(trust, 2 * half + 1, 1, half)
    return torch.where(trust > 0, soft, 0.0)


def view_weights(mesh: Mesh, seen: Tensor, cameras: Cameras) -> tuple[Tensor, Tensor]:
    """Which views see which vertices [V,N] => how much each has to say of them [V,N]: of all that see it, and of the
    MOST_VIEWS best, of which the next one takes off its own weight.

    Both change smoothly along the surface, so that neighbours are coloured from the same views however rough it is.
    """
    count = len(mesh.vertices)
    edges = mesh.edges()
    links = coo_matrix((np.ones(len(edges), np.float32), tuple(edges.T)), (count, count)).tocsr()
    links = links + links.T + identity(count, dtype=np.float32, format="csr")
    links = diags(1 / np.asarray(links.sum(1)).ravel()) @ links
    corners = mesh.vertices[mesh.faces]
    cross = np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0]).repeat(3, 0)
    normals = torch.from_numpy(np.stack([np.bincount(mesh.faces.ravel(), cross[:, k], count) for k in range(3)], -1))
    to_camera = F.normalize(cameras.centers - torch.from_numpy(mesh.vertices)[:, None], dim=-1)
    cosine = (to_camera * F.normalize(normals.float(), dim=-1)[:, None]).sum(-1)
    weights = (cosine.clamp_min(1e-2)**SQUARENESS * seen).numpy()
    for _ in range(ROUNDS):
        weights = links @ weights
    every = best = torch.from_numpy(np.ascontiguousarray(weights, np.float32))
    if len(cameras) > MOST_VIEWS:
        best = (every - every.kthvalue(len(cameras) - MOST_VIEWS, 1, keepdim=True)[0]).clamp_min(0)
    top = every.amax(1, keepdim=True).clamp_min(1e-20)
    return every / top, best / top
