"""Accumulated inconsistency rectification (AIR): every token looks at score-pooled tokens of all views."""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor, nn

from coser.models.adjacent_attention import SilentAttention, attend


@functools.lru_cache(maxsize=64)
def pooling_windows(size: int, window: int, device: torch.device = torch.device("cpu")) -> Tensor:
    """Which tokens of a size x size view lie in which window x window field: 0/1, [fields,size*size].

    Fields at the lower and right edges may be smaller; every token lies in exactly one.
    """
    if window < 1:
        raise ValueError(f"pool_window must be at least 1, got {window}")
    with torch.inference_mode(False):
        per_side = math.ceil(size / window)
        field = torch.arange(size, device=device) // window
        field = (field[:, None] * per_side + field).flatten()
        return (torch.arange(per_side**2, device=device)[:, None] == field).float()


def pooling_weights(scores: Tensor, window: int) -> Tensor:
    """Scores in (0,1), [b,T] => weights [b,fields,T]: each field's scores divided by their sum, 0 outside the field."""
    windows = pooling_windows(math.isqrt(scores.shape[1]), window, scores.device)
    weights = windows * scores.float()[:, None]
    return weights / weights.sum(-1, keepdim=True)


def pool_by_score(tokens: Tensor, scores: Tensor, window: int) -> Tensor:
    """Score-weighted means z = sum(s h) / sum(s) over window x window fields (CoSER, section 3.5).

    tokens [b,T,C] and scores [b,T] of square views => [b,ceil(side / window)^2,C].
    """
    return pooling_weights(scores, window).to(tokens.dtype) @ tokens


class ScoreAttention(SilentAttention):
    """Scores from the match with the text, pooling, attention to all views; silent at first.

    use_scores: without them every token of a field counts the same, to measure what they are good for.

    forward: tokens [B*N,T,C], num_views, text_mean [B,D] => [B*N,T,C], to be added to the tokens.
    """

    def __init__(self, channels: int, inner: int, head_size: int, text_channels: int, window: int,
                 use_scores: bool = True):
        super().__init__(channels, inner, head_size)
        self.window = window
        self.score_text = nn.Linear(text_channels, channels) if use_scores else None

    def forward(self, tokens: Tensor, num_views: int, text_mean: Tensor) -> Tensor:
        normed = self.norm(tokens)
        samples = len(tokens) // num_views
        pooled = pool_by_score(normed, self.scores(normed, num_views, text_mean), self.window)
        pooled = pooled.reshape(samples, -1, pooled.shape[-1])
        queries = self.to_q(normed).view(samples, num_views * tokens.shape[1], -1)
        hidden = attend(queries, self.to_k(pooled), self.to_v(pooled), self.heads)
        return self.to_out(hidden).view(tokens.shape)

    def scores(self, normed: Tensor, num_views: int, text_mean: Tensor) -> Tensor:
        """How well each token matches the text, in (0,1): [B*N,T] for normalised tokens [B*N,T,C], text_mean [B,D]."""
        if self.score_text is None:
            return normed.new_full(normed.shape[:2], 0.5)
        samples, channels = len(normed) // num_views, normed.shape[-1]
        direction = self.score_text(text_mean)[:, :, None] / math.sqrt(channels)
        match = normed.reshape(samples, -1, channels) @ direction.to(normed.dtype)
        return torch.sigmoid(match.float()).view(normed.shape[:2])
