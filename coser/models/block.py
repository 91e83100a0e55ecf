"""The transformer block that the 2D blocks of a diffusers UNet become: their weights, plus four mixers across views."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from torch import Tensor, nn

from coser.models.adjacent_attention import adjacent_attention, dense_attention, self_attention, text_attention
from coser.models.rapid_glance import RapidGlance
from coser.models.resnet import pointwise
from coser.models.score_attention import ScoreAttention
from coser.models.temporal_attention import TemporalAttention
from coser.models.trajectory_attention import TrajectoryAttention, TrajectoryGeometries

MIXERS = ("adjacent", "trajectory", "glance", "rectification")
BASELINES = ("dense", "temporal")  # of other papers, to compare with: attention over all tokens, over one place's
NEEDS_WEIGHTS = ("trajectory", "glance", "rectification", "temporal")


@dataclass(frozen=True)
class ViewContext:
    """What the blocks of one forward pass know beside their tokens.

    num_views: N. mixers: those active in this pass. text_mean [B,D]: mean text state. text_mask [B,1,1,L] boolean or
    None: which text tokens count. geometries: trajectory tables of this pass's cameras.
    """

    num_views: int
    mixers: frozenset[str]
    text_mean: Tensor
    text_mask: Tensor | None
    geometries: TrajectoryGeometries


@dataclass(frozen=True)
class MixerOptions:
    """How wide and how shaped the mixers are; see `MultiviewUNet` for the meaning of each field."""

    mixers: tuple[str, ...]
    mixer_ratio: float
    mixer_head_size: int
    scan_ratio: float
    scan_head_size: int
    scan_state_size: int
    scan_chunk_size: int
    scan_order: str
    scan_layout: str
    pool_window: int
    pool_scores: bool

    def build(self, channels: int, text_channels: int) -> dict[str, nn.Module]:
        """The modules of the mixers that have weights, for tokens of `channels` channels."""
        inner = _round_to(channels * self.mixer_ratio, self.mixer_head_size)
        scan_inner = _round_to(channels * self.scan_ratio, 2 * self.scan_head_size)
        makers = {
            "trajectory": lambda: TrajectoryAttention(channels, inner, self.mixer_head_size),
            "glance": lambda: RapidGlance(channels, scan_inner, self.scan_head_size, self.scan_state_size,
                                          self.scan_chunk_size, self.scan_order, self.scan_layout),
            "rectification": lambda: ScoreAttention(channels, inner, self.mixer_head_size, text_channels,
                                                    self.pool_window, self.pool_scores),
            "temporal": lambda: TemporalAttention(channels, inner, self.mixer_head_size),
        }
        return {name: makers[name]() for name in NEEDS_WEIGHTS if name in self.mixers}


def _round_to(width: float, multiple: int) -> int:
    return max(1, round(width / multiple)) * multiple


class MultiviewTransformerBlock(nn.Module):
    """A diffusers BasicTransformerBlock (its norms, attentions and feed-forward, under their old names) with mixers.

    forward: tokens [B*N,T,C], text [B,L,D], ViewContext => [B*N,T,C]. Active mixers that this block has no weights for
    are an error of the caller; inactive ones cost nothing.
    """

    def __init__(self, parent: BasicTransformerBlock, options: MixerOptions):
        super().__init__()
        if parent.norm_type != "layer_norm" or parent.only_cross_attention or parent.attn2 is None:
            raise ValueError("the 2D UNet's transformer blocks must have layer_norm, self- and cross-attention, "
                             f"got norm_type={parent.norm_type!r}, only_cross_attention={parent.only_cross_attention}")
        self.norm1, self.attn1 = parent.norm1, parent.attn1
        self.norm2, self.attn2 = parent.norm2, parent.attn2
        self.norm3, self.ff = parent.norm3, parent.ff
        for name, mixer in options.build(parent.dim, parent.attn2.cross_attention_dim).items():
            self.add_module(name, mixer)

    def forward(self, tokens: Tensor, text: Tensor, context: ViewContext) -> Tensor:
        n, active = context.num_views, context.mixers
        tokens = tokens + self.look_around(self.norm1(tokens), n, active)
        if "trajectory" in active:
            tokens = tokens + self.trajectory(tokens, n, context.geometries)
        tokens = tokens + text_attention(self.attn2, self.norm2(tokens), text, n, context.text_mask)
        if "glance" in active:
            tokens = tokens + self.glance(tokens, n)
        if "rectification" in active:
            tokens = tokens + self.rectification(tokens, n, context.text_mean)
        if "temporal" in active:
            tokens = tokens + self.temporal(tokens, n)
        return tokens + self.ff(self.norm3(tokens))

    def look_around(self, normed: Tensor, num_views: int, active: frozenset[str]) -> Tensor:
        """The self-attention's place: adjacent, dense, or each view alone."""
        if "dense" in active:
            return dense_attention(self.attn1, normed, num_views)
        if "adjacent" in active:
            return adjacent_attention(self.attn1, normed, num_views)
        return self_attention(self.attn1, normed)


class MultiviewTransformer(nn.Module):
    """A diffusers Transformer2DModel (weights under their old names) whose blocks know about views.

    It keeps pictures in channels-last memory, where pixels and tokens are the same bytes; diffusers' own copies to
    channels-first and back around every transformer.
    """

    def __init__(self, parent: Transformer2DModel, options: MixerOptions):
        super().__init__()
        if not parent.is_input_continuous:
            raise ValueError("the 2D UNet's transformers must take continuous inputs")
        self.norm, self.proj_in, self.proj_out = parent.norm, parent.proj_in, parent.proj_out
        blocks = (MultiviewTransformerBlock(block, options) for block in parent.transformer_blocks)
        self.transformer_blocks = nn.ModuleList(blocks)
        self.gradient_checkpointing = False

    def forward(self, pictures: Tensor, encoder_hidden_states: Tensor, cross_attention_kwargs: dict,
                **unused) -> tuple[Tensor]:
        """pictures [B*N,C,H,W] (H = W), text [B,L,D], {"context": ViewContext} => (pictures,), as diffusers expects."""
        context = cross_attention_kwargs["context"]
        n, _, height, width = pictures.shape
        tokens = self.norm(pictures).permute(0, 2, 3, 1).reshape(n, height * width, -1)
        tokens = pointwise(self.proj_in, tokens)
        for block in self.transformer_blocks:
            if self.gradient_checkpointing and torch.is_grad_enabled():
                tokens = self._gradient_checkpointing_func(block, tokens, encoder_hidden_states, context)
            else:
                tokens = block(tokens, encoder_hidden_states, context)
        tokens = pointwise(self.proj_out, tokens)
        return (pictures + tokens.view(n, height, width, -1).permute(0, 3, 1, 2),)
