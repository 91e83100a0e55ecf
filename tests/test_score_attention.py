"""Score attention: pooling by scores, and attention of all tokens to the pooled ones."""

import pytest
import torch

from coser.models.score_attention import ScoreAttention, pool_by_score, pooling_weights, pooling_windows


def layer(window=2, **options):
    torch.manual_seed(0)
    module = ScoreAttention(channels=16, inner=16, head_size=8, text_channels=10, window=window, **options)
    torch.nn.init.normal_(module.to_out.weight)
    return module


@pytest.mark.parametrize("size, window", [(4, 2), (5, 2), (6, 4), (3, 3), (2, 5), (4, 1)])
def test_pooled_scores_sum_to_one(size, window):
    scores = torch.rand(3, size * size).clamp_min(1e-3)
    weights = pooling_weights(scores, window)
    torch.testing.assert_close(weights.sum(-1), torch.ones(weights.shape[:2]))


@pytest.mark.parametrize("size, window", [(4, 2), (5, 2), (6, 4), (2, 5)])
def test_every_token_lies_in_exactly_one_field(size, window):
    assert (pooling_windows(size, window).sum(0) == 1).all()


def test_pooling_by_hand():
    tokens = torch.arange(16.0).view(1, 16, 1)
    scores = torch.full((1, 16), 0.5)
    scores[0, 5] = 0.75
    assert pool_by_score(tokens, scores, 2)[0, :, 0].tolist() == pytest.approx([6.25 / 2.25, 4.5, 10.5, 12.5])


def test_equal_scores_pool_to_the_mean():
    tokens = torch.randn(2, 36, 7)
    expected = torch.nn.functional.avg_pool2d(tokens.transpose(1, 2).unflatten(2, (6, 6)), 3).flatten(2).transpose(1, 2)
    torch.testing.assert_close(pool_by_score(tokens, torch.full((2, 36), 0.3), 3), expected)


def test_scores_lie_between_zero_and_one_and_depend_on_the_text():
    module, tokens = layer(), torch.randn(6, 16, 16)
    scores = [module.scores(tokens, 3, text) for text in (torch.randn(2, 10), torch.randn(2, 10))]
    assert scores[0].shape == (6, 16)
    assert all(((s > 0) & (s < 1)).all() for s in scores) and not torch.allclose(*scores)


def test_without_scores_the_text_does_not_matter_and_fields_are_plain_means():
    module, tokens = layer(use_scores=False), torch.randn(6, 16, 16)
    assert torch.equal(module(tokens, 3, torch.randn(2, 10)), module(tokens, 3, torch.randn(2, 10)))
    torch.testing.assert_close(pool_by_score(tokens, module.scores(tokens, 3, torch.randn(2, 10)), 4)[:, 0],
                               tokens.mean(1))


def test_every_token_of_every_view_reaches_every_other():
    module, tokens = layer(), torch.randn(4, 16, 16, requires_grad=True)
    gradient, = torch.autograd.grad(module(tokens, 4, torch.randn(1, 10))[2, 7].square().sum(), tokens)
    assert (gradient.abs().sum(-1) > 0).all()


@pytest.mark.parametrize("num_views", [2, 3, 12])
def test_turning_the_ring_turns_the_output(num_views):
    module, tokens, text = layer(), torch.randn(num_views, 16, 16), torch.randn(1, 10)
    torch.testing.assert_close(module(tokens.roll(1, 0), num_views, text), module(tokens, num_views, text).roll(1, 0),
                               rtol=1e-4, atol=1e-5)


def test_samples_of_a_batch_do_not_see_each_other():
    module, tokens, text = layer(), torch.randn(6, 16, 16), torch.randn(2, 10)
    alone = [module(tokens[3 * i:3 * i + 3], 3, text[i:i + 1]) for i in range(2)]
    torch.testing.assert_close(module(tokens, 3, text), torch.cat(alone), rtol=1e-4, atol=1e-5)


def test_a_window_below_one_is_refused():
    with pytest.raises(ValueError, match="pool_window must be at least 1, got 0"):
        pooling_windows(4, 0)
