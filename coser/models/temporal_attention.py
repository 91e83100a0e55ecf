"""Same-position attention across views, as video models have it: VideoMV's baseline, beside the paper's own mixers."""

from __future__ import annotations

from torch import Tensor

from coser.models.adjacent_attention import SilentAttention, attend


class TemporalAttention(SilentAttention):
    """Every token looks at the tokens of the same place in all views of its ring (VideoMV 2024; Guo et al. 2023,
    arXiv 2307.04725), silent at first.

    forward: tokens [B*N,T,C], num_views => [B*N,T,C], to be added to the tokens. It has no code for a view's number:
    views know their azimuths.
    """

    def forward(self, tokens: Tensor, num_views: int) -> Tensor:
        normed = self.norm(tokens)
        places = normed.unflatten(0, (-1, num_views)).transpose(1, 2).flatten(0, 1)  # [B*T,N,C]
        hidden = self.to_out(attend(self.to_q(places), self.to_k(places), self.to_v(places), self.heads))
        return hidden.unflatten(0, (-1, tokens.shape[1])).transpose(1, 2).reshape(tokens.shape)
