"""The table of quality: prompts drawn from a vocabulary, rings scored beside their ceiling and floor, and going on."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from coser import evaluate_table
from coser.cameras import Cameras
from coser.data.dataset import Ring, list_rings
from coser.data.render import save_ring
from coser.evaluate_prompts import LABEL_HEIGHT, SHEET_TILE, SHEET_VIEWS
from coser.evaluate_table import (Column, claim, draw_rings, draw_sheet, geometry_figures, judge_figures,
                                  reference_embeddings, score_column, spread)
from coser.judge import ViewJudge
from coser.metrics import silhouette_iou
from coser.quality_table import markdown, summarise
from coser.questions import QUESTIONS, Question, draw_questions, is_name_of, load_questions, slug
from tests.drawn_pipeline import NOTHING, box_views
from tests.tiny import tiny_pipeline


def ring(asset_id, kind, color):
    return Ring(Path(f"{asset_id}-0.safetensors"), asset_id, kind, (f"a {color} {kind}",), (color,))


def always(kind: str, color: str, kinds: tuple[str, str] = ("box", "ball")) -> ViewJudge:
    """A judge that gives the same answer to everything."""
    colors = "red", "blue"
    judge = ViewJudge(kinds=kinds, colors=colors, channels=(16, 16, 16), blocks=(1, 1, 1), embedding_dim=4,
                      fronted_kinds=("ball",), janus_floor=0.1, janus_ratio=0.5).eval()
    axes = torch.eye(judge.config.text_dim)[:4]  # one for each word
    with torch.no_grad():
        judge.kind_states.copy_(axes[:2])
        judge.color_states.copy_(axes[2:])
        judge.text_projection.weight.copy_(axes)
        judge.text_projection.bias.zero_()
        judge.to_embedding.weight.zero_()
        judge.to_embedding.bias.copy_(torch.tensor([float(w in (kind, color)) for w in kinds + colors]))
        judge.to_sectors[-1].weight.zero_()
        judge.to_sectors[-1].bias.zero_()
    return judge


@pytest.fixture(scope="module")
def box():
    cameras = Cameras.orbit(6, 20.0)
    return box_views("a red box", cameras), cameras


@pytest.fixture(scope="module")
def folder(tmp_path_factory, box):
    """Rings of a red and a blue box and one that shows nothing."""
    path = tmp_path_factory.mktemp("rings")
    rows = []
    for prompt, color in (("a red box", "red"), ("a blue box", "blue"), (NOTHING, "red")):
        save_ring(path / f"{slug(prompt)}-0.safetensors", box_views(prompt, box[1]), box[1])
        rows.append({"id": slug(prompt), "object": "box", "captions": [prompt], "colors": [color], "seconds": 1.0})
    (path / "index.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_questions_come_from_the_vocabulary():
    rings = [ring(f"c{i}", "oak chair", color) for i, color in enumerate(("red", "red", "blue"))]
    rings += [ring(f"a{i}", "rocks", "grey") for i in range(5)] + [ring("t", "table", "brown")]
    rings += [ring(f"c0~{color}", "chair", color) for color in ("pink", "teal", "green")]
    asked = draw_questions(rings, 2)
    assert {(q.prompt, q.object, q.color) for q in asked} == {("a red chair", "chair", "red"),
                                                             ("a blue chair", "chair", "blue")}
    assert draw_questions(rings, 2) == asked
    with pytest.raises(ValueError, match="at most 2, .* got 3"):
        draw_questions(rings, 3)


def test_the_shipped_questions_are_whole():
    vocabulary, held_out = (load_questions(QUESTIONS, name) for name in ("vocabulary", "held_out_pairs"))
    assert len({q.prompt for q in vocabulary}) == 100 and len({q.prompt for q in held_out}) == 40
    for question in vocabulary + held_out:
        assert question.prompt.split() == [question.prompt.split()[0], question.color, question.object]
    assert not {(q.object, q.color) for q in vocabulary} & {(q.object, q.color) for q in held_out}
    with pytest.raises(ValueError, match="vocabulary, held_out_pairs, compositions, got 'nonsense'"):
        load_questions(QUESTIONS, "nonsense")


def test_drawing_goes_on_where_it_stopped(tmp_path):
    pipeline = tiny_pipeline()
    asked = [Question("a red box", "box", "red"), Question("a blue box", "box", "blue")]
    first = draw_rings(pipeline, asked[:1], tmp_path / "rings", num_views=4, num_inference_steps=1)
    written = first[0].path.read_bytes()
    both = draw_rings(pipeline, asked, tmp_path / "rings", num_views=4, num_inference_steps=1)
    assert [r.captions[0] for r in both] == ["a blue box", "a red box"] and first[0].path.read_bytes() == written
    index = evaluate_table.read_index(tmp_path / "rings")
    assert index["a_red_box"]["stages"]["denoising steps"] > 0 and index["a_red_box"]["seconds"] > 0


def test_true_renders_agree_better_than_shuffled_ones(box):
    views, cameras = box
    true, seen = geometry_figures(views, cameras, drawn=False)
    shuffled, _ = geometry_figures(evaluate_table.agreement.shuffled_ring(views), cameras, drawn=False)
    for figure in ("cross_psnr", "hull_iou", "own_iou", "held_out_psnr", "depth_agreement"):
        assert true[figure] > shuffled[figure], figure
    assert true["watertight"] == 1
    assert float(silhouette_iou(seen.masks, views.masks).min()) > 0.95


def test_things_have_several_names():
    for word, kind in (("sofa", "sofa"), ("couch", "sofa"), ("sofa", "couch"), ("coins", "coin"), ("coin", "coins"),
                       ("building", "cottage"), ("revolver", "gun")):
        assert is_name_of(word, kind), (word, kind)
    for word, kind in (("chest", "box"), ("tavern", "church"), ("revolver", "rifle"), ("coin", "ring")):
        assert not is_name_of(word, kind), (word, kind)


def test_an_object_by_another_of_its_names_is_named_but_not_right(box):
    views, cameras = box
    reference = torch.eye(4)[:1]
    asked, names = ring("x", "sofa", "red"), ("couch", "sofa")
    figures = judge_figures(always("couch", "red", names), reference, asked, views, cameras)
    assert (figures["object_right"], figures["object_named"]) == (0, 1)
    assert (figures["both_right"], figures["both_named"]) == (0, 1)
    figures = judge_figures(always("couch", "blue", names), reference, asked, views, cameras)
    assert (figures["object_named"], figures["both_named"]) == (1, 0)


def test_verdicts_are_the_judges(box):
    views, cameras = box
    reference = torch.nn.functional.normalize(torch.randn(3, 4, generator=torch.Generator().manual_seed(0)), dim=-1)
    asked = ring("x", "box", "red")
    assert judge_figures(always("box", "red"), reference, asked, views, cameras)["both_right"] == 1
    for kind, color, right in (("box", "blue", (1, 0)), ("ball", "red", (0, 1))):
        figures = judge_figures(always(kind, color), reference, asked, views, cameras)
        assert (figures["object_right"], figures["color_right"]) == right and figures["both_right"] == 0
        assert "janus" not in figures, "a box has no front"
    sure, wrong = (judge_figures(always(kind, "red"), reference, asked, views, cameras)["object_log_likelihood"]
                   for kind in ("box", "ball"))
    assert sure > np.log(0.5) > wrong
    every_side_alike = judge_figures(always("ball", "red"), reference, ring("x", "ball", "red"), views, cameras)
    assert every_side_alike["janus"] == 1
    unknown = judge_figures(always("ball", "red"), reference, ring("x", "violin", "gold"), views, cameras)
    assert not {"object_right", "color_right", "both_right", "janus"} & set(unknown)


def test_a_composition_is_right_when_all_its_kinds_are_among_the_first_guesses(box):
    views, cameras = box
    reference = torch.eye(4)[:1]
    scene = Ring(Path("s-0.safetensors"), "s", "box on ball", ("a box on a ball",), (), kinds=("box", "ball"))
    figures = judge_figures(always("ball", "red"), reference, scene, views, cameras)
    assert figures["kinds_in_2"] == figures["kinds_in_5"] == 1, "there are but two kinds"
    assert not {"object_right", "object_in_5", "color_right", "janus"} & set(figures), "these are of single objects"
    six = ViewJudge(kinds=("a", "b", "c", "d", "e", "box"), colors=("red",), channels=(16, 16, 16), blocks=(1, 1, 1),
                    embedding_dim=6).eval()
    with torch.no_grad():
        six.kind_states.copy_(torch.eye(six.config.text_dim)[:6])
        six.text_projection.weight.copy_(torch.eye(six.config.text_dim)[:6])
        six.text_projection.bias.zero_()
        six.to_embedding.weight.zero_()
        six.to_embedding.bias.copy_(torch.arange(6.0, 0, -1))  # its guesses are a, b, c, d, e, box
    for kinds, expected in ((("a", "b"), (1, 1)), (("c", "a"), (0, 1)), (("a", "box"), (0, 0))):
        found = judge_figures(six, torch.eye(6)[:1], dataclasses.replace(scene, kinds=kinds), views, cameras)
        assert (found["kinds_in_2"], found["kinds_in_5"]) == expected
    unknown = judge_figures(six, torch.eye(6)[:1], dataclasses.replace(scene, kinds=("a", "violin")), views, cameras)
    assert not {"kinds_in_2", "kinds_in_5"} & set(unknown), "a kind that it was not taught"


def test_compositions_are_drawn_with_their_kinds_and_without_a_colour(tmp_path):
    asked = [Question("a box on a ball", "box on ball", kinds=("box", "ball"))]
    drawn, = draw_rings(tiny_pipeline(), asked, tmp_path / "rings", num_views=4, num_inference_steps=1)
    assert drawn.kinds == ("box", "ball") and drawn.colors == () and drawn.captions == ("a box on a ball",)


def test_what_may_have_been_memorised_is_embedded_once(folder, tmp_path, monkeypatch):
    judge, rings = always("box", "red"), list_rings(folder)
    copies = [Ring(r.path, f"{r.asset_id}~pink", r.object, r.captions, r.colors) for r in rings]
    found = reference_embeddings(judge, rings + copies, tmp_path)
    assert found.shape == (len(rings), 4), "repainted copies are no assets of their own"
    monkeypatch.setattr(evaluate_table, "load_ring", None)
    assert torch.equal(reference_embeddings(judge, rings, tmp_path), found)
    assert judge_figures(judge, found, rings[0], *box_and_cameras())["nearest"] == pytest.approx(0, abs=1e-6)


def box_and_cameras():
    cameras = Cameras.orbit(4, 20.0)
    return box_views("a red box", cameras), cameras


def test_columns_resume_and_name_what_shows_nothing(folder, tmp_path, monkeypatch):
    rings = list_rings(folder)
    column, file = Column("generated", rings), tmp_path / "scores.jsonl"
    asked = []

    def judge_of(ring, views, cameras):
        asked.append(ring.asset_id)
        return {"object_right": float(ring.asset_id == "a_red_box" and asked.count("a_red_box") == 1), "nearest": 0.5}

    scores = score_column(column, judge_of, 6, file)
    assert [row["failed"] for row in scores] == [0.0, 0.0, 1.0] and "why" in scores[2]
    assert score_column(column, judge_of, 6, file) == scores 
    assert asked == [rings[0].asset_id] * 2 + [rings[1].asset_id] * 2 + [rings[2].asset_id], "views, then their mesh"
    assert [(row["object_right"], row["mesh_object_right"]) for row in scores] == [(0, 0), (1, 0), (0, 0)]
    assert [row["watertight"] for row in scores] == [1, 1, 0], "a mesh that there is not is not watertight"
    assert not {"mesh_nearest", "mesh_failed"} & set(scores[0]), "words alone are asked of a mesh"
    summary = summarise({"generated": scores, "ceiling": scores[:1]})
    generated = summary["generated"]
    assert generated["object_right"] == pytest.approx(1 / 3) and generated["cross_psnr/count"] == 2
    table = markdown(summary, {"decoding": 0.25})
    assert "| object right, first guess of the judge | 33.3% | 0.0% |" in table and "| decoding | 0.25 |" in table
    assert "Janus" not in table, "what was not measured has no line"


def test_columns_have_as_many_views_as_asked_or_none(folder, tmp_path):
    column = Column("true renders", list_rings(folder))
    with pytest.raises(ValueError, match="num_views must divide the 6 views of a_.*got 4"):
        score_column(column, lambda *_: {}, 4, tmp_path / "scores.jsonl")


def test_a_judge_sees_all_of_a_column_and_more_is_asked_of_some(folder, tmp_path):
    rings, asked = list_rings(folder)[:2], []

    def judge_of(ring, views, cameras):
        asked.append(ring.asset_id)
        return {"object_right": 1.0}

    few = Column("true renders", rings, measured=frozenset([rings[1].asset_id]))
    scores = score_column(few, judge_of, 6, tmp_path / "scores.jsonl")
    assert [set(row) & {"failed", "cross_psnr", "mesh_object_right"} for row in scores] == [
        set(), {"failed", "cross_psnr", "mesh_object_right"}]
    assert asked == [rings[0].asset_id] + 2 * [rings[1].asset_id] and all(row["object_right"] == 1 for row in scores)
    more = score_column(Column("true renders", rings), judge_of, 6, tmp_path / "scores.jsonl")
    assert "cross_psnr" in more[0] and more[1] == scores[1], "what was not asked before is asked now"
    assert score_column(few, judge_of, 6, tmp_path / "scores.jsonl") == more and len(asked) == 5


def test_a_folder_is_of_one_way_of_drawing(tmp_path):
    claim(tmp_path / "out", {"weights": "abc", "seed": "0"})
    claim(tmp_path / "out", {"weights": "abc", "seed": "0"})
    with pytest.raises(ValueError, match="out must be a folder of its own .*drawn with seed 0$"):
        claim(tmp_path / "out", {"weights": "abc", "seed": "1"})


def test_a_figure_that_half_of_the_views_do_not_allow_is_left_out_alone(box, monkeypatch):
    def nothing(*_):
        raise ValueError("views show no surface")

    monkeypatch.setattr(evaluate_table.agreement, "cross_render", nothing)
    figures, _ = geometry_figures(*box, drawn=False)
    assert "cross_psnr" not in figures and figures["watertight"] == 1 and figures["hull_iou"] > 0.8


def test_the_sheet_has_a_row_for_every_ring_and_no_mesh_of_nothing(folder, tmp_path):
    draw_sheet(list_rings(folder), tmp_path / "sheets" / "sheet.webp")
    sheet = np.asarray(Image.open(tmp_path / "sheets" / "sheet.webp").convert("RGB")).astype(int)
    tiles = SHEET_VIEWS + 2
    width, height = tiles * SHEET_TILE, SHEET_TILE + LABEL_HEIGHT
    assert sheet.shape == (2 * height, 2 * width + 16, 3)
    places = [(0, 0), (0, width + 16), (height, 0)]
    for ring, (y, x) in zip(list_rings(folder), places):
        mesh = sheet[y + LABEL_HEIGHT:y + height, x + SHEET_VIEWS * SHEET_TILE:x + width]
        assert (mesh.min() > 240) == (ring.captions[0] == NOTHING)


def test_spread_takes_the_whole_length():
    assert spread(list(range(10)), 4) == [0, 2, 5, 7] and spread([1, 2], None) == [1, 2] and spread([1, 2], 5) == [1, 2]
