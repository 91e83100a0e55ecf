"""Scenes of several assets: where their parts stand, what they are called, what is held out, and who reads them."""

import json

import pytest
import torch
from painted import PAINTS, write_assets

from coser.cameras import Cameras
from coser.data import compose as module
from coser.data.assets import Asset, list_assets, load_mesh
from coser.data.compose import compose, held_out_compositions, main, pair_key, write_scenes
from coser.data.dataset import LatentRings, list_rings, mirror_views
from coser.data.placing import box_of, height_fields
from coser.data.recolor import recolor_rings
from coser.data.render import load_ring, render_assets
from coser.data.scene_words import CARRIERS, INVERSE, PORTABLE, RELATIONS, SIZES, Part, part_of, plural, scene_captions
from coser.questions import QUESTIONS, load_questions
from coser.judge_figures import small_rings
from coser.rasterizer import render
from coser.vocabulary import learn_vocabulary, read_index

@pytest.fixture(scope="module")
def assets(tmp_path_factory):
    return write_assets(tmp_path_factory.mktemp("solids") / "assets")


@pytest.fixture(scope="module")
def scenes(assets):
    return list(compose(list_assets(assets, "train"), 70, seed=3))


@pytest.fixture(scope="module")
def packed(assets, tmp_path_factory):
    """(folder of packed scenes, folder of their renders and of their assets')."""
    folder = tmp_path_factory.mktemp("scenes")
    write_scenes(list_assets(assets, "train"), folder / "packed", 12, seed=5)
    for found in (list_assets(folder / "packed"), list_assets(assets, "train")):
        render_assets(found, folder / "renders", num_views=4, size=128)
    return folder / "packed", folder / "renders"


def parts_of(scene):
    """The scene's mesh taken apart: [(vertices, faces)] in the order of the index's `parts`."""
    vertices, faces, _ = scene.mesh
    copies = [scene.first, scene.first, scene.second] if scene.relation == "and" else [scene.first, scene.second]
    out, first, face = [], 0, 0
    for part in copies:
        known, known_faces, _ = load_mesh(part.asset)
        out.append((vertices[first:first + len(known)], known_faces))
        assert torch.equal(faces[face:face + len(known_faces)], known_faces + first)
        first, face = first + len(known), face + len(known_faces)
    assert first == len(vertices) and face == len(faces), "a scene is made of its parts and nothing else"
    return out


def test_every_relation_is_composed_of_known_kinds_alone(scenes):
    assert {s.relation for s in scenes} == set(RELATIONS)
    assert {s.first.kind for s in scenes} | {s.second.kind for s in scenes} <= {
        "table", "crate", "pumpkin", "pot", "barrel", "woman", "apple", "chest"}, "no spaceship, nothing broken"
    assert all(s.first.name in PORTABLE and s.second.name in CARRIERS for s in scenes if s.relation == "on")
    assert all(s.first.kind != s.second.kind for s in scenes)


def test_what_lies_on_something_touches_it_and_nothing_sinks_in(scenes):
    laid = [s for s in scenes if s.relation == "on"]
    assert len(laid) > 10
    for scene in laid:
        upper, lower = parts_of(scene)
        low, high = box_of(upper[0])
        cell = float((high - low)[[0, 2]].max()) / 250
        corner = float(low[0]), float(low[2])
        gap = height_fields(*upper, corner, cell, 250)[0] - height_fields(*lower, corner, cell, 250)[1]
        assert float(gap.min()) == pytest.approx(0, abs=2e-3), scene.row("", "", "")["object"]
        middle = (low + high) / 2
        assert bool((box_of(lower[0])[0, [0, 2]] < middle[[0, 2]]).all()), "over what carries it"
        assert bool((middle[[0, 2]] < box_of(lower[0])[1, [0, 2]]).all())


def test_neighbours_stand_on_one_floor_a_little_apart(scenes):
    beside = [s for s in scenes if s.relation != "on"]
    for scene in beside:
        boxes = [box_of(vertices) for vertices, _ in parts_of(scene)]
        floor = torch.stack([box[0, 1] for box in boxes])
        assert float(floor.max() - floor.min()) < 1e-6
        largest = max(float((box[1] - box[0]).max()) for box in boxes)
        for i, a in enumerate(boxes):
            apart = [float(torch.maximum(a[0] - b[1], b[0] - a[1])[[0, 2]].max()) for b in boxes[:i] + boxes[i + 1:]]
            assert min(apart) >= 0.0199 * largest, "boxes do not meet"
            assert min(apart) <= 0.0801 * largest, "each has a neighbour"


def test_scenes_fill_the_unit_sphere_and_the_smaller_part_stays_visible(scenes):
    for scene in scenes:
        vertices = scene.mesh[0]
        assert float(vertices.norm(dim=1).max()) == pytest.approx(1)
        assert float(box_of(vertices).sum(0).abs().max()) < 1e-6, "centred"
        extents = [float((v.amax(0) - v.amin(0)).max()) for v, _ in parts_of(scene)]
        assert min(extents) >= 0.25 * max(extents)
        if scene.first.size > scene.second.size:
            assert extents[0] > extents[-1], "what is larger in life is larger here"


def across(picture, paint):
    """The mean column [0,1] of the pixels [3,S,S] that wear a paint, under whatever light."""
    color = torch.tensor(PAINTS[paint])
    worn = ((picture > 0.3) == (color > 0.5)[:, None, None]).all(0)
    return float(worn.nonzero()[:, 1].double().mean()) / picture.shape[-1]


def test_left_is_left_seen_from_the_front_and_right_in_the_mirror_image(scenes):
    asked = [s for s in scenes if s.relation in ("left of", "right of") and s.first.color and s.second.color
             and s.first.color != s.second.color]
    assert {s.relation for s in asked} == {"left of", "right of"}
    for scene in asked:
        vertices, faces, colors = scene.mesh
        views = render(vertices.float(), faces, colors, Cameras.orbit(4, 10.0), 64)
        for seen, word in ((views, scene.relation), (mirror_views(views), INVERSE[scene.relation])):
            left = across(seen.views[0], scene.first.color) < across(seen.views[0], scene.second.color)
            assert left == (word == "left of")


def test_what_is_in_front_is_nearer_to_who_sees_the_front_and_lower(scenes):
    asked = [s for s in scenes if s.relation in ("in front of", "behind")]
    assert {s.relation for s in asked} == {"in front of", "behind"}
    for scene in asked:
        first, second = (box_of(vertices) for vertices, _ in parts_of(scene))
        near, far = (first, second) if scene.relation == "in front of" else (second, first)
        assert float(near[0, 2]) > float(far[1, 2]) and float(near[1, 1]) < float(far[1, 1])


def part(name, color, entry=None):
    asset = Asset("x", None, object=name, captions=(f"a {color} {name}",), colors=(color,) if color else ())
    return Part(asset, entry or name.split()[-1], color)


LANTERN, BARREL = part("lantern", "red"), part("small oak barrel", "orange")


@pytest.mark.parametrize(("first", "relation", "second", "expected"), [
    (LANTERN, "on", BARREL, ("a red lantern on an orange barrel", "a lantern on a barrel",
                             "a red lantern on top of a small orange oak barrel",
                             "an orange barrel with a red lantern on it")),
    (part("apple", ""), "beside", part("table lamp", "grey", "table lamp"),
     ("an apple beside a grey table lamp", "an apple next to a table lamp",
      "an apple standing beside a grey table lamp", "a grey table lamp with an apple at its side")),
    (LANTERN, "left of", BARREL, ("a red lantern left of an orange barrel", "a lantern to the left of a barrel",
                                  "a red lantern on the left and a small orange oak barrel on the right",
                                  "an orange barrel to the right of a red lantern")),
    (BARREL, "behind", LANTERN, ("an orange barrel behind a red lantern", "a barrel behind a lantern",
                                 "a small orange oak barrel standing behind a red lantern",
                                 "a red lantern in front of an orange barrel")),
    (part("wooden box", "brown"), "and", part("red tulip", "red"),
     ("two brown boxes and a red tulip", "two boxes and a tulip", "a pair of brown wooden boxes next to a red tulip",
      "a red tulip and two brown boxes")),
])
def test_captions_are_what_people_type(first, relation, second, expected):
    assert scene_captions(first, relation, second) == expected


def test_an_unknown_relation_is_refused():
    with pytest.raises(ValueError, match="on, beside, .*got 'under'"):
        scene_captions(LANTERN, "under", BARREL)


@pytest.mark.parametrize(("one", "two"), [("wooden box", "wooden boxes"), ("woman", "women"), ("cactus", "cacti"),
                                          ("torch", "torches"), ("berry", "berries"), ("toy", "toys"),
                                          ("shelf", "shelves"), ("snowman", "snowmen"), ("deer", "deer")])
def test_plurals(one, two):
    assert plural(one) == two


@pytest.mark.parametrize(("name", "entry"), [
    ("spiky potted cactus", "potted cactus"), ("saguaro cactus", "cactus"), ("floor lamp", "floor lamp"),
    ("pendant lamp", None), ("table with keys", None), ("half coconut", None), ("hot dog", None), ("quasar", None)])
def test_names_hold_for_what_has_all_their_words(name, entry):
    found = part_of(Asset("x", None, object=name, captions=(f"a {name}",)))
    assert (found.name if found else None) == entry


def test_a_colour_is_named_where_the_asset_s_own_caption_names_it():
    brown = Asset("x", None, object="barrel", captions=("a brown barrel",), colors=("brown", "grey"))
    assert part_of(brown).color == "brown"
    assert part_of(Asset("x", None, object="barrel", captions=("a big barrel",), colors=("brown",))).color == ""
    assert part_of(Asset("x", None, object="woman", captions=("a brown woman",), colors=("brown",))).color == ""


def test_nothing_is_put_on_what_is_open():
    shut, opened = (part_of(Asset("x", None, object=f"{word}crate", captions=("a crate",))) for word in ("", "open "))
    assert shut.carries and not opened.carries


def test_the_same_seed_gives_the_same_scenes_and_a_shorter_call_the_first_of_them(assets, scenes):
    again = list(compose(list_assets(assets, "train"), 12, seed=3))
    other = list(compose(list_assets(assets, "train"), 12, seed=4))
    for one, two in zip(again, scenes):
        assert one.row("", "", "") == two.row("", "", "") and torch.equal(one.mesh[0], two.mesh[0])
    assert [s.row("", "", "")["parts"] for s in other] != [s.row("", "", "")["parts"] for s in again]
    rows = [json.dumps([s.row("", "", "")[k] for k in ("relation", "parts")]) for s in scenes]
    assert len(set(rows)) == len(rows), "no scene twice"


def test_held_out_pairs_are_never_composed(assets, scenes):
    keys = [pair_key(s.first.kind, s.relation, s.second.kind) for s in scenes]
    laid = next(k for k in keys if k[1] == "on")
    floor = next(k for k in keys if k[2] == "beside")
    refused = [pair_key(s.first.kind, s.relation, s.second.kind)
               for s in compose(list_assets(assets, "train"), 60, seed=3, held_out={laid, floor})]
    assert len(refused) == 60 and not {laid, floor} & set(refused)


def test_on_the_floor_a_pair_is_held_out_in_every_relation_and_order():
    held = {pair_key("crate", relation, "sack") for relation in RELATIONS if relation != "on"}
    assert held == {pair_key("sack", "left of", "crate")} and len(held) == 1
    assert pair_key("cat", "on", "box") not in {pair_key("box", "on", "cat"), pair_key("cat", "beside", "box")}


def test_the_shipped_list_is_forty_pairs_that_could_be_composed():
    asked, kinds = load_questions(QUESTIONS, "compositions"), {name.split()[-1] for name in SIZES}
    assert len(asked) == len({q.prompt for q in asked}) == len(held_out_compositions()) == 40
    for question in asked:
        assert len(question.kinds) == 2 and set(question.kinds) <= kinds
        assert question.object.split()[-1] == question.kinds[1] and question.color == ""
        assert all(kind in question.prompt or plural(kind) in question.prompt for kind in question.kinds)
    assert {q.relation for q in asked} <= set(RELATIONS)
    assert {q.kinds[1] for q in asked if q.relation == "on"} <= {name.split()[-1] for name in CARRIERS}


@pytest.mark.parametrize("split", ["train", "val"])
def test_the_command_keeps_splits_apart_and_pairs_out_of_training(assets, tmp_path, monkeypatch, capsys, split):
    monkeypatch.setattr(module, "held_out_compositions", lambda: {("pot", "on", "table"), ("pot", "on", "barrel")})
    main([str(assets), str(tmp_path / "scenes"), "--count", "20", "--seed", "3", "--split", split])
    rows = [json.loads(line) for line in (tmp_path / "scenes" / "index.jsonl").read_text().splitlines()]
    splits = {a.id: a.split for a in list_assets(assets)}
    assert {row["split"] for row in rows} == {splits[p] for row in rows for p in row["parts"]} == {split}
    held = [row for row in rows if row["pair"] in (["pot", "on", "table"], ["pot", "on", "barrel"])]
    assert bool(held) == (split == "val")
    assert "20 scenes" in capsys.readouterr().out


def test_a_folder_of_assets_is_not_overwritten_and_too_few_are_said_to_be(assets, tmp_path, capsys):
    with pytest.raises(SystemExit):
        main([str(assets), str(assets), "--count", "1"])
    assert "must be new or empty" in capsys.readouterr().err
    with pytest.raises(ValueError, match="2 assets, 2 of such kinds, and 0 scenes"):
        list(compose([a for a in list_assets(assets, "train") if a.object == "barrel"], 1))


def test_packed_scenes_are_read_and_rendered_like_assets(packed):
    folder, renders = packed
    found, rows = list_assets(folder), [json.loads(line) for line in (folder / "index.jsonl").read_text().splitlines()]
    assert len(found) == 12 and all(a.kinds == tuple(r["kinds"]) and a.colors == () for a, r in zip(found, rows))
    for asset, row in zip(found, rows):
        vertices, faces, colors = load_mesh(asset)
        assert float(vertices.norm(dim=1).max()) == pytest.approx(1, abs=1e-3) and len(faces) == row["n_faces"]
        assert len(row["captions"]) == 4 and len(row["parts"]) == (3 if row["relation"] == "and" else 2)
        views, _ = load_ring(renders / f"{asset.id}-0.safetensors")
        assert bool((views.masks.flatten(1).sum(1) > 100).all())


def test_captions_of_mirrored_scenes_say_the_other_side(packed):
    swap = {"left": "right", "right": "left"}
    sided = [r for r in list_rings(packed[1]) if r.kinds and {"left", "right"} & set(r.object.split())]
    assert sided
    for ring in sided:
        mirrored = ring.mirror()
        for ours, theirs in zip((*ring.captions, ring.object), (*mirrored.captions, mirrored.object)):
            assert theirs == " ".join(swap.get(word, word) for word in ours.split()) and theirs != ours
        assert mirrored.short_captions == mirrored.captions[:1], "no caption is made of a scene's object"


def test_scenes_change_nothing_for_single_objects(packed, tmp_path):
    rings = list_rings(packed[1])
    single = [r for r in rings if not r.kinds]
    assert len(rings) - len(single) == 12
    assert [r for r in list_rings(packed[1], min_kind_count=2) if not r.kinds] == single
    assert all(r.kinds for r in list_rings(packed[1], min_kind_count=3)), "two assets and scenes of them are not three"
    alone, beside = (LatentRings(found, torch.zeros(len(found), 4, 1, 1, 1), [20.0] * len(found), view_counts=(4,))
                     for found in (single, rings))
    weights = {r.key: float(w) for r, w in zip(beside.rings, beside.weights)}
    assert all(weights[r.key] == float(w) for r, w in zip(alone.rings, alone.weights))
    assert {r.ring.asset_id for r in small_rings(rings, tmp_path / "small")} == {r.asset_id for r in single}

    def embed(texts):
        return torch.eye(64)[:len(texts)]

    assert learn_vocabulary(read_index(packed[1]), embed, 1).kinds == {r.kind: 2 for r in single}
    assert all("scene" not in copy for copy in recolor_rings(packed[1])), "no scene is repainted"
