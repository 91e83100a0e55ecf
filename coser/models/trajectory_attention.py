"""Detail refinement (DR): tokens ask small windows in the neighbouring views, where a turn of the ring carries them."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from coser.cameras import Cameras, pixel_centers
from coser.models.adjacent_attention import SilentAttention, attend, gather_views, ring_neighbours

DENSE_TOKENS = 256  # up to here a masked dense attention beats gathering windows


def cylinder_depths(cameras: Cameras, uv: Tensor, radius: float) -> Tensor:
    """Depths [N,P] at which the rays through uv [P,2] meet the front of an upright cylinder around the world's y axis.

    radius in world units. A ray that misses the cylinder gets the depth of its nearest approach to the axis.
    """
    origins, directions = cameras.rays(uv)
    origin, direction = origins[..., [0, 2]], directions[..., [0, 2]]
    a = direction.square().sum(-1).clamp_min(1e-12)
    half_b = (origin * direction).sum(-1)
    discriminant = half_b.square() - a * (origin.square().sum(-1) - radius**2)
    return (-half_b - discriminant.clamp_min(0).sqrt()) / a


def trajectory_coordinates(cameras: Cameras, uv: Tensor, depths: Tensor, offset: int) -> tuple[Tensor, Tensor]:
    """Where points seen at uv [P,2] in view i, at depths [N,P], appear in view i + offset of the ring.

    => uv [N,P,2] there, and depth [N,P] there (not positive: behind that camera). With level orthographic cameras and x
    from the left edge of a picture of width W this is the paper's x' = W/2 + (x - W/2) cos da + d sin da, y' = y
    (CoSER, section 3.3) for d the depth behind the turning axis and da the angle from view i to view i + offset.
    """
    points = cameras.unproject(uv, depths)
    neighbour = (torch.arange(len(cameras), device=cameras.device) + offset) % len(cameras)
    return cameras[neighbour].project(points)


def window_samples(uv: Tensor, size: int, window: int) -> tuple[Tensor, Tensor, Tensor]:
    """The window x window tokens around uv [...,2] in a picture of size x size tokens.

    => token indices [...,window^2] (row by row, clamped into the picture), their squared distances to uv in tokens, and
    whether they lie inside the picture (boolean).
    """
    center = uv * size - 0.5
    # the nudge decides exact halves the same way for every view, whatever the rounding of its pose
    nearest = torch.floor(center + 0.5 + 1e-3)
    ticks = torch.arange(window, device=uv.device) - window // 2
    dy, dx = torch.meshgrid(ticks, ticks, indexing="ij")
    samples = nearest[..., None, :] + torch.stack([dx.flatten(), dy.flatten()], -1)
    inside = ((samples >= 0) & (samples < size)).all(-1)
    distances = (samples - center[..., None, :]).square().sum(-1)
    column, row = samples.clamp(0, size - 1).long().unbind(-1)
    return row * size + column, distances, inside


@dataclass(frozen=True)
class TrajectoryGeometry:
    """Which tokens of which neighbours every token asks, for one ring of cameras and one resolution.

    offsets: the neighbours, K of them. samples [N,T,K*w*w]: indices into the K*T tokens of the neighbours. bias, same
    shape: added to the scores, minus infinity out of view. asks [N,T,1]: 0 for tokens with no sample in view, else 1.
    """

    offsets: tuple[int, ...]
    samples: Tensor
    bias: Tensor
    asks: Tensor

    def dense_bias(self) -> Tensor:
        """The same as a bias over all tokens of the neighbours, [N,T,K*T]."""
        num_views, tokens, _ = self.samples.shape
        count = len(self.offsets) * tokens
        # clamped samples may coincide with true ones: an extra column takes those that are out of view
        target = torch.where(self.bias.isfinite(), self.samples, count)
        bias = self.bias.new_full((num_views, tokens, count + 1), -math.inf)
        bias = bias.scatter(2, target, self.bias)[..., :count]
        return torch.where(self.asks > 0, bias, 0.0)


def trajectory_geometry(cameras: Cameras, size: int, window: int, radius: float) -> TrajectoryGeometry:
    """The windows for views of size x size tokens and the cylinder of `radius` (world units) as depth hypothesis.

    Nearness is a mild prior, -distance^2 / (2 sigma^2) with sigma half a window: where contents say nothing, the
    middle of the window counts most. Expects at least two cameras.
    """
    offsets = ring_neighbours(len(cameras))
    with torch.no_grad(), torch.autocast(cameras.device.type, enabled=False):
        uv = pixel_centers(size, cameras.device)
        depths = cylinder_depths(cameras, uv, radius)
        samples, biases = [], []
        for k, offset in enumerate(offsets):
            there, depth = trajectory_coordinates(cameras, uv, depths, offset)
            index, distances, inside = window_samples(there, size, window)
            seen = inside & (depth > 0)[..., None]
            samples.append(index + k * size * size)
            biases.append((-distances / (2 * (window / 2) ** 2)).masked_fill(~seen, -math.inf))
        bias = torch.cat(biases, -1)
        asks = bias.isfinite().any(-1, keepdim=True)
        return TrajectoryGeometry(offsets, torch.cat(samples, -1), bias.masked_fill(~asks, 0.0), asks.to(bias.dtype))


class TrajectoryGeometries:
    """The geometry of one ring of cameras at every resolution asked for, each computed once.

    A forward pass asks for the same few tables in every block, and sampling for the same ones at every step.
    """

    def __init__(self, cameras: Cameras, window: int, radius: float):
        self.cameras, self.window, self.radius = cameras, window, radius
        self._sparse: dict[int, TrajectoryGeometry] = {}
        self._dense: dict[tuple, tuple[Tensor, Tensor]] = {}

    def sparse(self, size: int) -> TrajectoryGeometry:
        if size not in self._sparse:
            with torch.inference_mode(False):
                self._sparse[size] = trajectory_geometry(self.cameras, size, self.window, self.radius)
        return self._sparse[size]

    def dense(self, size: int, batch: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Bias [batch*N,1,T,K*T] and asks [batch*N,T,1] in `dtype`."""
        key = (size, batch, dtype)
        if key not in self._dense:
            geometry = self.sparse(size)
            with torch.inference_mode(False):
                bias = geometry.dense_bias().to(dtype).repeat(batch, 1, 1)[:, None]
                self._dense[key] = bias, geometry.asks.to(dtype).repeat(batch, 1, 1)
        return self._dense[key]


class TrajectoryAttention(SilentAttention):
    """Attention along trajectories, silent at first.

    forward: tokens [B*N,T,C], num_views, geometries => [B*N,T,C], to be added to the tokens. One view has no
    neighbours: zeros.
    """

    def forward(self, tokens: Tensor, num_views: int, geometries: TrajectoryGeometries) -> Tensor:
        if num_views == 1:
            return torch.zeros_like(tokens)
        normed = self.norm(tokens)
        q, k, v = self.to_q(normed), self.to_k(normed), self.to_v(normed)
        route = self.attend_dense if tokens.shape[1] <= DENSE_TOKENS else self.attend_windows
        return self.to_out(route(q, k, v, num_views, geometries))

    def attend_dense(self, q: Tensor, k: Tensor, v: Tensor, num_views: int, geometries: TrajectoryGeometries) -> Tensor:
        """Few tokens: attention over all tokens of the neighbours with everything outside the windows masked."""
        size, batch = math.isqrt(q.shape[1]), len(q) // num_views
        bias, asks = geometries.dense(size, batch, q.dtype)
        offsets = ring_neighbours(num_views)
        k, v = (gather_views(t, num_views, offsets) for t in (k, v))
        return attend(q, k, v, self.heads, bias) * asks

    def attend_windows(self, q: Tensor, k: Tensor, v: Tensor, num_views: int,
                       geometries: TrajectoryGeometries) -> Tensor:
        """Many tokens: gathers each window, linear in the number of tokens. The same result as `attend_dense`."""
        geometry = geometries.sparse(math.isqrt(q.shape[1]))
        (n, count, inner), (_, _, asked) = q.shape, geometry.samples.shape
        k, v = (gather_views(t, num_views, geometry.offsets) for t in (k, v))
        rows = torch.arange(n, device=q.device)[:, None] * k.shape[1]
        batch = n // num_views
        index = (geometry.samples.view(num_views, -1).repeat(batch, 1) + rows).flatten()
        k, v = (t.reshape(-1, inner).index_select(0, index).view(n * count, asked, inner) for t in (k, v))
        bias = geometry.bias.to(q.dtype).repeat(batch, 1, 1).view(n * count, 1, 1, asked)
        hidden = attend(q.reshape(n * count, 1, inner), k, v, self.heads, bias).view(n, count, inner)
        return hidden * geometry.asks.to(q.dtype).repeat(batch, 1, 1)
