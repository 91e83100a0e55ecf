"""Stretched copies: what becomes of the shape, what the captions then say, and what they are counted as."""

import math
from dataclasses import replace

import pytest
import torch
from painted import write_assets
from solids import cube
from tiny import write_packed_assets

from coser.cameras import ELEVATION
from coser.data.assets import Asset, list_assets, load_mesh
from coser.data.dataset import Ring, first_rings, is_copy, list_rings
from coser.data.index import is_repainted, is_stretched, original_id, repainted_id, stretched_id
from coser.data.recolor import recolor_rings
from coser.data.render import load_ring, render_assets
from coser.data.stretch import (HEIGHT, TAPER, WIDTH, Stretch, are_stretched, draw_stretch, main, render_stretched,
                                stretched, stretched_asset, with_size)
from coser.rasterizer import render

SIZES = dict(num_views=4, size=64)


def box(vertices):
    return vertices.amax(0) - vertices.amin(0)


def test_height_and_width_change_the_box_by_their_ratios():
    before, after = box(cube()[0]), box(stretched(cube()[0], Stretch(1.4, 1.2, 0.0)))
    ratios = after / before
    assert float(ratios[1] / (ratios[0] * ratios[2]).sqrt()) == pytest.approx(1.4, rel=1e-5)
    assert float(ratios[0] / ratios[2]) == pytest.approx(1.2, rel=1e-5)


def test_a_taper_makes_the_top_larger_and_the_bottom_smaller():
    vertices = stretched(cube()[0], Stretch(1.0, 1.0, 0.2))
    top, bottom = (box(vertices[vertices[:, 1] * sign > 0]) for sign in (1, -1))
    assert (top / bottom)[[0, 2]].tolist() == pytest.approx([1.2 / 0.8] * 2, rel=1e-5)


@pytest.mark.parametrize("stretch", [Stretch(1.0, 1.0, 0.0), Stretch(0.7, 1.2, -0.2), Stretch(1.42, 0.84, 0.2)])
def test_a_copy_fills_the_unit_sphere_centred(stretch):
    vertices = stretched(cube(0.3)[0], stretch)
    assert float(vertices.norm(dim=1).max()) == pytest.approx(1.0, rel=1e-6)
    assert (vertices.amax(0) + vertices.amin(0)).abs().max() < 1e-6 and vertices.dtype == torch.float32


def test_nothing_stretched_is_the_same_shape():
    vertices = cube(0.3)[0]
    assert torch.allclose(stretched(vertices, Stretch(1.0, 1.0, 0.0)), vertices / vertices.norm(dim=1).max())


def test_a_flat_asset_is_stretched_too():
    flat = cube()[0] * torch.tensor([1.0, 0.0, 1.0])
    assert stretched(flat, Stretch(1.2, 1.1, 0.2)).isfinite().all()


def test_every_other_copy_is_a_mirror_image_and_says_so(tmp_path):
    stretches = [draw_stretch("sign", copy) for copy in range(4)]
    assert [s.mirrored for s in stretches] == [False, True, False, True]
    vertices = cube(0.3, (0.3, 0.1, 0.0))[0]
    plain, mirrored = (stretched(vertices, Stretch(1.2, 1.1, 0.1, mirrored=m)) for m in (False, True))
    assert torch.allclose(plain * torch.tensor([-1.0, 1, 1]), mirrored) and not torch.allclose(plain, mirrored)
    sign = Asset("sign", "", object="sign pointing left", captions=("a sign pointing left",), colors=("red",))
    names = [stretched_asset(sign, copy) for copy in (0, 1)]
    assert "left" in names[0].object and "right" in names[1].object
    assert names[0].captions[0].endswith("left") and names[1].captions[0].endswith("right")


def test_a_mirror_image_is_lit_and_seen_like_any_other_object(tmp_path):
    assets = [a for a in list_assets(write_packed_assets(tmp_path / "assets"), "train") if a.object == "cube"][:1]
    mesh, made = load_mesh(assets[0]), draw_stretch(assets[0].id, 1)
    render_stretched(assets, tmp_path / "rings", copies=2, **SIZES)
    views, cameras = load_ring(tmp_path / "rings" / f"{stretched_id(assets[0].id, 1)}-0.safetensors")
    by_hand = stretched(mesh[0] * torch.tensor([-1.0, 1, 1]), replace(made, mirrored=False))
    wanted = render(by_hand, mesh[1].flip(1), mesh[2].flip(1), cameras, SIZES["size"])
    assert (views.views - wanted.views).abs().max() < 2 / 255 and made.mirrored


@pytest.mark.parametrize("name", ["tall bone", "long tall bone", "bone", "flat"])
def test_no_copy_is_both_tall_and_low(name):
    copies = [stretched_asset(Asset(f"asset-{i}", "", object=name, captions=(f"a {name}",)), 0) for i in range(40)]
    words = {draw_stretch(f"asset-{i}", 0).word for i in range(40)}
    rest = name.split()[-1]
    assert {c.object for c in copies} == {f"{word} {rest}" if word else name for word in words}


def test_stretches_are_drawn_within_their_bounds_and_again_the_same():
    drawn = [draw_stretch(f"asset-{i}", copy) for i in range(300) for copy in (0, 1)]
    assert drawn == [draw_stretch(f"asset-{i}", copy) for i in range(300) for copy in (0, 1)]
    assert len(set(drawn)) == len(drawn) and draw_stretch("asset-0", 0, seed=1) != drawn[0]
    for values, most in (([math.log(s.height) for s in drawn], HEIGHT), ([math.log(s.width) for s in drawn], WIDTH),
                         ([s.taper for s in drawn], TAPER)):
        assert -most <= min(values) < -0.9 * most and 0.9 * most < max(values) <= most
    assert {s.word for s in drawn} == {"tall", "low", "wide", "narrow", ""}


@pytest.mark.parametrize("stretch, word", [
    (Stretch(1.2, 1.0, 0.2), "tall"), (Stretch(0.8, 1.0, 0.0), "low"), (Stretch(1.1, 1.15, 0.0), "wide"),
    (Stretch(0.9, 0.88, 0.0), "narrow"), (Stretch(1.1, 1.05, -0.2), ""), (Stretch(1.3, 1.19, 0.0), "tall")])
def test_what_shows_has_a_word(stretch, word):
    assert stretch.word == word


@pytest.mark.parametrize("caption, word, said", [
    ("a red barrel", "tall", "a tall red barrel"), ("An oak tree", "low", "A low oak tree"),
    ("Wooden crate", "wide", "wide wooden crate"), ("the old mill", "narrow", "the narrow old mill"),
    ("a tall red barrel", "low", None), ("a Small crate", "tall", None), ("a tall red barrel", "", "a tall red barrel"),
    ("a smallish crate", "tall", "a tall smallish crate")])
def test_captions_say_the_word(caption, word, said):
    assert with_size(caption, word) == said


def test_a_copy_is_called_by_its_word_also_where_no_caption_takes_it():
    names = [f"asset-{i}" for i in range(40)]
    copies = [stretched_asset(Asset(n, "", object="oak tree", captions=("a small oak tree",), colors=("green",)), 0)
              for n in names]
    for name, copy in zip(names, copies):
        word = draw_stretch(name, 0).word
        assert copy.object == f"{word} oak tree".strip()
        assert copy.captions == ((f"a {word} green oak tree",) if word else ("a small oak tree",))


def test_rings_show_the_stretched_asset_from_the_default_elevation(tmp_path):
    assets = [a for a in list_assets(write_packed_assets(tmp_path / "assets"), "train") if a.object == "cube"]
    ids = render_stretched(assets, tmp_path / "rings", copies=6, **SIZES)
    assert sorted(ids) == sorted({r.asset_id for r in list_rings(tmp_path / "rings")}) and len(ids) == 6 * len(assets)
    ratios, heights = [], []
    for ring in list_rings(tmp_path / "rings"):
        views, cameras = load_ring(ring.path)
        assert cameras.elevations.tolist() == pytest.approx([ELEVATION] * 4)
        rows, columns = views.masks[0, 0].any(1).sum(), views.masks[0, 0].any(0).sum()
        stretch = draw_stretch(original_id(ring.asset_id), int(ring.asset_id[-1]))
        ratios.append(float(rows / columns))
        heights.append(stretch.height / stretch.width**0.5 / (1 + abs(stretch.taper)))
    assert float(torch.corrcoef(torch.tensor([ratios, heights]))[0, 1]) > 0.9


def test_copies_lie_beside_the_rings_of_the_assets_and_are_none(tmp_path):
    assets = list_assets(write_assets(tmp_path / "assets", repeats=1), "train")
    folder = tmp_path / "rings"
    render_assets(assets, folder, **SIZES)
    assert are_stretched(assets, 0, folder) and not are_stretched(assets, 1, folder)
    main([str(tmp_path / "assets"), str(folder), "--split", "train", "--copies", "1", "--num-views", "4",
          "--size", "64", "--workers", "1"])
    assert are_stretched(assets, 1, folder) and not are_stretched(assets, 2, folder)
    rings = list_rings(folder)
    assert len(rings) == 2 * len(assets) and len(first_rings(rings)) == len(assets)
    assert {original_id(r.asset_id) for r in rings if is_copy(r)} == {a.id for a in assets}
    assert len(list_rings(folder, min_kind_count=1)) == len(rings)
    with pytest.raises(ValueError, match="at least 2 assets"):
        list_rings(folder, min_kind_count=2)
    before = {p: p.stat().st_mtime_ns for p in folder.glob("*.safetensors")}
    render_stretched(assets, folder, **SIZES)
    assert {p: p.stat().st_mtime_ns for p in folder.glob("*.safetensors")} == before


def test_kinds_of_few_assets_can_be_left_out(tmp_path):
    write_packed_assets(tmp_path / "assets")
    main([str(tmp_path / "assets"), str(tmp_path / "rings"), "--split", "train", "--min-object-count", "2",
          "--num-views", "4", "--size", "64", "--workers", "1"])
    assert [r.asset_id for r in list_rings(tmp_path / "rings")] == ["cube-a~stretched0", "cube-b~stretched0"]


def test_stretched_copies_are_repainted_like_assets(tmp_path):
    assets = list_assets(write_assets(tmp_path / "assets"), "train")
    render_assets(assets, tmp_path / "rings", **SIZES)
    render_stretched(assets, tmp_path / "rings", **SIZES)
    painted = recolor_rings(tmp_path / "rings")
    both = [name for name in painted if is_stretched(name)]
    assert both and len(both) < len(painted) and all(map(is_repainted, painted))
    assert recolor_rings(tmp_path / "rings") == painted, "what is repainted is not repainted again"
    known = {r.asset_id: r for r in list_rings(tmp_path / "rings")}
    for name in both:
        copy, color = name.rsplit("~", 1)
        assert known[name].colors[0] == color and all(color in c for c in known[name].captions)
        assert known[name].kind == known[copy].kind and original_id(name) == original_id(copy)


def test_ids_tell_copies_apart():
    copy, painted = stretched_id("a-1", 2), repainted_id("a-1", "red")
    both = repainted_id(copy, "red")
    assert [is_stretched(i) for i in ("a-1", copy, painted, both)] == [False, True, False, True]
    assert [is_repainted(i) for i in ("a-1", copy, painted, both)] == [False, False, True, True]
    assert {original_id(i) for i in ("a-1", copy, painted, both)} == {"a-1"}


def test_short_captions_of_a_stretched_copy_say_how_it_is_stretched():
    facts = dict(object="tall oak tree", captions=("a tall oak", "tall oak"), colors=("orange",))
    ring = Ring("x-0", stretched_id("x", 0), **facts)
    assert ring.short_captions == ("a tall oak", "a tall orange oak tree", "a tall orange tree")
    assert Ring("x-0", "x", **facts).short_captions[1] == "an orange tall oak tree", "a name that an asset has itself"
    nothing_shows = replace(ring, object="oak tree", captions=("an oak",))
    assert nothing_shows.short_captions == ("an oak", "an orange oak tree", "an orange tree")
    painted = replace(nothing_shows, asset_id=repainted_id(ring.asset_id, "red"), object="low small tree")
    assert painted.short_captions == ("an oak", "a low orange tree"), "one size is enough"


def test_a_folder_without_assets_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        main([str(tmp_path), str(tmp_path / "out")])
    assert stopped.value.code == 1 and "no assets found" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
