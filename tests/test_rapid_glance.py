"""Rapid glance: the orders tokens are scanned in, and the scan both ways."""

import pytest
import torch

from coser.models.rapid_glance import (SCAN_LAYOUTS, SCAN_ORDERS, RapidGlance, _Reorder, picture_order, scan_order,
                                       spiral_order)
from coser.models.ssm import scan_naive


def glance(seed=0, **options):
    torch.manual_seed(seed)
    module = RapidGlance(24, 32, head_size=8, state_size=4, chunk_size=8, **options)
    torch.nn.init.normal_(module.to_out.weight)
    return module


@pytest.mark.parametrize("size", range(1, 18))
def test_spiral_visits_every_token_once(size):
    assert sorted(spiral_order(size).tolist()) == list(range(size * size))


@pytest.mark.parametrize("size", range(1, 18))
def test_spiral_starts_at_the_centre_and_ends_at_the_border(size):
    row, column = divmod(int(spiral_order(size)[0]), size)
    assert abs(row - (size - 1) / 2) <= 0.5 and abs(column - (size - 1) / 2) <= 0.5
    row, column = divmod(int(spiral_order(size)[-1]), size)
    assert row in (0, size - 1) and column in (0, size - 1)


@pytest.mark.parametrize("size", range(2, 18))
@pytest.mark.parametrize("order", ["spiral", "zigzag"])
def test_consecutive_tokens_are_neighbours_in_the_picture(size, order):
    rows, columns = picture_order(size, order) // size, picture_order(size, order) % size
    assert (rows.diff().abs() + columns.diff().abs()).eq(1).all()


@pytest.mark.parametrize("size", range(2, 18))
def test_spiral_never_comes_back_towards_its_start(size):
    rows, columns = spiral_order(size) // size, spiral_order(size) % size
    distance = torch.maximum((rows - rows[0]).abs(), (columns - columns[0]).abs())
    assert (distance.diff() >= 0).all()


def test_spiral_of_three_by_hand():
    assert spiral_order(3).tolist() == [4, 5, 8, 7, 6, 3, 0, 1, 2]


def test_layouts_by_hand():
    assert scan_order(2, 2, "raster", "view_major").tolist() == [0, 1, 2, 3, 4, 5, 6, 7]
    assert scan_order(2, 2, "raster", "position_major").tolist() == [0, 4, 1, 5, 2, 6, 3, 7]
    assert scan_order(1, 2, "zigzag", "view_major").tolist() == [0, 1, 3, 2]


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="scan_order must be one of .*'hilbert'"):
        RapidGlance(24, 32, 8, order="hilbert")
    with pytest.raises(ValueError, match="scan_layout must be one of .*'diagonal'"):
        RapidGlance(24, 32, 8, layout="diagonal")
    with pytest.raises(ValueError, match=r"inner must be a multiple of two heads \(16\), got 24"):
        RapidGlance(24, 24, 8)


@pytest.mark.parametrize("order", SCAN_ORDERS)
@pytest.mark.parametrize("layout", SCAN_LAYOUTS)
def test_first_half_sees_only_earlier_tokens_second_half_only_later_ones(order, layout):
    module, num_views, size = glance(order=order, layout=layout), 3, 3
    where = scan_order(num_views, size, order, layout)
    values, dynamics = torch.randn(1, 27, 32), torch.randn(1, 27, 2 * (2 * 4 + 2))
    before = module.scan_two_ways(values, dynamics, num_views)
    for step in (0, 11, 26):
        touched = values.clone()
        touched[:, where[step]] += 1
        moved = (module.scan_two_ways(touched, dynamics, num_views) - before)[0, where].abs() > 0
        forwards, backwards = moved[:, :16].any(-1), moved[:, 16:].any(-1)
        assert not forwards[:step].any() and forwards[step:].all()
        assert not backwards[step + 1:].any() and backwards[:step + 1].all()


def test_two_way_scan_equals_two_scans_of_reordered_tokens():
    module, where = glance(), scan_order(2, 4, "spiral", "view_major")
    values, dynamics = torch.randn(3, 32, 32), torch.randn(3, 32, 20)
    expected = []
    for way, order in enumerate((where, where.flip(0))):
        x = values[:, order, 16 * way:16 * way + 16].unflatten(-1, (2, 8))
        B, C, dt = dynamics[:, order, 10 * way:10 * way + 10].split([4, 4, 2], -1)
        heads = slice(2 * way, 2 * way + 2)
        dt = torch.nn.functional.softplus(dt + module.step_bias[heads])
        y = scan_naive(x, dt, -module.rate_log[heads].exp(), B[:, :, None], C[:, :, None]).flatten(2)
        expected.append(torch.empty_like(y).index_copy(1, order, y))
    torch.testing.assert_close(module.scan_two_ways(values, dynamics, 2), torch.cat(expected, -1), rtol=1e-4, atol=1e-5)


def test_reordering_has_the_gradient_of_indexing():
    table = torch.randn(2, 6, 3, dtype=torch.float64, requires_grad=True)
    rows = torch.randperm(6)
    torch.autograd.gradcheck(lambda t: _Reorder.apply(t, rows, rows.argsort()), table)


def test_every_token_of_every_view_reaches_every_other():
    module, tokens = glance(), torch.randn(4, 9, 24, requires_grad=True)
    for view, token in ((0, 0), (2, 4), (3, 8)):
        gradient, = torch.autograd.grad(module(tokens, 4)[view, token].square().sum(), tokens)
        assert (gradient.abs().sum(-1) > 0).all()


def test_samples_of_a_batch_do_not_see_each_other():
    module, tokens = glance(), torch.randn(6, 16, 24)
    torch.testing.assert_close(module(tokens, 3), torch.cat([module(t, 3) for t in tokens.split(3)]))
