"""Prompts for several objects: taken apart, drawn one by one, and put together so that they stand as was asked."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from drawn_pipeline import COLORS, NOTHING, box_views, load_drawn_pipelines, welded

from coser.cameras import Cameras
from coser.data.placing import box_of
from coser.data.scene_words import SIZES, plural, singular
from coser.evaluate_table import draw_rings
from coser.pipeline import CoSERPipeline
from coser.questions import QUESTIONS, Question, load_questions
from coser.reconstruction import Mesh
from coser.request import AssetOptions, GenerationRequest
from coser.scene_meshes import arrange, in_unit_sphere, joined, put_together
from coser.scene_prompts import LifeSizes, SceneObject, ScenePlan, scene_plan
from coser.studio import Studio
from tests.solids import cube, sphere
from tests.tiny import tiny_pipeline

QUICK = AssetOptions(max_faces=500, texture_size=512)


def objects(prompt: str) -> list[tuple[str, int]]:
    return [(one.prompt, one.count) for one in scene_plan(prompt).objects]


@pytest.mark.parametrize("prompt, relation, expected", [
    ("a lantern on a brown barrel", "on", [("a lantern", 1), ("a brown barrel", 1)]),
    ("The cat sitting on top of the old chair.", "on", [("a cat", 1), ("an old chair", 1)]),
    ("a barrel with a lantern on it", "on", [("a lantern", 1), ("a barrel", 1)]),
    ("two candles on a table", "on", [("a candle", 2), ("a table", 1)]),
    ("a bottle of milk on a table", "on", [("a bottle of milk", 1), ("a table", 1)]),
    ("a dog standing next to a chair", "beside", [("a dog", 1), ("a chair", 1)]),
    ("a barrel to the left of a bench", "left of", [("a barrel", 1), ("a bench", 1)]),
    ("a barrel right of a bench", "right of", [("a barrel", 1), ("a bench", 1)]),
    ("an orange bush in front of a windmill", "in front of", [("an orange bush", 1), ("a windmill", 1)]),
    ("a house behind a tree", "behind", [("a house", 1), ("a tree", 1)]),
    ("two crates and a sack", "and", [("a crate", 2), ("a sack", 1)]),
    ("a knight with a sword and a shield beside a horse", "beside",
     [("a knight with a sword and a shield", 1), ("a horse", 1)]),
    ("a cat on a chair beside a table", "on beside", [("a cat", 1), ("a chair", 1), ("a table", 1)]),
    ("a chair, two tables, and a lamp", "and and", [("a chair", 1), ("a table", 2), ("a lamp", 1)]),
    ("a red and white mushroom and an axe", "and", [("a red and white mushroom", 1), ("an axe", 1)]),
    ("three grey boxes", "", [("a grey box", 3)]),
    ("two buses", "", [("a bus", 2)]),
    ("three green leaves", "", [("a green leaf", 3)]),
    ("an orange and a red apple", "and", [("an orange", 1), ("a red apple", 1)]),
])
def test_several_objects_are_taken_apart(prompt, relation, expected):
    assert " ".join(scene_plan(prompt).relations) == relation and objects(prompt) == expected


@pytest.mark.parametrize("prompt", [
    "a red barrel", "a red and white mushroom", "a knight with a sword and a shield", "a robot wearing a hat",
    "a house on stilts", "a candle on two tables", "a chair, red", "two", "barrel", "two of them", "a of gold on a table",
    "a cat, a dog, a cow, a pig and a hen", "a red and a blue barrel",
    "a man in front of", "five crates", "a pot with a tulip", "", "on a table",
])
def test_one_object_or_more_than_can_be_told_apart_is_none(prompt):
    assert scene_plan(prompt) is None


def test_every_composition_that_evaluation_asks_for_is_understood_and_no_single_object_is_taken_apart():
    for question in load_questions(QUESTIONS, "compositions"):
        plan = scene_plan(question.prompt)
        assert plan.relations == (question.relation,)
        assert [one.name.split()[-1] for one in plan.objects] == list(question.kinds)
    for name in ("vocabulary", "held_out_pairs"):
        assert not any(scene_plan(question.prompt) for question in load_questions(QUESTIONS, name))


def test_the_singular_undoes_the_plural():
    for name in (*SIZES, "woman", "loaf", "puppy", "glass", "bus stop", "fox", "wooden arch"):
        assert singular(plural(name)) == name


def test_sizes_are_those_of_the_longest_name_or_of_the_nearest():
    def embed(texts):  # "mop" and "candle" point one way, everything else another
        return torch.tensor([[1.0, 0.0] if text in ("mop", "candle") else [0.0, 1.0] for text in texts])

    assert LifeSizes().of("white floor lamp") == SIZES["floor lamp"] != LifeSizes().of("table lamp")
    assert LifeSizes().of("mop") == 1.0
    assert LifeSizes(embed).of("wet mop") == SIZES["candle"]


def mesh(solid) -> Mesh:
    vertices, faces, _ = solid
    return Mesh(vertices.numpy(), faces.numpy(), np.full(vertices.shape, 0.5, np.float32))


def boxes(prompt: str, *meshes: Mesh) -> list[torch.Tensor]:
    """The boxes [2,3] of all copies that an arrangement of these meshes places, by their order in the prompt."""
    plan = scene_plan(prompt)
    placed = arrange(plan, meshes, [LifeSizes().of(one.name) for one in plan.objects])
    assert len(placed) == sum(one.count for one in plan.objects)
    return [box_of(one.vertices(meshes)) for one in placed]


def longest(box: torch.Tensor) -> float:
    return float((box[1] - box[0]).max())


def test_what_is_on_something_rests_on_its_top_in_a_sensible_size():
    lantern, barrel = boxes("a lantern on a barrel", mesh(cube()), mesh(cube(half=0.3)))
    assert float(barrel[0, 1]) == pytest.approx(0) and longest(barrel) == pytest.approx(1)
    assert float(lantern[0, 1]) == pytest.approx(float(barrel[1, 1]), abs=1e-6)
    assert longest(lantern) == pytest.approx((SIZES["lantern"] / SIZES["barrel"]) ** 0.6)
    assert (lantern[0, [0, 2]] >= barrel[0, [0, 2]]).all() and (lantern[1, [0, 2]] <= barrel[1, [0, 2]]).all()


def test_what_finds_no_place_to_rest_is_let_down_over_the_middle():
    top, ball = boxes("a house on a lantern", mesh(cube()), mesh(sphere()))
    assert float(top[0, 1]) == pytest.approx(float(ball[1, 1]), abs=0.01)
    assert top.mean(0)[[0, 2]].tolist() == pytest.approx([0, 0], abs=1e-6)


@pytest.mark.parametrize("relation, axis, sign", [
    ("to the left of", 0, -1), ("to the right of", 0, 1), ("behind", 2, -1), ("in front of", 2, 1), ("beside", 0, -1),
    ("and", 0, -1)])
def test_neighbours_stand_on_the_floor_and_do_not_meet(relation, axis, sign):
    first, second = boxes(f"a chair {relation} a table", mesh(cube()), mesh(sphere()))
    assert first[0, 1] == pytest.approx(0) and second[0, 1] == pytest.approx(0)
    near, far = (first[0], second[1]) if sign > 0 else (second[0], first[1])
    assert 0.02 < float(near[axis] - far[axis]) < 0.1
    assert longest(first) < longest(second)


def test_copies_stand_in_a_row_and_the_other_one_beside_them():
    *crates, sack = boxes("three crates and a sack", mesh(cube()), mesh(cube()))
    edges = [x for box in (*crates, sack) for x in box[:, 0].tolist()]
    assert edges == sorted(edges) and len(crates) == 3
    alone = boxes("two crates", mesh(cube()))
    assert len(alone) == 2 and float(alone[0][1, 0]) < float(alone[1][0, 0])


def test_what_comes_later_relates_to_all_before_it():
    cat, chair, table = boxes("a cat on a chair to the left of a table", *[mesh(cube())] * 3)
    assert float(cat[0, 1]) == pytest.approx(float(chair[1, 1]))
    assert float(table[0, 0] - chair[1, 0]) == pytest.approx(0.05) and longest(table) == pytest.approx(1)
    assert longest(chair) == pytest.approx((SIZES["chair"] / SIZES["table"]) ** 0.6)
    assert longest(cat) / longest(chair) == pytest.approx((SIZES["cat"] / SIZES["chair"]) ** 0.6)


def test_a_scene_fills_the_unit_sphere_and_stays_closed():
    meshes = [mesh(sphere()), mesh(sphere(rows=12))]
    placed = in_unit_sphere(arrange(scene_plan("a cat and a dog"), meshes, [0.5, 0.9]), meshes)
    scene = joined(meshes, placed)
    assert np.linalg.norm(scene.vertices, axis=1).max() == pytest.approx(1, abs=1e-5)
    assert scene.is_watertight and scene.vertex_colors.shape == scene.vertices.shape
    assert joined([replace(m, vertex_colors=None) for m in meshes], placed).vertex_colors is None


def test_views_of_two_objects_become_views_and_a_surface_of_both():
    cameras = Cameras.orbit(6, 20.0)
    plan = scene_plan("a red box to the right of a blue box")
    surface = put_together(plan, [(box_views(one.prompt, cameras), cameras) for one in plan.objects], LifeSizes().of)
    front = surface.views.views[0]
    middle = front.shape[-1] // 2
    for part, color in ((front[..., :middle], "blue"), (front[..., middle:], "red")):
        seen = part.flatten(1)[:, part.sum(0).flatten() > 0.3].mean(1)
        assert int(seen.argmax()) == int(np.argmax(COLORS[color]))
    assert surface.mesh.is_watertight and np.linalg.norm(surface.mesh.vertices, axis=1).max() <= 1.01
    with pytest.raises(ValueError, match="2 objects, got 1"):
        put_together(plan, [(surface.views, cameras)], LifeSizes().of)


@pytest.fixture
def studio(monkeypatch):
    load_drawn_pipelines(monkeypatch)
    studio = Studio("tests/drawn", device="cpu")
    monkeypatch.setattr(studio, "life_sizes", LifeSizes())
    return studio


REQUEST = GenerationRequest("a red box on a blue box", num_views=6, num_inference_steps=3)


def test_a_run_draws_one_object_after_the_other_and_hands_over_both(studio, tmp_path):
    updates = list(studio.generate(REQUEST, tmp_path / "boxes.glb", options=QUICK))
    steps = [u for u in updates if u.stage == "denoising"]
    assert [u.step for u in steps] == [0, 1, 2, 3, 4, 5, 6] and {u.total for u in steps} == {6}
    assert [u.message for u in steps[3:5]] == ["Drawing a red box (1 of 2), step 3 of 3",
                                               "Drawing a blue box (2 of 2), step 1 of 3"]
    percents = [u.percent for u in updates]
    assert percents == sorted(percents)
    done = updates[-1]
    assert done.stage == "done" and done.message.endswith("objects drawn one by one")
    assert len(welded(done.glb).split(only_watertight=True)) == 2
    record = json.loads(done.run_file.read_text())
    assert record["scene"]["relations"] == ["on"] and "symmetries" not in record
    assert [one["prompt"] for one in record["scene"]["objects"]] == ["a red box", "a blue box"]


def test_in_one_go_is_one_drawing(studio, tmp_path):
    updates = list(studio.generate(replace(REQUEST, one_by_one=False), tmp_path / "box.glb", options=QUICK))
    assert max(u.total for u in updates) == 3 and "scene" not in json.loads(updates[-1].run_file.read_text())


@pytest.mark.parametrize("after", [2, 5, 7])
def test_a_scene_can_be_stopped_at_any_time(studio, tmp_path, after):
    asked = iter([False] * after)
    updates = list(studio.generate(REQUEST, tmp_path / "boxes.glb", lambda: not next(asked, None) is False, QUICK))
    assert updates[-1].stage == "stopped" and not list(tmp_path.iterdir())


def test_an_object_that_shows_nothing_is_an_error(studio, tmp_path, monkeypatch):
    monkeypatch.setattr("coser.studio.scene_plan", lambda prompt: ScenePlan(
        (SceneObject("a red box"), SceneObject(NOTHING)), ("on",)))
    monkeypatch.setattr(SceneObject, "name", "box")
    with pytest.raises(ValueError, match="views show nothing"):
        list(studio.generate(REQUEST, tmp_path / "boxes.glb", options=QUICK))
    assert not len(studio.lane)


def test_evaluation_draws_compositions_as_the_app_does_unless_told_otherwise(tmp_path, monkeypatch):
    pipeline = tiny_pipeline()
    asked = []

    def draw(prompt, *, num_views, **_):
        asked.append(prompt)
        cameras = Cameras.orbit(num_views, 20.0)
        return type("Drawn", (), {"views": box_views(prompt, cameras), "cameras": cameras})

    monkeypatch.setattr(CoSERPipeline, "__call__", lambda self, prompt, **arguments: draw(prompt, **arguments))
    question = [Question("a red box beside a blue box", "box beside box", kinds=("box", "box"), relation="beside")]
    draw_rings(pipeline, question, tmp_path / "apart", sizes=LifeSizes(), num_views=4)
    draw_rings(pipeline, question, tmp_path / "together", num_views=4)
    assert asked == ["a red box", "a blue box", "a red box beside a blue box"]
