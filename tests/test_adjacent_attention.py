"""Adjacent attention, and what all mixers share of the ring."""

import pytest
import torch
from diffusers.models.attention_processor import Attention

from coser.models.adjacent_attention import (adjacent_attention, attend, attend_plainly, dense_attention, gather_views,
                                             ring_neighbours, self_attention, text_attention)


@pytest.fixture
def attn():
    torch.manual_seed(0)
    return Attention(query_dim=16, heads=2, dim_head=8).eval()


def tokens(views, count=6, channels=16):
    return torch.randn(views, count, channels, generator=torch.Generator().manual_seed(views))


def test_self_attention_equals_diffusers(attn):
    torch.testing.assert_close(self_attention(attn, tokens(3)), attn(tokens(3)))


def test_one_view_alone_sees_exactly_itself(attn):
    assert torch.equal(adjacent_attention(attn, tokens(1), 1), self_attention(attn, tokens(1)))


@pytest.mark.parametrize("num_views", [2, 3, 4, 7])
def test_keys_and_values_are_those_of_the_view_and_its_neighbours(attn, num_views):
    h = tokens(num_views)
    got = adjacent_attention(attn, h, num_views)
    for i in range(num_views):
        seen = sorted({(i - 1) % num_views, i, (i + 1) % num_views})
        expected = attn(h[i:i + 1], encoder_hidden_states=h[seen].flatten(0, 1)[None])
        torch.testing.assert_close(got[i:i + 1], expected)


def test_two_views_count_each_other_once():
    assert ring_neighbours(1) == () and ring_neighbours(2) == (1,) and ring_neighbours(3) == (-1, 1)


@pytest.mark.parametrize("num_views", [2, 3, 5, 12])
def test_turning_the_ring_turns_the_output(attn, num_views):
    h = tokens(num_views)
    turned = adjacent_attention(attn, h.roll(1, 0), num_views)
    torch.testing.assert_close(turned, adjacent_attention(attn, h, num_views).roll(1, 0))


def test_samples_of_a_batch_do_not_see_each_other(attn):
    a, b = tokens(4), tokens(4) + 1
    both = adjacent_attention(attn, torch.cat([a, b]), 4)
    torch.testing.assert_close(both, torch.cat([adjacent_attention(attn, t, 4) for t in (a, b)]))


def test_neighbours_come_in_the_order_of_their_offsets_and_wrap():
    h = torch.arange(4.0).view(4, 1, 1)
    assert gather_views(h, 4, (-1, 0, 1))[..., 0].tolist() == [[3, 0, 1], [0, 1, 2], [1, 2, 3], [2, 3, 0]]


def test_dense_attention_is_one_self_attention_over_all_views(attn):
    h = tokens(6)
    expected = torch.cat([attn(h[s].flatten(0, 1)[None]).view(3, 6, 16) for s in (slice(0, 3), slice(3, 6))])
    torch.testing.assert_close(dense_attention(attn, h, 3), expected)


def test_text_attention_equals_diffusers_with_the_text_repeated_for_each_view():
    torch.manual_seed(0)
    attn = Attention(query_dim=16, cross_attention_dim=10, heads=2, dim_head=8)
    h, text = tokens(6), torch.randn(2, 5, 10)
    mask = torch.tensor([[True, True, False, False, False], [True] * 5])
    repeated = text.repeat_interleave(3, 0)
    bias = (~mask).float().mul(-1e4).repeat_interleave(3, 0)[:, None]
    torch.testing.assert_close(text_attention(attn, h, text, 3), attn(h, repeated))
    torch.testing.assert_close(text_attention(attn, h, text, 3, mask[:, None, None]),
                               attn(h, repeated, attention_mask=bias))


@pytest.mark.parametrize("kind", ["none", "boolean", "bias"])
def test_plain_attention_equals_the_fused_one_in_values_and_gradients(kind):
    generator = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(2, 3, n, 8, generator=generator, dtype=torch.float64, requires_grad=True) for n in (5, 7, 7))
    keep = torch.rand(2, 1, 5, 7, generator=generator) > 0.3
    mask = {"none": None, "boolean": keep, "bias": torch.where(keep, 0.5, -torch.inf).double()}[kind]
    results = []
    for form in (attend_plainly, torch.nn.functional.scaled_dot_product_attention):
        out = form(q, k, v, mask)
        results.append((out, *torch.autograd.grad(out.square().sum(), (q, k, v))))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


def test_attention_is_the_same_with_and_without_gradients():
    q, k, v = torch.randn(3, 2, 9, 16, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        expected = attend(q, k, v, 4)
    torch.testing.assert_close(attend(q, k, v, 4), expected)
