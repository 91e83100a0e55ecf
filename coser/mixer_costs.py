"""What each module between views costs a view, counted and not timed: `python -m coser.mixer_costs`.

Operations of one forward pass of the module alone, its projections included, for rings of several sizes. They show how
a cost grows with the ring: what is linear in its views costs a view the same in all of them.
"""

from __future__ import annotations

import argparse
import math

import torch
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn

from coser.cameras import Cameras
from coser.models.adjacent_attention import adjacent_attention, dense_attention, self_attention
from coser.models.rapid_glance import RapidGlance
from coser.models.score_attention import ScoreAttention
from coser.models.temporal_attention import TemporalAttention
from coser.models.trajectory_attention import TrajectoryAttention, TrajectoryGeometries
from coser.throughput import flop_of

HEAD_SIZE, TEXT_CHANNELS = 32, 384
WAYS = {"each view alone": self_attention, "adjacent (AA)": adjacent_attention, "dense (MVDream)": dense_attention}


def gflop_per_view(name: str, num_views: int, size: int, channels: int) -> float:
    """GFLOP a view of one of `MODULES` for a ring of num_views views of size x size tokens with so many channels."""
    device = torch.device("cpu" if name.startswith("trajectory") else "meta")  # its windows depend on the cameras
    tokens = torch.zeros(num_views, size * size, channels, device=device)
    with torch.no_grad(), device:
        return flop_of(lambda: MODULES[name](tokens, num_views)) / num_views / 1e9


def _in_self_attentions_place(name: str):
    def work(tokens: Tensor, num_views: int) -> Tensor:
        channels = tokens.shape[-1]
        attention = Attention(channels, heads=max(1, channels // HEAD_SIZE), dim_head=HEAD_SIZE)
        return WAYS[name](attention, tokens, *(() if name == "each view alone" else (num_views,)))
    return work


def _trajectory(window: int):
    def work(tokens: Tensor, num_views: int) -> Tensor:
        channels = tokens.shape[-1]
        module = TrajectoryAttention(channels, channels // 2, HEAD_SIZE)
        normed = module.norm(tokens)
        geometries = TrajectoryGeometries(Cameras.orbit(num_views), window, 0.45)
        windows = module.attend_windows(module.to_q(normed), module.to_k(normed), module.to_v(normed), num_views,
                                        geometries)
        return module.to_out(windows)
    return work


def _module(make):
    def work(tokens: Tensor, num_views: int) -> Tensor:
        module: nn.Module = make(tokens.shape[-1])
        if isinstance(module, ScoreAttention):
            return module(tokens, num_views, torch.zeros(1, TEXT_CHANNELS))
        return module(tokens, num_views)
    return work


def _whole_heads(channels: float, multiple: int = HEAD_SIZE) -> int:
    return max(1, round(channels / multiple)) * multiple


MODULES = {
    **{name: _in_self_attentions_place(name) for name in WAYS},
    "same place (VideoMV)": _module(lambda c: TemporalAttention(c, _whole_heads(c / 2), HEAD_SIZE)),
    "trajectory (DR), 3x3": _trajectory(3),
    "trajectory (DR), 5x5": _trajectory(5),
    "spiral scan (RG)": _module(lambda c: RapidGlance(c, _whole_heads(c, 2 * HEAD_SIZE), HEAD_SIZE)),
    "score attention (AIR), 2x2": _module(
        lambda c: ScoreAttention(c, _whole_heads(c / 2), HEAD_SIZE, TEXT_CHANNELS, 2)),
}


def table(rings: list[int], size: int, channels: int) -> str:
    """Markdown: a line a module, a column a ring."""
    lines = [f"| GFLOP a view, {size}x{size} tokens of {channels} channels | "
             + " | ".join(f"{n} views" for n in rings) + " |", "|---" + "|--:" * len(rings) + "|"]
    for name in MODULES:
        costs = (gflop_per_view(name, n, size, channels) for n in rings)
        shown = (f"{c:.{max(0, 2 - int(math.log10(max(c, 0.1))))}f}" for c in costs)
        lines.append(f"| {name} | " + " | ".join(shown) + " |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m coser.mixer_costs", description=__doc__.split("\n")[0])
    parser.add_argument("--rings", type=int, nargs="+", default=[4, 8, 12, 24])
    parser.add_argument("--size", type=int, default=32, help="tokens a side")
    parser.add_argument("--channels", type=int, default=320)
    options = parser.parse_args(arguments)
    print(table(options.rings, options.size, options.channels))


if __name__ == "__main__":
    main()
