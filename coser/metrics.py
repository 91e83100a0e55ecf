"""How alike two sets of views are, how sharp one set is, and the views of a mesh."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from coser.cameras import Cameras
from coser.rasterizer import render, render_textured
from coser.reconstruction import Mesh
from coser.views import ViewSet


def psnr(pictures: Tensor, reference: Tensor) -> Tensor:
    """Two sets of pictures [N,C,H,W] in [0,1] => decibels [N], 100 at most."""
    _same_shape(pictures, reference)
    return -10 * (pictures - reference).square().mean((1, 2, 3)).clamp_min(1e-10).log10()


def silhouette_iou(masks: Tensor, reference: Tensor) -> Tensor:
    """Two sets of masks [N,1,H,W] => intersection over union of pixels covered by at least half, [N]; 1 if none is."""
    _same_shape(masks, reference)
    a, b = masks >= 0.5, reference >= 0.5
    union = (a | b).sum((1, 2, 3))
    return torch.where(union > 0, (a & b).sum((1, 2, 3)) / union.clamp_min(1), 1.0)


def ssim(pictures: Tensor, reference: Tensor) -> Tensor:
    """Two sets of pictures [N,C,H,W] in [0,1] => structural similarity [N] (Wang et al. 2004: 11 pixels, sigma 1.5)."""
    _same_shape(pictures, reference)
    ticks = torch.arange(-5.0, 6.0, device=pictures.device, dtype=pictures.dtype)
    window = F.softmax(-ticks.square() / (2 * 1.5**2), 0)
    channels = pictures.shape[1]

    def local_mean(values: Tensor) -> Tensor:
        values = F.conv2d(values, window.view(1, 1, -1, 1).expand(channels, 1, -1, 1), groups=channels)
        return F.conv2d(values, window.view(1, 1, 1, -1).expand(channels, 1, 1, -1), groups=channels)

    a, b = local_mean(pictures), local_mean(reference)
    variance_a, variance_b = local_mean(pictures.square()) - a.square(), local_mean(reference.square()) - b.square()
    covariance = local_mean(pictures * reference) - a * b
    c1, c2 = 0.01**2, 0.03**2
    brightness = (2 * a * b + c1) / (a.square() + b.square() + c1)
    structure = (2 * covariance + c2) / (variance_a + variance_b + c2)
    return (brightness * structure).mean((1, 2, 3))


def sharpness(views: ViewSet) -> Tensor:
    """How much neighbouring pixels differ: mean absolute Laplacian of the brightness (0..255) well inside the object of
    each view, [N]; 0 where nothing is. For comparing pictures of the same things: noise counts as sharp, too."""
    grey = views.views.mean(1, keepdim=True) * 255
    kernel = torch.tensor([[0., -1, 0], [-1, 4, -1], [0, -1, 0]], device=grey.device)[None, None].to(grey.dtype)
    inside = 1 - F.max_pool2d(1 - (views.masks >= 0.99).to(grey.dtype), 5, 1, 2)
    edges = F.conv2d(grey, kernel, padding=1).abs()
    return (edges * inside).sum((1, 2, 3)) / inside.sum((1, 2, 3)).clamp_min(1)


def render_mesh(mesh: Mesh, cameras: Cameras, size: int) -> ViewSet:
    """A reconstructed mesh seen by N cameras at size x size, in its own colours (they carry the views' shading): those
    of its texture where it has one, else those of its vertices."""
    vertices, faces, cameras = torch.from_numpy(mesh.vertices), torch.from_numpy(mesh.faces), cameras.to("cpu")
    if mesh.texture is not None:
        texture = torch.from_numpy(mesh.texture).float() / 255
        return render_textured(vertices, faces, torch.from_numpy(mesh.uvs), texture, cameras, size)
    if mesh.vertex_colors is None:
        raise ValueError("mesh must have a texture or vertex_colors to be drawn, got neither")
    return render(vertices, faces, torch.from_numpy(mesh.vertex_colors)[faces], cameras, size, shade=False)


def _same_shape(a: Tensor, b: Tensor) -> None:
    if a.shape != b.shape:
        raise ValueError(f"both sets must have one shape, got {list(a.shape)} and {list(b.shape)}")
