"""Repainted rings: what changes, what stays, what the captions then say, and what is held out."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from coser.data import recolor
from coser.data.dataset import list_rings
from coser.data.recolor import (Paint, hsv_to_rgb, opaque_pixels, recolor_rings, repaint, rewrite, rgb_to_hsv,
                                worn_paint)

RED, GREY = (200, 40, 40), (120, 120, 120)


def two_toned(top=RED, bottom=GREY, size=16, views=4):
    """Rings of a square, lit less from view to view: the upper half of one colour, the lower of another."""
    rgba = torch.zeros(views, 4, size, size, dtype=torch.uint8)
    for view in range(views):
        light = 1 - 0.15 * view
        for rows, color in ((slice(4, 8), top), (slice(8, 12), bottom)):
            rgba[view, :3, rows, 4:12] = (torch.tensor(color)[:, None, None] * light).round().to(torch.uint8)
        rgba[view, 3, 4:12, 4:12] = 255
    return rgba


def write_renders(folder, rows, **pictures):
    folder.mkdir()
    for row in rows:
        rgba = pictures.get(row["id"], two_toned())
        tensors = {"rgba": rgba, "depths": torch.ones(len(rgba), 1, 16, 16).half(),
                   "azimuths": torch.arange(len(rgba)) * 90.0, "elevations": torch.full((len(rgba),), 20.0)}
        save_file(tensors, folder / f"{row['id']}-0.safetensors")
    (folder / "index.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def row(asset_id, color="red", kind="barrel", others=("grey",), captions=None):
    captions = captions or [f"a {color} {kind} with grey hoops", f"a {kind}", f"a round {color} {kind}"]
    return {"id": asset_id, "object": kind, "captions": captions, "colors": [color, *others]}


def test_hsv_and_back():
    colors = torch.rand(1000, 3, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(hsv_to_rgb(rgb_to_hsv(colors)), colors, atol=1e-5)
    known = rgb_to_hsv(torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, 0, 0.5], [0.3, 0.3, 0.3]]))
    assert torch.allclose(known, torch.tensor([[0, 1, 1], [120, 1, 1], [240, 1, 0.5], [0, 0, 0.3]]))


def test_worn_paint_is_found_and_counted():
    paint, share = worn_paint(opaque_pixels(two_toned()), "red")
    assert recolor.hue_distance(paint.hue, 0) <= 6 and share == pytest.approx(0.5)
    assert paint.saturation == pytest.approx(0.8, abs=0.02)
    assert worn_paint(opaque_pixels(two_toned()), "blue") is None
    assert worn_paint(opaque_pixels(two_toned(GREY, GREY)), "red") is None


def test_only_the_worn_colour_changes_and_shading_stays():
    rgba = two_toned()
    old, _ = worn_paint(opaque_pixels(rgba), "red")
    new = repaint(rgba, old, Paint(220.0, old.saturation, old.value))
    assert torch.equal(new[:, :, 8:12], rgba[:, :, 8:12]), "grey parts stay"
    assert torch.equal(new[:, 3], rgba[:, 3]), "coverage stays"
    painted = rgb_to_hsv(new[:, :3, 6, 6].float() / 255)
    assert (recolor.hue_distance(painted[:, 0], 220.0) < 6).all()
    lit_before, lit_after = (x[:, :3, 6, 6].float().amax(1) for x in (rgba, new))
    light_before, light_after = lit_before / lit_before[0], lit_after / lit_after[0]
    assert torch.allclose(light_after, light_before, atol=0.02), "the light of each view stays"


def test_half_covered_pixels_keep_their_coverage():
    rgba = two_toned()
    rgba[:, :, 4, 4:12] = rgba[:, :, 4, 4:12] // 2  # premultiplied: colour and coverage halve
    old, _ = worn_paint(opaque_pixels(rgba), "red")
    new = repaint(rgba, old, Paint(220.0, old.saturation, old.value))
    assert torch.equal(new[:, 3], rgba[:, 3])
    halves = new[:, :3, 4, 6].float() / new[:, :3, 6, 6].float()
    assert (halves - 0.5).abs().max() < 0.03


@pytest.mark.parametrize(("caption", "expected"), [
    ("a red barrel", "an orange barrel"),
    ("A red barrel with dark red hoops", "an orange barrel with dark orange hoops"),
    ("a barrel", None),  # says nothing of its colour: it would teach that barrels have any
    ("a redwood barrel", None),
    ("a red and crimson barrel", None),
    ("a red barrel with pink hoops", None),  # which are repainted with it
    ("a red barrel with teal hoops", "an orange barrel with teal hoops"),
    ("a reddish barrel with red hoops", None),
])
def test_rewritten_captions(caption, expected):
    assert rewrite(caption, "red", "orange") == expected


def test_copies_are_assets_of_their_own(tmp_path):
    rows = [row("a"), row("b", "blue"), row("c", "grey", others=()), row("d", "red", others=("orange",)),
            row("e", "green")]
    folder = write_renders(tmp_path / "renders", rows, b=two_toned((40, 60, 200)), c=two_toned(GREY, GREY),
                           e=two_toned((40, 160, 60)))
    written = recolor_rings(folder, seed=1)
    assert sorted(w.split("~")[0] for w in written) == ["a", "b", "e"], "grey, and red beside orange, are left alone"
    copies = [r for r in list_rings(folder) if "~" in r.asset_id]
    assert sorted(r.asset_id for r in copies) == sorted(written)
    for ring in copies:
        word = ring.asset_id.split("~")[1]
        assert ring.colors[0] == word and all(word in c for c in ring.captions) and len(ring.captions) == 2
        paint, share = worn_paint(opaque_pixels(load_file(ring.path)["rgba"]), word)
        assert share == pytest.approx(0.5), "its pixels are what its captions say"
    before = {p: p.read_bytes() for p in folder.iterdir()}
    assert recolor_rings(folder, seed=1) == written
    assert {p: p.read_bytes() for p in folder.iterdir()} == before, "a second call changes nothing"


def test_a_copy_s_name_keeps_no_stuff_of_another_colour(tmp_path):
    rows = [row("a") | {"object": "red leather barrel"}, row("b", "blue")]
    folder = write_renders(tmp_path / "renders", rows, b=two_toned((40, 60, 200)))
    assert "a~blue" in recolor_rings(folder)
    copy = next(r for r in list_rings(folder) if r.asset_id == "a~blue")
    assert copy.object == "barrel" and "a blue barrel" in copy.short_captions


def test_copies_make_no_kind_common(tmp_path):
    folder = write_renders(tmp_path / "renders", [row("a"), row("a~blue", "blue"), row("b", kind="tree"),
                                                  row("c", kind="tree"), row("c~pink", "pink", kind="tree")])
    assert {r.asset_id for r in list_rings(folder, min_kind_count=2)} == {"b", "c", "c~pink"}


@pytest.mark.parametrize("called", ["barrel", "four barrels", "barrel with a small tap", "yellow barrels on a pallet"])
def test_held_out_pairs_are_never_painted_whatever_an_asset_calls_its_kind(tmp_path, monkeypatch, called):
    rows = [row(f"a{i}") | {"object": called} for i in range(30)] + [row("b", "blue"), row("g", "green")]
    folder = write_renders(tmp_path / "renders", rows, b=two_toned((40, 60, 200)), g=two_toned((40, 160, 60)))
    monkeypatch.setattr(recolor, "held_out_pairs", lambda: {("blue", "barrel")})
    words = {w.split("~")[1] for w in recolor_rings(folder) if w.startswith("a")}
    assert words == {"green"}


def test_held_out_assets_are_painted_in_held_out_colours_for_evaluation_alone(tmp_path, monkeypatch):
    training = write_renders(tmp_path / "renders", [row("t", "blue")], t=two_toned((40, 60, 200)))
    held_out = write_renders(tmp_path / "held_out", [
        row("a"), row("b", "blue"), row("c", kind="crate"), row("d", "grey", others=())], b=two_toned((40, 60, 200)),
        d=two_toned(GREY, GREY))
    monkeypatch.setattr(recolor, "held_out_pairs", lambda: {("blue", "barrel"), ("pink", "barrel")})
    before = {p: p.read_bytes() for folder in (training, held_out) for p in folder.iterdir()}
    recolor.main([str(training), "--held-out", str(held_out), "--out", str(tmp_path / "pairs")])
    ring, = list_rings(tmp_path / "pairs")  # b is blue already, d has no colour, and nobody shows how pink looks
    assert (ring.asset_id, ring.colors, ring.captions) == ("a~blue", ("blue",), ("a blue barrel",))
    paint, share = worn_paint(opaque_pixels(load_file(ring.path)["rgba"]), "blue")
    assert share == pytest.approx(0.5)
    assert {p: p.read_bytes() for folder in (training, held_out) for p in folder.iterdir()} == before
    with pytest.raises(SystemExit):
        recolor.main([str(training), "--held-out", str(held_out), "--out", str(tmp_path / "pairs")])
    with pytest.raises(SystemExit):
        recolor.main([str(training), "--held-out", str(held_out)])


def test_the_held_out_list_is_forty_pairs_of_paintable_colours():
    pairs = recolor.held_out_pairs()
    assert len(pairs) == 40
    assert {color for color, _ in pairs} <= set(recolor.TARGETS)
