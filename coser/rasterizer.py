"""Triangles to pixels in plain torch: a scanline rasteriser with a scatter-min z-buffer, on CPU and CUDA.

Every triangle is cut into one exact span of pixels a row, every span into fragments; the nearest fragment of a pixel
wins. A pixel belongs to a triangle when its centre lies in it; spans are half-open and computed from edges taken in one
canonical direction, so two triangles that share an edge neither overlap nor leave a gap.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from coser.cameras import Cameras
from coser.views import ViewSet

NEAR_PLANE = 1e-2  # triangles with a corner nearer than this are left out: objects are orbited, never entered
AMBIENT, DIFFUSE = 0.55, 0.45
LIGHT = (0.3, 0.8, 0.5)  # fixed to the object, so that shading is the same from every view


@dataclass(frozen=True)
class Fragments:
    """What each pixel sees: faces [N,S,S] int64 (-1 = nothing), depths [N,S,S] (0 = nothing)."""

    faces: Tensor
    depths: Tensor


def rasterize(vertices: Tensor, faces: Tensor, cameras: Cameras, size: int) -> Fragments:
    """Vertices [V,3], faces [F,3] int64 => Fragments of N views at size x size; devices follow `vertices`."""
    assert vertices.ndim == 2 and vertices.shape[1] == 3, vertices.shape
    assert faces.ndim == 2 and faces.shape[1] == 3, faces.shape
    cameras = cameras.to(vertices.device)
    uv, depth = cameras.project(vertices)
    corners = uv[:, faces].double() * size  # [N,F,3,2]; doubles, so that coverage does not depend on the corner order
    # 1/depth is linear in the picture under perspective, depth itself under an orthographic camera
    linear = depth[:, faces].double() if cameras.orthographic else 1 / depth[:, faces].double().clamp_min(NEAR_PLANE)
    visible = (depth[:, faces] > NEAR_PLANE).all(-1)
    shown = corners.clamp(0, size)
    area = torch.sum((shown.amax(2) - shown.amin(2)).prod(-1)[visible]) / 2
    # views a chunk: on a CPU one view at a time stays in cache; on a GPU as many as ~64 M fragments allow
    per_view = max(float(area) / max(len(cameras), 1), 1.0)
    chunk = 1 if vertices.device.type == "cpu" else max(1, int(64e6 / per_view))
    chunks = [slice(i, i + chunk) for i in range(0, len(cameras), chunk)]
    parts = [_rasterize_chunk(corners[s], linear[s], visible[s], size, cameras.orthographic) for s in chunks]
    return Fragments(torch.cat([p.faces for p in parts]), torch.cat([p.depths for p in parts]))


def _rasterize_chunk(corners: Tensor, linear: Tensor, visible: Tensor, size: int, orthographic: bool) -> Fragments:
    n, f = corners.shape[:2]
    device = corners.device
    corners, linear = corners.reshape(-1, 3, 2), linear.reshape(-1, 3)
    triangle, row, begin, count = _spans(corners, visible.reshape(-1), size)
    center = row + 0.5

    # the plane of the linear quantity over the picture: value = base + gx * x + gy * y
    a, b, c = corners.unbind(1)
    ab, ac = b - a, c - a
    det = ab[:, 0] * ac[:, 1] - ab[:, 1] * ac[:, 0]
    det = torch.where(det.abs() < 1e-12, torch.inf, det)  # seen edge-on: no slope, the first corner's depth
    du, dv = linear[:, 1] - linear[:, 0], linear[:, 2] - linear[:, 0]
    gx, gy = (du * ac[:, 1] - dv * ab[:, 1]) / det, (dv * ab[:, 0] - du * ac[:, 0]) / det
    at_row = linear[triangle, 0] + gx[triangle] * (0.5 - a[triangle, 0])
    at_row = at_row + gy[triangle] * (center - a[triangle, 1])
    bounds = linear.amin(1).float()[triangle], linear.amax(1).float()[triangle]

    span, column = _fragments_of(begin, count)
    value = torch.addcmul(at_row.float()[span], column.float(), gx.float()[triangle][span])
    value = torch.minimum(torch.maximum(value, bounds[0][span]), bounds[1][span])  # slivers must not extrapolate
    depth = value if orthographic else 1 / value
    pixel = ((triangle // f) * (size * size) + row * size)[span] + column
    # positive floats order like their bits: depth in the high half, face in the low half, one scatter-min for both
    key = (depth.view(torch.int32).long() << 32) | (triangle % f)[span]
    nothing = torch.iinfo(torch.int64).max
    buffer = torch.full((n * size * size,), nothing, dtype=torch.int64, device=device)
    buffer.scatter_reduce_(0, pixel, key, "amin")
    hit = buffer != nothing
    face = torch.where(hit, buffer & 0xFFFFFFFF, -1)
    depth = torch.where(hit, (buffer >> 32).int().view(torch.float32), 0.0)
    return Fragments(face.view(n, size, size), depth.view(n, size, size))


def covered_pixels(corners: Tensor, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Triangles in a picture, corners [F,3,2] in pixels => the (triangle, row, column) [P] of every pixel centre that
    lies in one; a centre that lies in several triangles comes several times."""
    triangle, row, begin, count = _spans(corners.double(), torch.ones_like(corners[:, 0, 0], dtype=torch.bool), size)
    span, column = _fragments_of(begin, count)
    return triangle[span], row[span], column


def _spans(corners: Tensor, visible: Tensor, size: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Corners [T,3,2] in pixels => one entry a (triangle, row): both, the first column and how many columns."""
    device = corners.device
    y = corners[..., 1]
    first = (y.amin(1) - 0.5).ceil().clamp(0, size).long()  # rows whose centre lies in [ymin, ymax)
    last = (y.amax(1) - 0.5).ceil().clamp(0, size).long()
    rows = torch.where(visible, last - first, 0)
    triangle = torch.repeat_interleave(torch.arange(len(rows), device=device), rows)
    row = first[triangle] + torch.arange(len(triangle), device=device)
    row = row - torch.repeat_interleave(rows.cumsum(0) - rows, rows)
    center = (row + 0.5)[:, None]  # where the row's centre line enters and leaves
    start, end = corners, corners.roll(-1, dims=1)
    swap = (start[..., 1] > end[..., 1]) | ((start[..., 1] == end[..., 1]) & (start[..., 0] > end[..., 0]))
    low, high = torch.where(swap[..., None], end, start), torch.where(swap[..., None], start, end)
    slope = (high[..., 0] - low[..., 0]) / (high[..., 1] - low[..., 1]).clamp_min(1e-12)
    low, high, slope = low[triangle], high[triangle], slope[triangle]
    crosses = (low[..., 1] <= center) & (center < high[..., 1])
    x = low[..., 0] + (center - low[..., 1]) * slope
    left = torch.where(crosses, x, torch.inf).amin(1)
    right = torch.where(crosses, x, -torch.inf).amax(1)
    begin = (left - 0.5).ceil().clamp(0, size).long()
    stop = (right - 0.5).ceil().clamp(0, size).long()
    return triangle, row, begin, (stop - begin).clamp_min(0)


def _fragments_of(begin: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
    """Spans => one entry a fragment: its span and its column."""
    span = torch.repeat_interleave(torch.arange(len(count), device=count.device), count)
    column = begin[span] + torch.arange(len(span), device=count.device)
    return span, column - torch.repeat_interleave(count.cumsum(0) - count, count)


def barycentrics(fragments: Fragments, pixels: tuple[Tensor, Tensor, Tensor], vertices: Tensor, faces: Tensor,
                 cameras: Cameras) -> Tensor:
    """World-space barycentric weights [P,3] of what the pixels (view [P], row [P], column [P]; all hits) see."""
    view, i, j = pixels
    size = fragments.faces.shape[-1]
    # of each face: a corner and the two vectors whose products with the way from there are the other corners' weights
    a, b, c = vertices[faces].unbind(1)
    ab, ac = b - a, c - a
    bb, bc, cc = ((p * q).sum(-1, keepdim=True) for p, q in ((ab, ab), (ab, ac), (ac, ac)))
    det = (bb * cc - bc * bc).clamp_min(1e-20)
    planes = torch.cat([a, (cc * ab - bc * ac) / det, (bb * ac - bc * ab) / det], 1).T.contiguous()
    face = planes.index_select(1, fragments.faces[pixels])  # rows of one coordinate each: several times quicker
    depth = fragments.depths[pixels]
    x, y = (j + 0.5) * (2 / size) - 1, 1 - (i + 0.5) * (2 / size)
    reach = 1.0 if cameras.orthographic else depth / cameras.focal
    local = torch.stack([x * reach, y * reach, -depth])
    pose = cameras.camera_to_world[:, :3].reshape(-1, 12).T.index_select(1, view).view(3, 4, -1)
    point = (pose[:, :3] * local).sum(1) + pose[:, 3]
    way = point - face[:3]
    wb, wc = (way * face[3:6]).sum(0), (way * face[6:]).sum(0)
    weights = torch.stack([1 - wb - wc, wb, wc]).clamp(0, 1)
    return (weights / weights.sum(0).clamp_min(1e-9)).T


def face_shading(vertices: Tensor, faces: Tensor, centers: Tensor) -> Tensor:
    """Two-sided Lambert plus ambient of each face as seen from camera positions [N,3]: brightness [N,F] in [0,1].

    The light is fixed to the object. A face's normal is taken on the side that the camera sees, so windings do not
    matter.
    """
    a, b, c = vertices[faces].unbind(1)
    normal = F.normalize(torch.cross(b - a, c - a, dim=-1), dim=-1)
    side = torch.sign(((centers[:, None] - a) * normal).sum(-1))
    light = F.normalize(torch.tensor(LIGHT, device=vertices.device), dim=0)
    return AMBIENT + DIFFUSE * (side * (normal @ light)).clamp_min(0)


def render(vertices: Tensor, faces: Tensor, corner_colors: Tensor, cameras: Cameras, size: int = 256,
           supersample: int = 2, shade: bool = True) -> ViewSet:
    """Mesh => ViewSet of N views (premultiplied colour, coverage, depth).

    vertices [V,3]; faces [F,3] int64; corner_colors [F,3,3] in [0,1], RGB of each face's corners. `supersample` >= 1
    samples a pixel side; a pixel's depth is the mean over its covered samples. On `vertices`' device.
    """
    cameras = cameras.to(vertices.device)
    fragments = _supersampled(vertices, faces, cameras, size, supersample)
    view, i, j = pixels = (fragments.faces >= 0).nonzero(as_tuple=True)
    face = fragments.faces[pixels]
    color = corner_colors[:, 0][face]
    # most low-poly faces have one colour: only the others need weights
    varied = (corner_colors != corner_colors[:, :1]).flatten(1).any(1)[face].nonzero()[:, 0]
    if len(varied):
        weights = barycentrics(fragments, (view[varied], i[varied], j[varied]), vertices, faces, cameras)
        color[varied] = torch.einsum("pk,pkc->pc", weights, corner_colors[face[varied]])
    if shade:
        color = color * face_shading(vertices, faces, cameras.centers)[view, face][:, None]
    return _resolved(fragments, pixels, color, supersample)


def render_textured(vertices: Tensor, faces: Tensor, uvs: Tensor, texture: Tensor, cameras: Cameras, size: int = 256,
                    supersample: int = 2) -> ViewSet:
    """As `render`, without shading, with colours looked up bilinearly: uvs [F,3,2] in [0,1], v down; texture [S,S,3]
    in [0,1], its texel centres as in `coser.cameras`."""
    cameras = cameras.to(vertices.device)
    fragments = _supersampled(vertices, faces, cameras, size, supersample)
    pixels = (fragments.faces >= 0).nonzero(as_tuple=True)
    weights = barycentrics(fragments, pixels, vertices, faces, cameras)
    places = torch.einsum("pk,pkc->pc", weights, uvs[fragments.faces[pixels]])
    color = F.grid_sample(texture.permute(2, 0, 1)[None], (places * 2 - 1)[None, None], padding_mode="border",
                          align_corners=False)[0, :, 0].T
    return _resolved(fragments, pixels, color, supersample)


def _supersampled(vertices: Tensor, faces: Tensor, cameras: Cameras, size: int, supersample: int) -> Fragments:
    if size < 1 or supersample < 1:
        raise ValueError(f"size and supersample must be at least 1, got {size} and {supersample}")
    return rasterize(vertices, faces, cameras, size * supersample)


def _resolved(fragments: Fragments, pixels: tuple[Tensor, Tensor, Tensor], color: Tensor, supersample: int) -> ViewSet:
    """Colours [P,3] of the samples that hit something => pixels of supersample^2 samples."""
    n, samples = fragments.faces.shape[:2]
    view, i, j = pixels
    picture = color.new_zeros(5, n * samples * samples)
    picture[:3, (view * samples + i) * samples + j] = color.T
    picture[3], picture[4] = (fragments.faces >= 0).flatten(), fragments.depths.flatten()
    picture = picture.view(5, n, samples, samples)
    picture = (F.avg_pool2d(picture, supersample) if supersample > 1 else picture).transpose(0, 1)
    masks = picture[:, 3:4]
    return ViewSet(picture[:, :3].contiguous(), masks.contiguous(),
                   torch.where(masks > 0, picture[:, 4:5] / masks.clamp_min(1e-6), 0.0))
