"""Rapid glance (RG): a bidirectional state-space scan over the tokens of all views, in a spiral from the centre out."""

from __future__ import annotations

import functools
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from coser.models.ssm import scan

SCAN_ORDERS = ("spiral", "raster", "zigzag")
SCAN_LAYOUTS = ("view_major", "position_major")


def spiral_order(size: int) -> Tensor:
    """Token indices (row * size + column) of a size x size picture from the centre outward, [size^2].

    A square spiral: consecutive tokens are neighbours in the picture. For even sizes it starts at one of the four
    central tokens.
    """
    row = column = (size - 1) // 2
    order, steps, length = [row * size + column], [(0, 1), (1, 0), (0, -1), (-1, 0)], 1
    turn = 0
    while len(order) < size * size:
        for _ in range(2):
            dy, dx = steps[turn % 4]
            for _ in range(length):
                row, column = row + dy, column + dx
                if 0 <= row < size and 0 <= column < size:
                    order.append(row * size + column)
            turn += 1
        length += 1
    return torch.tensor(order)


def picture_order(size: int, order: str) -> Tensor:
    """The named order of a picture's tokens, [size^2]; zigzag is raster with every second row reversed."""
    if order not in SCAN_ORDERS:
        raise ValueError(f"scan_order must be one of {SCAN_ORDERS}, got {order!r}")
    if order == "spiral":
        return spiral_order(size)
    raster = torch.arange(size * size).view(size, size)
    if order == "zigzag":
        raster[1::2] = raster[1::2].flip(1)
    return raster.flatten()


def scan_order(num_views: int, size: int, order: str, layout: str) -> Tensor:
    """The order of all tokens of all views (indices view * size^2 + token), [N*size^2].

    view_major: view after view; position_major: all views' first tokens, then all views' second tokens, ...
    """
    if layout not in SCAN_LAYOUTS:
        raise ValueError(f"scan_layout must be one of {SCAN_LAYOUTS}, got {layout!r}")
    tokens = torch.arange(num_views)[:, None] * size**2 + picture_order(size, order)
    return (tokens if layout == "view_major" else tokens.T).flatten()


@functools.lru_cache(maxsize=64)
def _two_way_rows(num_views: int, size: int, order: str, layout: str, device: torch.device) -> tuple[Tensor, Tensor]:
    """Rows of a [tokens,2,...] table in scan order, column 0 forwards and column 1 backwards, and the way back."""
    with torch.inference_mode(False):
        forwards = scan_order(num_views, size, order, layout)
        rows = torch.stack([forwards * 2, forwards.flip(0) * 2 + 1], 1).flatten()
        return rows.to(device), torch.argsort(rows).to(device)


class _Reorder(torch.autograd.Function):
    """index_select along dimension 1 by a permutation: its gradient is a gather too, not a scattered addition."""

    @staticmethod
    def forward(ctx, table: Tensor, rows: Tensor, way_back: Tensor) -> Tensor:
        ctx.save_for_backward(rows, way_back)
        return table.index_select(1, rows)

    @staticmethod
    def backward(ctx, gradient: Tensor):
        rows, way_back = ctx.saved_tensors
        return _Reorder.apply(gradient, way_back, rows), None, None


class RapidGlance(nn.Module):
    """Gated Mamba-2 layer over N views; half of its heads scan forwards, half backwards.

    forward: tokens [B*N,T,C], num_views => [B*N,T,C], to be added to the tokens; linear in N*T. It differs from
    Mamba-2's layer in having no short convolution (the UNet's own mix neighbours in 2D), no skip (the block has one)
    and LayerNorm for RMSNorm.
    """

    def __init__(self, channels: int, inner: int, head_size: int = 64, state_size: int = 32, chunk_size: int = 64,
                 order: str = "spiral", layout: str = "view_major"):
        super().__init__()
        if inner % (2 * head_size):
            raise ValueError(f"inner must be a multiple of two heads ({2 * head_size}), got {inner}")
        self.heads, self.head_size, self.state_size = inner // head_size, head_size, state_size
        self.chunk_size, self.order, self.layout = chunk_size, order, layout
        scan_order(1, 1, order, layout)  # names wrong ones now rather than at the first call
        self.norm = nn.LayerNorm(channels)
        self.to_gate = nn.Linear(channels, inner, bias=False)
        self.to_values = nn.Linear(channels, inner, bias=False)
        self.to_dynamics = nn.Linear(channels, 2 * (2 * state_size + self.heads // 2), bias=False)  # B, C, dt each way
        self.rate_log = nn.Parameter(torch.empty(self.heads).uniform_(1, 16).log())
        # inverse softplus of step sizes between 0.001 and 0.1, as in Mamba
        step = torch.exp(torch.empty(self.heads).uniform_(math.log(1e-3), math.log(1e-1)))
        self.step_bias = nn.Parameter(step + torch.log(-torch.expm1(-step)))
        self.norm_out = nn.LayerNorm(inner)
        self.to_out = nn.Linear(inner, channels, bias=False)
        nn.init.zeros_(self.to_out.weight)

    def forward(self, tokens: Tensor, num_views: int) -> Tensor:
        (n, count, channels) = tokens.shape
        normed = self.norm(tokens).reshape(n // num_views, num_views * count, channels)
        hidden = self.scan_two_ways(self.to_values(normed), self.to_dynamics(normed), num_views)
        hidden = self.norm_out(hidden * F.silu(self.to_gate(normed)))
        return self.to_out(hidden).view(tokens.shape)

    def scan_two_ways(self, values: Tensor, dynamics: Tensor, num_views: int) -> Tensor:
        """values [B,N*T,inner] and dynamics [B,N*T,2*(2s+h/2)] in picture order => [B,N*T,inner], in picture order."""
        (b, length, inner), s = values.shape, self.state_size
        size = math.isqrt(length // num_views)
        rows, way_back = _two_way_rows(num_views, size, self.order, self.layout, values.device)
        x = _Reorder.apply(values.view(b, length * 2, inner // 2), rows, way_back)
        B, C, dt = _Reorder.apply(dynamics.view(b, length * 2, -1), rows, way_back) \
            .view(b, length, 2, -1).split([s, s, self.heads // 2], -1)
        dt = F.softplus(dt.flatten(2).float() + self.step_bias.float())
        y = scan(x.view(b, length, self.heads, self.head_size), dt, -self.rate_log.float().exp(), B, C, self.chunk_size)
        return _Reorder.apply(y.reshape(b, length * 2, inner // 2), way_back, rows).view(b, length, inner)
