"""Rendering a folder of assets into ring files, and going on where it stopped."""

import json

import pytest
import torch
from tiny import write_packed_assets

from coser.cameras import ELEVATION, Cameras
from coser.data import render as module
from coser.data.assets import list_assets, load_mesh
from coser.data.render import ELEVATIONS, load_ring, main, render_assets, render_ring, save_ring
from coser.rasterizer import render


@pytest.fixture
def assets(tmp_path):
    return write_packed_assets(tmp_path / "assets")


def rings(folder):
    return {p.name: p.read_bytes() for p in sorted(folder.glob("*.safetensors"))}


def test_a_saved_ring_loads_as_it_was_rendered(assets, tmp_path):
    views, cameras = render_ring(list_assets(assets)[0], ring=0, num_views=3, size=64)
    save_ring(tmp_path / "ring.safetensors", views, cameras)
    loaded, posed = load_ring(tmp_path / "ring.safetensors")
    torch.testing.assert_close(loaded.views, views.views, atol=0.5 / 255 + 1e-6, rtol=0)
    torch.testing.assert_close(loaded.masks, views.masks, atol=0.5 / 255 + 1e-6, rtol=0)
    torch.testing.assert_close(loaded.depths, views.depths, atol=0, rtol=1e-3)
    torch.testing.assert_close(posed.camera_to_world, cameras.camera_to_world, atol=1e-5, rtol=0)


def test_ring_0_sees_the_asset_at_the_default_elevation_and_the_others_at_one_of_a_few(assets):
    asset = list_assets(assets)[0]
    found = [float(render_ring(asset, ring, num_views=1, size=16)[1].elevations[0]) for ring in range(5)]
    assert found[0] == pytest.approx(ELEVATION, abs=1e-3)
    assert all(min(abs(e - allowed) for allowed in ELEVATIONS) < 1e-3 for e in found[1:])


def test_a_ring_starts_at_the_front(assets):
    asset = list_assets(assets)[0]
    views, _ = render_ring(asset, ring=0, num_views=2, size=64)
    front = render(*load_mesh(asset), Cameras.look_at_origin([0.0], ELEVATION), 64)
    assert torch.equal(views.views[:1], front.views)


def test_an_interrupted_rendering_goes_on_where_it_stopped_and_ends_the_same(assets, tmp_path, monkeypatch):
    known = list_assets(assets)
    render_assets(known, tmp_path / "whole", rings=2, num_views=2, size=32)
    left = iter([True] * 3)

    def until_killed(*args):
        if not next(left, False):
            raise KeyboardInterrupt
        return save_ring(*args)

    monkeypatch.setattr(module, "save_ring", until_killed)
    with pytest.raises(KeyboardInterrupt):
        render_assets(known, tmp_path / "parts", rings=2, num_views=2, size=32)
    monkeypatch.undo()
    first = {p: p.stat().st_mtime_ns for p in (tmp_path / "parts").glob("*.safetensors")}
    assert len(first) == 3
    render_assets(known, tmp_path / "parts", rings=2, num_views=2, size=32)
    assert all(p.stat().st_mtime_ns == when for p, when in first.items())
    assert rings(tmp_path / "parts") == rings(tmp_path / "whole") and len(rings(tmp_path / "whole")) == 8


def test_several_processes_write_what_one_writes(assets, tmp_path):
    for workers in (1, 2):
        main([str(assets), str(tmp_path / str(workers)), "--split", "train", "--num-views", "2", "--size", "16",
              "--device", "cpu", "--workers", str(workers)])
    assert rings(tmp_path / "1") == rings(tmp_path / "2") and len(rings(tmp_path / "1")) == 3


def test_the_index_knows_the_assets_of_all_renderings_into_a_folder(assets, tmp_path):
    for split in ("val", "train"):
        render_assets(list_assets(assets, split), tmp_path / "out", num_views=1, size=16)
    rows = {row["id"]: row for row in map(json.loads, (tmp_path / "out" / "index.jsonl").read_text().splitlines())}
    assert set(rows) == {"held", "cube-a", "cube-b", "ball"}
    assert rows["ball"]["captions"] == ["a red rubber ball", "a rubber ball"]
