"""Truths about requests, runs and files; the pipeline is drawn, everything else is the real thing."""

import json
import os
import threading
from contextlib import closing
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pygltflib
import pytest
import torch
from drawn_pipeline import NOTHING, DrawnPipeline, box_views, load_drawn_pipelines, mean_color, quarter_size, welded

from coser.cameras import Cameras
from coser.models.unet import MIXERS
from coser.own_views import PosedViews
from coser.reconstruction import stream_surface
from coser.request import AssetOptions, GenerationRequest
from coser.sessions import (current_run, file_name, remove_old_runs, run_folder, session_folder, set_current_run)
from coser.studio import TILE, Studio, _Run, checkpoint_folder, grid
from coser.symmetry import Symmetries
from coser.vocabulary import Verdict

REQUEST = GenerationRequest("a red box", num_views=6, num_inference_steps=3, mixers=MIXERS)
QUICK = AssetOptions(max_faces=500, texture_size=512)


@pytest.fixture
def studio(monkeypatch):
    load_drawn_pipelines(monkeypatch)
    return Studio("tests/drawn", device="cpu")


@pytest.mark.parametrize("name, value, allowed", [
    ("prompt", "  ", "1 to 300"), ("prompt", "x" * 10_000, "1 to 300"), ("prompt", 7, "text"),
    ("num_views", 3, "4 to 24"), ("num_views", 25, "4 to 24"), ("num_views", 6.5, "4 to 24"),
    ("num_views", "six", "4 to 24"), ("num_views", True, "4 to 24"), ("guidance_scale", 0.5, "1 to 12"),
    ("guidance_scale", None, "1 to 12"), ("num_inference_steps", 0, "1 to 50"), ("num_inference_steps", 51, "1 to 50"),
    ("elevation", float("nan"), "0 to 30"), ("elevation", -1, "0 to 30"), ("seed", -1, "0 to 2147483647"),
    ("seed", float("inf"), "0 to 2147483647"), ("seed", 2**31, "0 to 2147483647"),
    ("randomize_seed", 1, "true or false"), ("consistency", 1.1, "0 to 1"), ("consistency", "much", "0 to 1"),
    ("mixers", ("adjacent", "spoon"), "adjacent, trajectory, glance, rectification"), ("mixers", "glance", "adjacent"),
    ("one_by_one", "yes", "true or false"), ("guidance_rescale", -0.1, "0 to 1"),
    ("skip_guidance_scale", 6.5, "0 to 6"), ("redraw", 0.95, "0 to 0.9"), ("skip_guidance_scale", "far", "0 to 6"),
    ("symmetry", "sideways", "none, auto, mirror, back, both, quarter, round"), ("symmetry", None, "none, auto"),
])
def test_wrong_request_names_argument_and_what_is_allowed(name, value, allowed):
    with pytest.raises(ValueError, match=f"^{name} must .*{allowed}.*got") as error:
        GenerationRequest(**{"prompt": "a red box", name: value})
    assert len(str(error.value)) < 200


@pytest.mark.parametrize("name, value, allowed", [
    ("max_faces", 499, "500 to 200000"), ("max_faces", 1e9, "500 to 200000"), ("max_faces", "few", "500 to 200000"),
    ("texture_size", 1000, "512, 1024, 2048, 4096"), ("texture_size", None, "512, 1024, 2048, 4096"),
    ("coloring", "crayons", "texture, vertices"), ("origin", [], "feet, center"), ("longest_side", 0, "0.01 to 100"),
    ("longest_side", float("nan"), "0.01 to 100"), ("texture_size", True, "512, 1024, 2048, 4096"),
])
def test_wrong_asset_options_name_argument_and_what_is_allowed(name, value, allowed):
    with pytest.raises(ValueError, match=f"^{name} must .*{allowed}.*got"):
        AssetOptions(**{name: value})


def test_an_empty_seed_is_no_error_where_one_is_drawn():
    assert 0 <= GenerationRequest("a red box", seed=None, randomize_seed=True).with_drawn_seed().seed < 2**31
    with pytest.raises(ValueError, match="seed must be"):
        GenerationRequest("a red box", seed=None)


def test_whole_numbers_that_arrive_as_floats_are_taken():
    request = GenerationRequest(" a  red\nbox ", num_views=6.0, seed=3.0, elevation=10)
    assert (request.prompt, request.num_views, request.seed) == ("a red box", 6, 3)
    assert isinstance(request.num_views, int) and isinstance(request.seed, int)


def test_a_run_streams_every_step_then_the_mesh_then_is_done(studio, tmp_path):
    updates = list(studio.generate(REQUEST, tmp_path / "box.glb", options=QUICK))
    assert [u.stage for u in updates] == ["waiting", *["denoising"] * 4, *["reconstructing"] * 3, "done"]
    assert [u.step for u in updates] == [0, 0, 1, 2, 3, 3, 3, 3, 3]
    percents = [u.percent for u in updates]
    assert percents == sorted(percents) and percents[0] == 0 and percents[-2] < 100 and percents[-1] == 100
    assert all(u.seconds_left >= 0 for u in updates[2:])
    pictures = [np.asarray(u.picture) for u in updates[1:5]]
    assert all((a != b).any() for a, b in zip(pictures, pictures[1:]))
    json.dumps([u.status() for u in updates])


def test_the_time_left_counts_the_steps_that_fuse_views_as_longer(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr("coser.studio.time", SimpleNamespace(perf_counter=lambda: clock[0]))
    run, left, percents = _Run(6, 4.0, 0, fused={4, 5}, fuse_seconds=3.0), [], []
    clock[0] = 100.0  # waiting for its turn
    run.start()
    for index, seconds in enumerate((2, 1, 1, 1, 6, 6), 1):  # fusing turns out to take five seconds, not three
        clock[0] += seconds
        run.count(index, None)
        update = run.update("denoising", "")
        left.append(update.seconds_left), percents.append(update.percent)
    assert left == [20, 14, 13, 12, 10, 4] and run.fuse_seconds == 5
    assert percents == [9, 17, 23, 29, 52, 80]  # of 2 / 22, 3 / 17, 4 / 17, 5 / 17, 11 / 21 and 17 / 21 of the time
    hasty = _Run(1, 4.0, 0, fused={0}, fuse_seconds=3.0)  # a single step tells nothing about fusing
    hasty.count(1, None)
    assert hasty.fuse_seconds == 3


def test_fusing_is_expected_where_views_are_fused_alone(studio, monkeypatch, tmp_path):
    runs = []
    monkeypatch.setattr(studio, "_in_turn", lambda run, *_: runs.append(run) or iter(()))
    for options in ({"consistency": 1.0}, {"consistency": 0.0}, {"redraw": 0.25}):
        list(studio.generate(GenerationRequest("a box", **options), tmp_path / "box.glb"))
    assert [run.fused for run in runs] == [{18, 19}, set(), {18, 19, 23, 24}]
    assert [run.total for run in runs] == [20, 20, 25]


def test_done_means_a_watertight_coloured_glb_that_tells_how_it_was_made(studio, tmp_path):
    done = list(studio.generate(REQUEST, tmp_path / "box.glb", options=QUICK))[-1]
    mesh = welded(done.glb)
    assert mesh.is_watertight and 100 < len(mesh.faces) <= 500
    red, green, blue = mean_color(done.glb)
    assert red > 2 * max(green, blue)
    extras = pygltflib.GLTF2().load(str(done.glb)).asset.extras
    assert extras["prompt"] == "a red box" and extras["seed"] == 0 and extras["settings"]["num_views"] == 6
    record = json.loads(done.run_file.read_text())
    assert GenerationRequest(**record["settings"]) == REQUEST and AssetOptions(**record["asset"]) == QUICK
    assert AssetOptions(**extras["asset"]) == QUICK and record["mesh"]["texture"] == 512
    assert record["mesh"]["faces"] == len(mesh.faces) and len(record["seconds"]["steps"]) == 3
    assert sorted(p.name for p in tmp_path.iterdir()) == ["box.glb", "box.json", "box.png"]


def test_a_drawn_seed_is_reported_and_draws_the_same_again(studio, tmp_path):
    def pictures(request):
        with closing(studio.generate(request, tmp_path / "box.glb")) as run:
            waiting, noise, first_step = (next(run) for _ in range(3))
        return first_step.seed, np.asarray(first_step.picture)

    seed, first = pictures(replace(REQUEST, randomize_seed=True))
    same_seed, again = pictures(replace(REQUEST, seed=seed))
    other_seed, other = pictures(replace(REQUEST, seed=seed ^ 1))
    assert seed == same_seed and (first == again).all() and (first != other).any()


def test_a_stopped_run_keeps_its_last_grid_writes_nothing_and_frees_the_lane(studio, tmp_path):
    stop = threading.Event()
    updates = []
    for update in studio.generate(REQUEST, tmp_path / "box.glb", stop.is_set):
        updates.append(update)
        if update.step == 2:
            stop.set()
    last = updates[-1]
    assert last.stage == "stopped" and last.step == 2 and "step 2 of 3" in last.message
    assert last.picture is updates[-2].picture and last.glb is None and not list(tmp_path.iterdir())
    assert not len(studio.lane)


def test_a_run_whose_reader_goes_away_frees_the_lane(studio, tmp_path):
    run = studio.generate(REQUEST, tmp_path / "box.glb")
    next(run), next(run), next(run)
    run.close()
    assert studio.pipeline.open == 0 and not len(studio.lane)


def test_a_waiting_run_can_be_stopped(studio, tmp_path):
    first = studio.generate(REQUEST, tmp_path / "first.glb")
    next(first), next(first)
    waiting = list(studio.generate(REQUEST, tmp_path / "second.glb", lambda: True))
    assert [u.stage for u in waiting] == ["waiting", "stopped"] and "1 other run" in waiting[0].message
    first.close()
    assert not len(studio.lane)


def test_runs_that_wait_get_their_turns_in_the_order_in_which_they_came(studio, tmp_path):
    first, second, third = (studio.generate(REQUEST, tmp_path / f"{name}.glb") for name in ("a", "b", "c"))
    assert [next(run).message for run in (first, second, third)] == [
        "Starting", "Waiting for 1 other run", "Waiting for 2 other runs"]
    second.close()  # one that leaves the line lets those behind it move up
    assert next(third).message == "Waiting for 1 other run"
    first.close()
    assert [next(third).message for _ in range(2)] == ["Starting", "Starting from noise"]
    third.close()


def test_runs_at_the_same_time_take_turns_and_keep_their_files_apart(studio, tmp_path):
    done = {}

    def visit(color):
        request = replace(REQUEST, prompt=f"a {color} box")
        done[color] = list(studio.generate(request, tmp_path / color / "box.glb", options=QUICK))[-1]

    visitors = [threading.Thread(target=visit, args=(color,)) for color in ("red", "blue")]
    [v.start() for v in visitors], [v.join() for v in visitors]
    assert studio.pipeline.most_open == 1
    for channel, color in ((0, "red"), (2, "blue")):
        assert mean_color(done[color].glb).argmax() == channel


def test_views_that_hold_nothing_end_in_a_clear_error_and_a_free_lane(studio, tmp_path):
    with pytest.raises(ValueError):
        list(studio.generate(replace(REQUEST, prompt=NOTHING), tmp_path / "box.glb"))
    assert not len(studio.lane)


class OneWord:
    """A vocabulary that knows boxes."""

    def nearest(self, prompt: str) -> Verdict:
        return Verdict("box" in prompt, 0.5, ("box", "crate"))


def test_a_prompt_outside_the_vocabulary_is_drawn_with_a_note_on_every_update(studio, tmp_path):
    studio.vocabulary = OneWord()
    waiting, *drawn = studio.generate(replace(REQUEST, prompt="a blue violin"), tmp_path / "violin.glb",
                                     options=QUICK)
    assert waiting.note == "" and drawn[-1].stage == "done" and drawn[-1].glb.is_file()
    assert {update.note for update in drawn} == {update.status()["note"] for update in drawn} == {
        Verdict(False, 0.5, ("box", "crate")).note} and "nearest: box, crate" in drawn[0].note


def test_known_words_and_checkpoints_without_a_vocabulary_bring_no_note(studio, tmp_path):
    assert studio.vocabulary is None
    assert {update.note for update in studio.generate(REQUEST, tmp_path / "box.glb", options=QUICK)} == {
        ""}
    studio.vocabulary = OneWord()
    assert {update.note for update in studio.generate(REQUEST, tmp_path / "box.glb", options=QUICK)} == {
        ""}


def test_a_mixer_that_is_left_out_is_switched_off(studio, tmp_path):
    for asked, passed in ((None, MIXERS), (["temporal", "rectification", "adjacent"], ("adjacent", "rectification")),
                          ((), ())):
        with closing(studio.generate(replace(REQUEST, mixers=asked), tmp_path / "box.glb")) as run:
            next(run), next(run), next(run)
        assert studio.pipeline.mixers == passed


def test_what_is_drawn_anew_is_counted(studio, tmp_path):
    request = replace(REQUEST, num_inference_steps=8, redraw=0.5)
    updates = list(studio.generate(request, tmp_path / "box.glb", options=QUICK))
    assert studio.pipeline.redraw == 0.5
    assert [u.step for u in updates if u.stage == "denoising"] == list(range(13)) and updates[-1].total == 12
    assert json.loads(updates[-1].run_file.read_text())["settings"]["redraw"] == 0.5


@pytest.mark.parametrize("name", ["guidance_rescale", "skip_guidance_scale"])
def test_views_are_guided_as_asked(studio, tmp_path, name):
    for asked in (0.25, 1.0):
        with closing(studio.generate(replace(REQUEST, **{name: asked}), tmp_path / "box.glb")) as run:
            next(run), next(run), next(run)
        assert getattr(studio.pipeline, name) == asked


@pytest.mark.parametrize("asked, passed, said", [
    ("auto", ("back",), "seed 0, front and back alike"), ("none", (), "seed 0"),
    ("both", ("mirror", "back"), "seed 0, left and right, front and back alike"),
    ("quarter", ("mirror", "quarter"), "seed 0, four sides alike"), ("round", ("mirror", "round"), "all sides alike")])
def test_symmetry_is_what_was_asked_for_or_what_the_kind_has(studio, tmp_path, asked, passed, said):
    studio.symmetries = Symmetries({"box": ("back",)})
    done = list(studio.generate(replace(REQUEST, symmetry=asked), tmp_path / "box.glb", options=QUICK))[-1]
    assert studio.pipeline.symmetry == passed
    record = json.loads(done.run_file.read_text())
    assert (record["settings"]["symmetry"], record["symmetries"]) == (asked, list(passed))
    assert done.message.endswith(said)


def test_the_run_file_tells_which_modules_worked(studio, tmp_path):
    done = list(studio.generate(replace(REQUEST, mixers=None), tmp_path / "box.glb", options=QUICK))[-1]
    assert json.loads(done.run_file.read_text())["settings"]["mixers"] == list(MIXERS)


def test_another_budget_and_coloring_are_made_without_drawing_again(studio, tmp_path, monkeypatch):
    done = list(studio.generate(REQUEST, tmp_path / "box.glb", options=QUICK))[-1]
    monkeypatch.delattr(DrawnPipeline, "stream")
    (tmp_path / "again").mkdir()
    other = AssetOptions(max_faces=2000, coloring="vertices", longest_side=2.5)
    updates = list(studio.refine(done.asset, done.run_file, tmp_path / "again" / "box.glb", options=other))
    assert [u.stage for u in updates] == ["waiting", "reconstructing", "done"]
    mesh, first = welded(updates[-1].glb), welded(done.glb)
    assert len(first.faces) <= 500 < len(mesh.faces) <= 2000 and mesh.is_watertight
    assert first.extents.max() == pytest.approx(1.0, abs=1e-4) and mesh.extents.max() == pytest.approx(2.5, abs=1e-4)
    record = json.loads(updates[-1].run_file.read_text())
    assert GenerationRequest(**record["settings"]) == REQUEST and AssetOptions(**record["asset"]) == other


def own_views() -> PosedViews:
    cameras = Cameras.orbit(6)
    return PosedViews(box_views("a blue box", cameras), cameras, ("Taken to be a ring.",), torch.eye(4), ())


def test_views_of_ones_own_become_an_asset_with_a_note(studio, tmp_path):
    updates = list(studio.rebuild(own_views(), "my box", tmp_path / "mine.glb", options=QUICK))
    assert [u.stage for u in updates] == ["waiting", *["reconstructing"] * 3, "done"]
    assert updates[-1].note == "Taken to be a ring." and updates[-1].seed is None
    assert welded(updates[-1].glb).is_watertight and mean_color(updates[-1].glb).argmax() == 2
    record = json.loads(updates[-1].run_file.read_text())
    assert record["title"] == "my box" and record["own_views"]["count"] == 6 and "settings" not in record
    percents = [u.percent for u in updates]
    assert percents == sorted(percents) and percents[0] == 0 and percents[-1] == 100


def test_what_was_drawn_is_smoothed_and_pictures_are_not(studio, tmp_path, monkeypatch):
    asked = []

    def surface(*args, drawn):
        asked.append(drawn)
        return stream_surface(*args, drawn=drawn)

    monkeypatch.setattr("coser.studio.stream_surface", surface)
    list(studio.generate(REQUEST, tmp_path / "a.glb", options=QUICK))
    list(studio.rebuild(own_views(), "mine", tmp_path / "b.glb", options=QUICK))
    list(studio.rebuild(replace(own_views(), drawn=True), "back", tmp_path / "c.glb", options=QUICK))
    assert asked == [True, False, True]


def test_building_from_ones_own_views_can_be_stopped_and_writes_nothing(studio, tmp_path):
    updates = []
    for update in studio.rebuild(own_views(), "my box", tmp_path / "mine.glb",
                                 lambda: any(u.stage == "reconstructing" for u in updates)):
        updates.append(update)
    assert updates[-1].stage == "stopped" and not list(tmp_path.iterdir()) and not len(studio.lane)


def test_a_fit_of_colours_alone_can_be_stopped_between_its_steps(studio, tmp_path):
    posed = own_views()
    posed = replace(posed, views=replace(posed.views, depths=torch.zeros_like(posed.views.depths)))
    updates = []
    for update in studio.rebuild(posed, "my box", tmp_path / "mine.glb",
                                 lambda: any("step 3 of" in u.message for u in updates)):
        updates.append(update)
    assert updates[-1].stage == "stopped" and "Fitting the surface, step 3 of" in updates[-2].message
    assert not list(tmp_path.iterdir()) and not len(studio.lane)


def test_previews_and_results_cover_the_same_picture():
    full = box_views("a red box", Cameras.orbit(6))
    small = quarter_size(full)
    assert grid(full).width >= 3 * TILE
    assert grid(full).size == grid(small).size


def test_first_log_line_gives_device_dtype_scan_and_checkpoint_with_reasons(monkeypatch, caplog):
    load_drawn_pipelines(monkeypatch)
    with caplog.at_level("INFO", logger="coser"):
        Studio("tests/drawn", device="cpu")
    line = caplog.records[0].getMessage()
    for said in ("device cpu (as asked)", "dtype ", "scan ", "checkpoint tests/drawn (as asked)"):
        assert said in line


def test_unusable_checkpoints_and_devices_are_named():
    with pytest.raises(ValueError, match="checkpoint must be"):
        Studio("no/such/folder")
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="device must be"):
            Studio("tests/drawn", device="cuda")


def test_a_hub_id_is_downloaded_and_what_lies_here_is_none(monkeypatch, tmp_path):
    asked = []
    (tmp_path / "hub").mkdir()
    (tmp_path / "hub" / "model_index.json").touch()
    monkeypatch.setattr("coser.studio.snapshot_download", lambda name: asked.append(name) or str(tmp_path / "hub"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    assert checkpoint_folder("someone/coser") == tmp_path / "hub" == checkpoint_folder("hub").resolve()
    assert asked == ["someone/coser"]
    for wrong in ("runs/mistyped", "runs", "nowhere", "no/such/folder"):
        with pytest.raises(ValueError, match=f"checkpoint must be a folder .* got {wrong}"):
            checkpoint_folder(wrong)
    assert len(asked) == 1, "a folder that is missing here is not looked for elsewhere"


def test_modules_that_the_checkpoint_lacks_do_not_switch_off_those_that_it_has(studio):
    assert set(studio.mixers) == set(MIXERS)
    assert studio.mixers_for(replace(REQUEST, mixers=MIXERS[:1])) == MIXERS[:1]
    assert studio.mixers_for(replace(REQUEST, mixers=())) == () and studio.mixers_for(replace(REQUEST, mixers=None))
    with pytest.raises(ValueError, match="mixers must be .*adjacent.*got dense"):
        studio.mixers_for(replace(REQUEST, mixers=("dense",)))


def test_session_names_cannot_leave_their_root(tmp_path):
    for name in ("../../etc", "/etc", "", "a" * 10_000):
        assert session_folder(tmp_path, name).parent == tmp_path


def test_the_current_run_is_remembered_until_its_files_are_gone(tmp_path):
    session = session_folder(tmp_path, "visitor")
    assert current_run(session) is None
    run = run_folder(session)
    set_current_run(session, run)
    assert current_run(session) == run
    run.rmdir()
    assert current_run(session) is None
    set_current_run(session, None)
    set_current_run(session, None)
    assert current_run(session) is None


def test_only_old_runs_are_removed(tmp_path):
    old, new = (run_folder(session_folder(tmp_path, "visitor")) for _ in range(2))
    os.utime(old, (0, 0))
    remove_old_runs(tmp_path)
    assert new.is_dir() and not old.exists()


def test_runs_that_are_asked_for_stay_and_cleaning_up_twice_at_once_is_no_error(tmp_path, monkeypatch):
    session = session_folder(tmp_path, "visitor")
    run, gone = run_folder(session), run_folder(session)
    set_current_run(session, run)
    os.utime(run, (0, 0)), os.utime(gone, (0, 0))
    assert current_run(session) == run
    remove_old_runs(tmp_path)
    assert run.is_dir() and not gone.exists()
    monkeypatch.setattr("pathlib.Path.glob", lambda *args: [gone, run])  # gone since it was listed
    remove_old_runs(tmp_path)
    assert run.is_dir()


def test_file_names_are_readable_and_safe():
    assert file_name("A Red, rusty barrel!", 7) == "a-red-rusty-barrel-7.glb"
    assert file_name("../../赤い", 1) == "asset-1.glb" and file_name("My photos") == "my-photos.glb"
