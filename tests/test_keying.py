"""Keying: objects come off plain backgrounds with soft edges, holes and their own colours, or a clear error comes."""

import pytest
import torch
from solids import cube, sphere

from coser.cameras import Cameras
from coser.rasterizer import render
from coser.reconstruction.keying import key_background, views_from_pictures

SIZE = 96


def disc(radius: float, row: float = 48, column: float = 48) -> torch.Tensor:
    """Coverage [S,S] of a disc, its edge one pixel soft."""
    ticks = torch.arange(SIZE) + 0.5
    return (radius - torch.hypot(ticks[:, None] - row, ticks[None] - column) + 0.5).clamp(0, 1)


def painted(mask: torch.Tensor, color, background) -> torch.Tensor:
    """One picture [1,3,S,S]: a colour (three numbers or [3,S,S]) over a background (the same)."""
    color, background = (c if torch.is_tensor(c) and c.ndim == 3 else torch.as_tensor(c).view(3, 1, 1)
                         for c in (color, background))
    return (mask * color + (1 - mask) * background)[None]


def slope() -> torch.Tensor:
    """A grey wall, brighter at the top left, with a bend in its light."""
    y, x = torch.meshgrid(*(torch.linspace(-1, 1, SIZE),) * 2, indexing="ij")
    return torch.stack([0.7 - 0.12 * y - 0.06 * x - 0.05 * x * x + c for c in (0, 0.01, 0.03)])


@pytest.mark.parametrize("background", [torch.ones(3), torch.tensor([0.1, 0.6, 0.2]), slope()],
                         ids=["white", "green screen", "lit wall"])
def test_disc_is_keyed_to_a_tenth_of_a_pixel(background):
    truth = disc(30)
    mask = key_background(painted(truth, (0.8, 0.1, 0.1), background))[0, 0]
    assert (mask - truth).abs().max() < 0.12
    assert float(mask.sum()) == pytest.approx(float(truth.sum()), rel=0.003)


def test_edges_carry_the_object_s_colour_alone():
    truth = disc(30)
    picture = painted(truth, (0.8, 0.1, 0.1), (1.0, 1.0, 1.0))
    views = views_from_pictures(picture, key_background(picture))
    assert views.views[0] == pytest.approx(painted(truth, (0.8, 0.1, 0.1), (0.0, 0.0, 0.0))[0], abs=0.1)
    assert (views.views <= views.masks).all() and not views.depths.any()


def test_background_is_seen_through_a_ring():
    ring = disc(35) - disc(15)
    mask = key_background(painted(ring, (0.2, 0.3, 0.7), slope()))[0, 0]
    assert mask[48, 48] == 0 and (mask - ring).abs().mean() < 0.005


def test_small_white_spots_are_object():
    spot = disc(1.8, 40, 40)
    picture = spot + (1 - spot) * painted(disc(30), (0.2, 0.3, 0.7), (1.0, 1.0, 1.0))
    assert key_background(picture)[0, 0, 40, 40] == 1


def test_a_shaded_white_place_is_object():
    place = disc(12)
    color = 1 - 0.05 * (torch.arange(SIZE) / SIZE)[:, None].expand(3, SIZE, SIZE)  # nearly the background's colour
    picture = place * color + (1 - place) * painted(disc(30), (0.2, 0.3, 0.7), (1.0, 1.0, 1.0))
    assert key_background(picture)[0, 0, 48, 48] == 1


def test_dirt_is_dropped_and_a_second_part_is_kept():
    mask = disc(20, 40, 30) + disc(12, 60, 75) + disc(2, 10, 80)
    keyed = key_background(painted(mask, (0.1, 0.1, 0.1), (0.9, 0.9, 0.9)))[0, 0]
    assert keyed[60, 75] == 1 and keyed[10, 80] == 0


def test_noise_stays_background():
    noise = 0.015 * torch.randn(1, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    mask = key_background((painted(disc(30), (0.2, 0.3, 0.7), slope()) + noise).clamp(0, 1))[0, 0]
    assert (mask - disc(30)).abs().mean() < 0.01
    assert not mask[:10].any()


def test_object_that_leaves_the_picture_is_keyed():
    mask = key_background(painted(disc(40, 90), (0.1, 0.4, 0.2), (1.0, 1.0, 1.0)))[0, 0]
    assert (mask - disc(40, 90)).abs().mean() < 0.01


def test_rendered_views_on_white_keep_their_masks():
    for solid in (cube(0.5), sphere(0.6, 24)):
        views = render(*solid, Cameras.orbit(4), SIZE)
        keyed = views_from_pictures(views.on_background(), key_background(views.on_background()))
        assert (keyed.masks - views.masks).abs().mean() < 0.004
        assert (keyed.views - views.views).abs().mean() < 0.004


def test_an_empty_picture_has_an_empty_mask():
    assert not key_background(slope()[None]).any()


def test_restless_borders_are_refused_with_their_picture_s_number():
    noise = torch.rand(1, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    with pytest.raises(ValueError, match="picture 1 has no plain border.*alpha"):
        key_background(torch.cat([slope()[None], noise]))


def test_wrong_shapes_are_refused():
    with pytest.raises(ValueError, match="pictures"):
        key_background(torch.zeros(1, 4, 32, 32))
    with pytest.raises(ValueError, match="8 pixels"):
        key_background(torch.zeros(1, 3, 4, 32))
    with pytest.raises(ValueError, match="masks"):
        views_from_pictures(torch.zeros(1, 3, 32, 32), torch.zeros(2, 1, 32, 32))
