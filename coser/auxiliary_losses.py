"""Losses beside the flow's: true correspondences for the trajectory attention, and dispersed features."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from coser.cameras import Cameras, pixel_centers
from coser.data.dataset import Ring, mirror_views
from coser.data.render import load_ring
from coser.models.adjacent_attention import gather_views, ring_neighbours
from coser.models.trajectory_attention import TrajectoryAttention, TrajectoryGeometries
from coser.models.unet import MultiviewUNet

DEPTH_SIZE = 32  # side of the depth maps that tell where tokens truly go: four samples across an 8x8 token
SAME_PLACE = 0.08  # world units by which two depths of one place may differ, seen through such coarse maps
TEMPERATURE = 0.5  # of the dispersive loss, as its paper has it


def sampled_depths(ring: Ring) -> Tensor:
    """Depths of a ring's views at the middles of DEPTH_SIZE x DEPTH_SIZE cells, [V,DEPTH_SIZE,DEPTH_SIZE], 0 for
    nothing."""
    views, _ = load_ring(ring.path)
    depths = (mirror_views(views) if ring.mirrored else views).depths[:, 0]
    step = depths.shape[-1] // DEPTH_SIZE
    return depths[:, step // 2::step, step // 2::step].clone()


def true_matches(depths: Tensor, cameras: Cameras, size: int, offset: int) -> Tensor:
    """Which token of view i + offset shows what the middle of each token of view i shows.

    depths [B,N,DEPTH_SIZE,DEPTH_SIZE] of B rings that share their N cameras => token indices [B,N,size^2], -1 where a
    token shows nothing or the other view does not see that place.
    """
    cells = pixel_centers(DEPTH_SIZE, cameras.device)
    per_token = DEPTH_SIZE / size
    middle = ((torch.arange(size, device=cameras.device) + 0.5) * per_token).long()
    rows = (middle[:, None] * DEPTH_SIZE + middle).flatten()
    own = depths.flatten(2)[..., rows]  # [B,N,T]
    neighbour = (torch.arange(len(cameras), device=cameras.device) + offset) % len(cameras)
    matches = []
    for ring, seen in zip(own, depths[:, neighbour].flatten(2)):
        uv, depth = cameras[neighbour].project(cameras.unproject(cells[rows], ring))
        column, row = (uv * DEPTH_SIZE).long().clamp(0, DEPTH_SIZE - 1).unbind(-1)
        there = seen.gather(1, row * DEPTH_SIZE + column)
        inside = ((uv >= 0) & (uv < 1)).all(-1)
        found = inside & (ring > 0) & (there > 0) & ((there - depth).abs() < SAME_PLACE)
        column, row = (uv * size).long().clamp(0, size - 1).unbind(-1)
        matches.append(torch.where(found, row * size + column, -1))
    return torch.stack(matches)


def correspondence_loss(attention: TrajectoryAttention, tokens: Tensor, num_views: int,
                        geometries: TrajectoryGeometries, depths: Tensor) -> Tensor:
    """Minus the logarithm of the attention that a token pays, within each neighbour, to the token of the same place.

    attention's own inputs tokens [B*N,T,C], and depths [B,N,DEPTH_SIZE,DEPTH_SIZE] => the mean over heads, neighbours
    and tokens whose match lies in their window; 0 where there is none.
    """
    size, batch = math.isqrt(tokens.shape[1]), len(tokens) // num_views
    normed, offsets = attention.norm(tokens), ring_neighbours(num_views)
    queries, keys = attention.to_q(normed), gather_views(attention.to_k(normed), num_views, offsets)
    q, k = (t.unflatten(-1, (attention.heads, -1)).transpose(1, 2).float() for t in (queries, keys))
    bias, _ = geometries.dense(size, batch, torch.float32)
    # within each neighbour: which of the two a token asks is the model's own affair
    scores = ((q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2) + bias).unflatten(-1, (len(offsets), -1))
    windows = bias[:, 0].unflatten(-1, (len(offsets), -1))  # [B*N,T,K,T]
    total, count = scores.new_zeros(()), 0
    for i, offset in enumerate(offsets):
        match = true_matches(depths, geometries.cameras, size, offset).flatten(0, 1)  # [B*N,T]
        index = match.clamp_min(0)[..., None]
        counts = (match >= 0) & windows[:, :, i].gather(-1, index)[..., 0].isfinite()
        if counts.any():
            asked = scores[:, :, :, i].transpose(1, 2)[counts]  # [P,heads,T]
            chosen = asked.log_softmax(-1).gather(-1, index[counts][:, None].expand(-1, attention.heads, 1))
            total, count = total - chosen.sum(), count + chosen.numel()
    return total / max(1, count)


def dispersive_loss(features: Tensor, num_views: int) -> Tensor:
    """log of the mean of exp(-|z_i - z_j|^2 / (D tau)) over all i and j (Wang and He 2025, "Diffuse and Disperse",
    arXiv 2506.09027, equation 6).

    features [B*N,...]; views of one ring are no pairs: they shall resemble each other. Each with itself is one, as in
    the authors' own code: without these, whose distance is 0, the loss has no lower bound, and features grow for ever.
    """
    flat = features.flatten(1).float()
    sample = torch.arange(len(flat), device=flat.device) // num_views
    first, second = torch.triu_indices(len(flat), len(flat), 1, device=flat.device)
    strangers = sample[first] != sample[second]
    distances = torch.nn.functional.pdist(flat)[strangers].square() / flat.shape[1]
    exponents = torch.cat((-distances / TEMPERATURE + math.log(2), flat.new_zeros(len(flat))))  # both ways round
    return torch.logsumexp(exponents, 0) - math.log(2 * len(distances) + len(flat))


class Overheard:
    """What a UNet's parts were given and gave in its last training pass, for losses of their own.

    trajectories: attention, its tokens, views and geometries, of all TrajectoryAttention modules that took part;
    middle: what the middle block gave, or None.
    """

    def __init__(self, unet: MultiviewUNet):
        self.trajectories: list[tuple[TrajectoryAttention, Tensor, int, TrajectoryGeometries]] = []
        self.middle: Tensor | None = None
        unet.unet2d.mid_block.register_forward_hook(self._hear_middle)
        for part in unet.modules():
            if isinstance(part, TrajectoryAttention):
                part.register_forward_pre_hook(self._hear_trajectory)

    def _hear_middle(self, module, inputs, output) -> None:
        if torch.is_grad_enabled():
            self.middle = output

    def _hear_trajectory(self, module, inputs) -> None:
        if torch.is_grad_enabled():
            self.trajectories.append((module, *inputs))

    def forget(self) -> None:
        self.trajectories, self.middle = [], None

    def correspondence(self, depths: Tensor) -> Tensor:
        """The mean of correspondence_loss over the trajectory attentions; 0 where none took part."""
        losses = [correspondence_loss(*heard, depths) for heard in self.trajectories if heard[2] > 1]
        return torch.stack(losses).mean() if losses else depths.new_zeros(())


def depths_of(rings: list[Ring]) -> list[Tensor]:
    """sampled_depths of every ring, as float16."""
    return [sampled_depths(ring).half() for ring in rings]
