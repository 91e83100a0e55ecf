"""Finishing: options do what they say, the surface is used again, and what is kept comes back."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from drawn_pipeline import box_views

from coser import reconstruction
from coser.cameras import Cameras
from coser.finishing import finish_asset, load_finished, save_finished
from coser.reconstruction import find_surface, finish
from coser.request import AssetOptions

RING = Cameras.orbit(6)
QUICK = AssetOptions(max_faces=500, texture_size=512)


@pytest.fixture(scope="module")
def surface():
    return find_surface(box_views("a red box", RING), RING, resolution=48)


@pytest.fixture(scope="module")
def finished(surface):
    return finish_asset(surface, QUICK)


def test_the_asset_stands_on_the_floor_is_as_long_as_asked_and_keeps_the_budget(finished):
    low, high = finished.mesh.vertices.min(0), finished.mesh.vertices.max(0)
    assert low[1] == pytest.approx(0, abs=1e-6) and (high - low).max() == pytest.approx(1.0, abs=1e-5)
    assert np.allclose((low + high)[[0, 2]], 0, atol=1e-5)
    assert finished.mesh.is_watertight and len(finished.mesh.faces) <= 500 and len(finished.mesh.texture) == 512


def test_other_options_are_made_from_the_same_surface(surface):
    other = finish_asset(surface, AssetOptions(max_faces=800, coloring="vertices", origin="center", longest_side=0.3))
    assert other.surface is surface and 500 < len(other.mesh.faces) <= 800
    assert other.mesh.texture is None and other.mesh.vertex_colors is not None
    low, high = other.mesh.vertices.min(0), other.mesh.vertices.max(0)
    assert np.allclose(low + high, 0, atol=1e-5) and (high - low).max() == pytest.approx(0.3, abs=1e-5)


def test_the_triangles_that_the_fit_was_checked_with_are_not_made_again(monkeypatch):
    monkeypatch.setattr(reconstruction, "CHECKED_FACES", 600)
    surface = find_surface(box_views("a red box", RING), RING, resolution=48)
    expected = finish(replace(surface, checked=None), max_faces=600, texture_size=None)
    monkeypatch.setattr(reconstruction, "simplify", None)  # whoever calls it now fails
    mesh = finish(surface, max_faces=600, texture_size=None)
    assert 100 < len(mesh.faces) <= 600 < len(surface.mesh.faces)
    assert np.array_equal(mesh.vertices, expected.vertices) and np.array_equal(mesh.faces, expected.faces)


def test_scale_and_offset_lead_from_the_cameras_world_to_the_assets(finished):
    box = np.stack([finished.surface.mesh.vertices.min(0), finished.surface.mesh.vertices.max(0)])
    placed = np.stack([finished.mesh.vertices.min(0), finished.mesh.vertices.max(0)])
    assert np.allclose(finished.scale * box + finished.offset, placed, atol=0.03)  # simplifying moves a box a little


def test_what_is_kept_comes_back_and_finishes_the_same(finished, tmp_path):
    back = load_finished(save_finished(finished, tmp_path / "asset.npz"))
    for name, value in vars(finished.mesh).items():
        assert (value is None) == (getattr(back.mesh, name) is None)
        assert value is None or np.array_equal(value, getattr(back.mesh, name))
    assert (back.options, back.scale, back.offset) == (finished.options, finished.scale, finished.offset)
    assert torch.equal(back.surface.views.depths, finished.surface.views.depths)
    assert torch.allclose(back.surface.views.views, finished.surface.views.views, atol=1e-3)
    again = finish_asset(back.surface, QUICK)
    assert np.array_equal(again.mesh.vertices, finished.mesh.vertices)
    assert np.abs(again.mesh.texture.astype(int) - finished.mesh.texture).max() <= 2
    assert [p.name for p in tmp_path.iterdir()] == ["asset.npz"]


def test_an_archive_with_pickled_objects_is_not_read(finished, tmp_path):
    path = save_finished(finished, tmp_path / "asset.npz")
    with np.load(path) as file:
        arrays = dict(file)
    np.savez(path, **arrays | {"options": np.array([object()], dtype=object)})
    with pytest.raises(ValueError, match="allow_pickle"):
        load_finished(path)


