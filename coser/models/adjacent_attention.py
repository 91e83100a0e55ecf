"""Appearance awareness (AA): self-attention whose keys and values also come from the two neighbouring views.

Also home to the ring's neighbours, and to the multi-head attention and its weights that all mixers share.
"""

from __future__ import annotations

import functools
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def attend(queries: Tensor, keys: Tensor, values: Tensor, heads: int, mask: Tensor | None = None) -> Tensor:
    """Multi-head attention: queries [b,t,c], keys and values [b,k,c] => [b,t,c].

    mask: broadcastable to [b,heads,t,k]; boolean (True = may look) or a bias added to the scores.
    """
    q, k, v = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (queries, keys, values))
    # torch's fused attention has a slow backward pass for short sequences on CPU: two to four times plain products
    short = q.device.type == "cpu" and k.shape[2] <= 256 and torch.is_grad_enabled()
    form = attend_plainly if short else F.scaled_dot_product_attention
    return form(q, k, v, mask).transpose(1, 2).flatten(2)


def attend_plainly(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """The definition of F.scaled_dot_product_attention: q [b,h,t,d], k and v [b,h,k,d], mask => [b,h,t,d]."""
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask
    return scores.softmax(-1).to(v.dtype) @ v


class SilentAttention(nn.Module):
    """The weights of an attention added to a trained model: a norm, three projections, and one back that is zero.

    inner: channels of queries, keys and values, in heads of head_size.
    """

    def __init__(self, channels: int, inner: int, head_size: int):
        super().__init__()
        self.heads = max(1, inner // head_size)
        self.norm = nn.LayerNorm(channels)
        self.to_q = nn.Linear(channels, inner, bias=False)
        self.to_k = nn.Linear(channels, inner, bias=False)
        self.to_v = nn.Linear(channels, inner, bias=False)
        self.to_out = nn.Linear(inner, channels, bias=False)
        nn.init.zeros_(self.to_out.weight)


def ring_neighbours(num_views: int) -> tuple[int, ...]:
    """Offsets of the distinct views beside a view of a closed ring.

    (-1, 1), but (1,) for two views and () for one: there "left" and "right" are the same view, and counting it twice
    would double its weight in every softmax (and make N=1 differ from plain self-attention).
    """
    return (-1, 1) if num_views > 2 else (1,) if num_views == 2 else ()


@functools.lru_cache(maxsize=128)
def _ring_index(num_views: int, offsets: tuple[int, ...], device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        views = torch.arange(num_views, device=device)
        return ((views[:, None] + torch.tensor(offsets, device=device)) % num_views).flatten()


def gather_views(tokens: Tensor, num_views: int, offsets: tuple[int, ...]) -> Tensor:
    """Tokens [B*N,T,C] => [B*N,K*T,C]: for view i the tokens of views i + offset, one after another, wrapping."""
    (_, count, channels) = tokens.shape
    index = _ring_index(num_views, offsets, tokens.device)
    ring = tokens.reshape(-1, num_views, count * channels)
    return ring.index_select(1, index).view(-1, len(offsets) * count, channels)


def adjacent_attention(attn, tokens: Tensor, num_views: int) -> Tensor:
    """Q = W_Q h_i; K, V = W_K, W_V [h_{i-1}; h_i; h_{i+1}] (CoSER, section 3.2) with the weights of a self-attention.

    Adds no parameter. attn: a diffusers Attention; tokens [B*N,T,C], a ring's views one after another => [B*N,T,C].
    """
    keys, values = attn.to_k(tokens), attn.to_v(tokens)
    if num_views > 1:
        left, *right = ring_neighbours(num_views)
        offsets = (left, 0, *right)
        keys, values = (gather_views(t, num_views, offsets) for t in (keys, values))
    return _leave(attn, attend(attn.to_q(tokens), keys, values, attn.heads))


def self_attention(attn, tokens: Tensor) -> Tensor:
    """Every view looks at itself alone, as in the 2D parent: [b,T,C] => [b,T,C]."""
    return _leave(attn, attend(attn.to_q(tokens), attn.to_k(tokens), attn.to_v(tokens), attn.heads))


def dense_attention(attn, tokens: Tensor, num_views: int) -> Tensor:
    """All tokens of all views in one self-attention (MVDream's baseline): [B*N,T,C] => [B*N,T,C]."""
    return self_attention(attn, tokens.reshape(-1, num_views * tokens.shape[1], tokens.shape[2])).view(tokens.shape)


def text_attention(attn, tokens: Tensor, text: Tensor, num_views: int, mask: Tensor | None = None) -> Tensor:
    """The parent's cross-attention, keys and values computed once for all views of a sample.

    tokens [B*N,T,C], text [B,L,D], mask broadcastable to [B,heads,N*T,L] => [B*N,T,C].
    """
    queries = attn.to_q(tokens).view(-1, num_views * tokens.shape[1], attn.inner_dim)
    return _leave(attn, attend(queries, attn.to_k(text), attn.to_v(text), attn.heads, mask)).view(tokens.shape)


def _leave(attn, hidden: Tensor) -> Tensor:
    projection, dropout = attn.to_out
    return dropout(projection(hidden))
