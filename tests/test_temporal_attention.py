"""Same-place attention across views: what a token sees, and what it does not."""

import pytest
import torch

from coser.models.adjacent_attention import attend_plainly
from coser.models.temporal_attention import TemporalAttention


@pytest.fixture
def layer():
    torch.manual_seed(0)
    module = TemporalAttention(channels=16, inner=16, head_size=8)
    torch.nn.init.normal_(module.to_out.weight)
    return module


def test_a_token_sees_its_own_place_in_all_views_of_its_sample_and_nothing_else(layer):
    tokens = torch.randn(6, 9, 16, requires_grad=True)  # two samples of three views of 3 x 3 tokens
    gradient, = torch.autograd.grad(layer(tokens, 3)[1, 4].square().sum(), tokens)
    seen = gradient.abs().sum(-1) > 0
    assert seen[:3, 4].all() and seen.sum() == 3


def test_it_is_attention_over_views_place_by_place(layer):
    tokens = torch.randn(4, 9, 16)
    q, k, v = (projection(layer.norm(tokens[:, 5])).view(1, 4, 2, 8).transpose(1, 2)
               for projection in (layer.to_q, layer.to_k, layer.to_v))
    expected = layer.to_out(attend_plainly(q, k, v).transpose(1, 2).reshape(4, 16))
    torch.testing.assert_close(layer(tokens, 4)[:, 5], expected)


@pytest.mark.parametrize("num_views", [1, 2, 5])
def test_turning_the_ring_turns_the_output(layer, num_views):
    tokens = torch.randn(num_views, 9, 16)
    torch.testing.assert_close(layer(tokens.roll(1, 0), num_views), layer(tokens, num_views).roll(1, 0))
