"""ViewSet: the channel form and pictures say the same as the views."""

import numpy as np
import pytest
import torch
from solids import cube

from coser.cameras import Cameras
from coser.rasterizer import render
from coser.views import (FAR, NEAR, ViewSet, channels_to_views, depths_to_uint8, grid_columns, picture_grid,
                         views_to_channels, views_to_uint8)


@pytest.fixture(scope="module")
def views() -> ViewSet:
    return render(*cube(0.45), Cameras.orbit(3), 48)


def test_channels_to_views_inverts_views_to_channels(views):
    back = channels_to_views(views_to_channels(views))
    assert torch.allclose(back.views, views.views, atol=1e-6) and torch.allclose(back.masks, views.masks)
    covered = views.masks >= 0.5
    assert torch.allclose(back.depths[covered], views.depths[covered], atol=1e-4)
    assert not back.depths[~covered].any()


def test_channels_are_premultiplied_and_nearer_is_larger(views):
    channels = views_to_channels(views)
    assert channels.shape == (3, 5, 48, 48) and channels.min() >= 0 and channels.max() <= 1
    assert not channels[:, :, 0, 0].any()
    full = views.masks == 1
    expected = (FAR - views.depths) / (FAR - NEAR)
    assert torch.allclose(channels[:, 4:5][full], expected[full], atol=1e-6)


def test_background_shows_where_nothing_is(views):
    white = views.on_background(1.0)
    assert torch.allclose(white[:, :, 0, 0], torch.ones(3, 3))
    full = (views.masks == 1).expand_as(white)
    assert torch.equal(white[full], views.views[full])
    assert views_to_uint8(views)[0, 0, 0].tolist() == [255, 255, 255]
    assert depths_to_uint8(views)[0, 0, 0].tolist() == [0, 0, 0]


def test_indexing_and_cat_keep_every_view(views):
    assert torch.equal(ViewSet.cat([views[0], views[1:]]).depths, views.depths)
    assert len(views[1]) == 1 and len(views[::2]) == 2


def test_picture_grid_places_pictures_row_by_row():
    pictures = np.stack([np.full((4, 4, 3), 10 * i, np.uint8) for i in range(6)])
    sheet = np.asarray(picture_grid(pictures, columns=3, gap=1))
    assert sheet.shape == (9, 14, 3)
    assert [int(sheet[y, x, 0]) for y in (0, 5) for x in (0, 5, 10)] == [0, 10, 20, 30, 40, 50]


def test_grids_of_usual_sizes_have_no_holes():
    assert {n: grid_columns(n) for n in (4, 6, 8, 12, 16, 24)} == {4: 2, 6: 3, 8: 4, 12: 4, 16: 4, 24: 6}


def test_mismatched_parts_are_refused():
    with pytest.raises(ValueError, match="masks"):
        ViewSet(torch.zeros(2, 3, 8, 8), torch.zeros(2, 1, 8, 4), torch.zeros(2, 1, 8, 8))
