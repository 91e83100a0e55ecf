"""Truths about the app's API and its wiring, over HTTP; only the pipeline is not the real thing."""

import os
import re
import tempfile
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import httpx
import numpy as np
import pytest
import torch
import trimesh
from captures import REFUSED, refused
from drawn_pipeline import NOTHING, DrawnPipeline, box_views, fit_in_few_steps, load_drawn_pipelines, mean_color, welded
from gradio import SelectData
from gradio.exceptions import Error
from gradio_client import Client, handle_file
from gradio_client.exceptions import AppError
from PIL import Image

import app
import desk as desks
from coser.cameras import Cameras
from coser.examples import load_examples
from coser.finishing import finish_asset, save_finished
from coser.models.block import MIXERS
from coser.reconstruction import find_surface, save_glb
from coser.request import MODULES, AssetOptions, GenerationRequest
from coser.sessions import run_folder, set_current_run
from coser.stage import SPLATS_SIDE, viewing_distance
from coser.studio import Studio

ASSET = {"max_faces": 500, "texture_size": 512}
QUICK = {"num_views": 6, "num_inference_steps": 3, "randomize_seed": False, "api_name": "/generate"} | ASSET


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    temporary = tmp_path_factory.mktemp("temporary")
    with pytest.MonkeyPatch.context() as patch:
        load_drawn_pipelines(patch)
        patch.setattr(tempfile, "tempdir", str(temporary))  # gradio's client leaves folders behind
        demo = app.build_app(Studio("tests/drawn", device="cpu"), temporary / "sessions")
        yield app.launch(demo, prevent_thread_lock=True, quiet=True)
        demo.close()


@pytest.fixture(scope="module")
def visitor(address):
    """Makes clients, a session each."""
    return lambda: Client(address, verbose=False)


@pytest.fixture(scope="module")
def client(visitor):
    return visitor()


def test_the_api_streams_grids_and_ends_with_a_glb(client):
    job = client.submit("a red box", **QUICK)
    picture, status, seed, glb = job.result(timeout=60)
    grids = {Path(output[0]).read_bytes() for output in job.outputs() if output[0]}
    assert len(grids) == 4 and Image.open(picture).width > 700
    assert status["stage"] == "done" and status["percent"] == 100 and seed == 0
    assert Path(glb).name == "a-red-box-0.glb" and welded(glb).is_watertight


def test_a_prompt_alone_is_enough_for_the_api(client):
    parameters = client.view_api(return_format="dict")["named_endpoints"]["/generate"]["parameters"]
    assert [p["parameter_name"] for p in parameters] == [
        "prompt", "num_views", "guidance_scale", "num_inference_steps", "elevation", "seed", "randomize_seed",
        "consistency", "mixers", "symmetry", "one_by_one", "guidance_rescale", "skip_guidance_scale", "redraw", *ASSET,
        "coloring", "origin", "longest_side"]
    assert all(p["parameter_has_default"] for p in parameters[1:])


def test_gpu_time_is_asked_for_all_drawings_and_never_too_much():
    assert app.gpu_seconds("a red box", 12, 4.0, 50) == 28
    assert app.gpu_seconds("a red box on a blue box", 12, 4.0, 50) == 46
    assert app.gpu_seconds("a cat, a dog and a cow", 24, 4.0, 50) == app.gpu_seconds("a box", 999, 4.0, 999) == 60
    values = {"prompt": "a red box", "num_views": 12, "num_inference_steps": 50, "redraw": 0.5}
    assert app.gpu_seconds(*(values.get(name) for name in app.INPUTS)) == 37
    assert app.gpu_seconds("a red box", "many", 4.0, 50) == app.gpu_seconds(None, 4, 4.0, 1) == 10


@pytest.mark.parametrize("texture_size, seconds", [(512, 16), (1024, 17), (4096, 34), (None, 17)])
def test_gpu_time_is_asked_for_large_textures(texture_size, seconds):
    values = {"prompt": "a red box", "num_views": 12, "num_inference_steps": 20, "redraw": 0.0,
              "texture_size": texture_size}
    assert app.gpu_seconds(*(values.get(name) for name in app.INPUTS)) == seconds


def test_the_endpoints_are_what_the_page_does(client):
    assert list(client.view_api(return_format="dict")["named_endpoints"]) == [
        "/generate", "/reconstruct", "/refine", "/export"]


def test_an_object_is_made_again_and_exported_without_drawing(visitor, monkeypatch):
    client = visitor()
    first = client.predict("a red box", **QUICK)[3]
    monkeypatch.delattr(DrawnPipeline, "stream")
    status, glb = client.predict(max_faces=900, texture_size=512, longest_side=2.0, api_name="/refine")
    assert status["stage"] == "done" and Path(glb).name == Path(first).name
    again = welded(glb)
    assert 500 < len(again.faces) <= 900 and again.extents.max() == pytest.approx(2.0, abs=1e-4)
    stl = trimesh.load(client.predict("stl", api_name="/export"))
    assert len(stl.faces) == len(again.faces) and stl.extents.max() == pytest.approx(2000.0, abs=0.1)


@pytest.mark.parametrize("call, said", [
    ({"api_name": "/refine"}, "Make an object first"), ({"format": "obj", "api_name": "/export"}, "object first"),
    ({"max_faces": 5, "api_name": "/refine"}, "max_faces|Minimum|less than"),
    ({"files": [], "elevation": 20, "api_name": "/reconstruct"}, "Choose pictures"),
])
def test_what_cannot_be_done_yet_ends_in_a_message(visitor, call, said, capfd):
    with pytest.raises(AppError, match=said):
        visitor().predict(**call)
    assert "Traceback" not in "".join(capfd.readouterr())


@pytest.fixture(scope="module")
def ring(tmp_path_factory):
    """A folder with six pictures of a blue box, cut out."""
    folder = tmp_path_factory.mktemp("ring")
    views = box_views("a blue box", Cameras.orbit(6))
    straight = views.views / views.masks.clamp_min(1e-3)
    for i, picture in enumerate(torch.cat([straight, views.masks], 1).permute(0, 2, 3, 1)):
        Image.fromarray((picture * 255).round().byte().numpy()).save(folder / f"view-{i}.png")
    return folder


def test_pictures_of_ones_own_become_an_asset(visitor, ring, monkeypatch):
    fit_in_few_steps(monkeypatch)
    files = [handle_file(path) for path in sorted(ring.iterdir())]
    picture, status, glb = visitor().predict(files, None, **ASSET, api_name="/reconstruct")
    assert status["stage"] == "done" and Image.open(picture).width > 700
    assert welded(glb).is_watertight and mean_color(glb).argmax() == 2


def test_a_broken_picture_ends_in_a_message_that_names_it(visitor, ring, tmp_path, capfd):
    broken = tmp_path / "view-6.png"
    broken.write_bytes((ring / "view-0.png").read_bytes()[:200])
    files = [handle_file(path) for path in [*sorted(ring.iterdir()), broken]]
    with pytest.raises(AppError, match="view-6.png"):
        visitor().predict(files, 20, **ASSET, api_name="/reconstruct")
    assert "Traceback" not in "".join(capfd.readouterr())


@pytest.mark.parametrize("wrong", REFUSED)
def test_unusable_views_of_ones_own_end_in_the_message_of_their_reader(client, tmp_path, capfd, wrong):
    with pytest.raises(AppError, match=REFUSED[wrong]):
        client.predict([handle_file(refused(wrong, tmp_path))], None, **ASSET, api_name="/reconstruct")
    assert "Traceback" not in "".join(capfd.readouterr())


@pytest.mark.parametrize("typed, meant", [(None, None), (" ", None), ("20", 20.0), (-7.5, -7.5), ("12,5°", 12.5)])
def test_a_rings_elevation_is_read_as_people_type_it(typed, meant):
    assert desks.checked_elevation(typed) == meant


@pytest.mark.parametrize("typed", ["high", "81", "nan", "inf"])
def test_a_rings_elevation_that_is_none_ends_in_a_message(client, ring, typed):
    with pytest.raises(AppError, match="elevation must be a number of degrees from -80 to 80, or empty, got"):
        client.predict([handle_file(path) for path in sorted(ring.iterdir())], typed, **ASSET, api_name="/reconstruct")


def test_the_number_of_own_views_is_checked_where_it_is_given(client, ring):
    with pytest.raises(AppError, match="num_views must be the number of pictures, 6, got 7"):
        client.predict([handle_file(path) for path in sorted(ring.iterdir())], None, **ASSET, num_views=7,
                       api_name="/reconstruct")


@pytest.mark.parametrize("wrong, named", [
    ({"prompt": ""}, "prompt"), ({"prompt": "x" * 10_000}, "prompt"), ({"prompt": None}, "prompt"),
    ({"num_views": 99}, "num_views"), ({"num_views": "many"}, "num_views"), ({"guidance_scale": -3}, "guidance_scale"),
    ({"num_inference_steps": 10**9}, "num_inference_steps"), ({"elevation": 90}, "elevation"), ({"seed": -1}, "seed"),
    ({"consistency": 2}, "consistency"), ({"guidance_rescale": 2}, "guidance_rescale"),
    ({"symmetry": "sideways"}, "symmetry"), ({"skip_guidance_scale": -1}, "skip_guidance_scale"),
    ({"redraw": 1}, "redraw"),
])
def test_wrong_values_end_in_a_message(client, capfd, wrong, named):
    with pytest.raises(AppError, match=named) as error:
        client.predict(**({"prompt": "a red box"} | QUICK | wrong))
    assert len(str(error.value)) < 300
    assert "Traceback" not in "".join(capfd.readouterr())


def test_views_that_hold_nothing_end_in_a_message_and_the_app_lives_on(client, capfd):
    with pytest.raises(AppError):
        client.predict(NOTHING, **QUICK)
    assert "Traceback" not in "".join(capfd.readouterr())
    assert client.predict("a red box", **QUICK)[1]["stage"] == "done"


def test_visitors_at_the_same_time_get_their_own_objects(visitor):
    def visit(color):
        return visitor().predict(f"a {color} box", **QUICK)

    with ThreadPoolExecutor() as pool:
        glbs = {color: pool.submit(visit, color) for color in ("red", "blue")}
    for channel, color in ((0, "red"), (2, "blue")):
        assert mean_color(glbs[color].result()[3]).argmax() == channel


@pytest.fixture
def desk(tmp_path):
    """The page's events, around a studio that knows what modules there are and draws nothing."""
    studio = SimpleNamespace(mixers=MODULES)
    studio.mixers_for = partial(Studio.mixers_for, studio)
    return desks.Desk(studio, tmp_path, load_examples(app.EXAMPLES))


def choose(desk, index):
    event = SelectData(None, {"index": index, "value": None})
    return desk.show(event, SimpleNamespace(session_hash="visitor"))


def test_a_chosen_example_fills_the_fields_with_what_it_was_made_from(desk):
    for index, example in enumerate(desk.examples):
        prompt, *settings, status, views, model, download, other, shown, refine, prepare = choose(desk, index)
        assert shown.value == "glb" and not other.visible
        assert not any(part.interactive for part in (shown, refine, prepare))
        assert desks.checked(prompt, *settings) == example.request
        assert views == str(example.views) and Path(model.value["path"]).read_bytes() == example.glb.read_bytes()
        *direction, distance = model.camera_position
        assert direction == [60, 75] and distance == pytest.approx(viewing_distance(
            trimesh.load(example.glb, force="mesh").vertices))
        assert Path(download.value["path"]).read_bytes() == example.glb.read_bytes()
        assert "Pre-made example" in status["message"] and f"“{example.checkpoint}”" in status["message"]


def test_splats_stand_where_their_viewer_looks_whatever_the_assets_place_and_size(desk, tmp_path):
    visitor = SimpleNamespace(session_hash="visitor")
    cameras = Cameras.orbit(6)
    options = AssetOptions(max_faces=500, texture_size=512, longest_side=20.0)
    asset = finish_asset(find_surface(box_views("a red box", cameras), cameras, 32), options)
    run = run_folder(desk.folder(visitor))
    glb = str(save_glb(asset.mesh, run / "box.glb"))
    (run / "box.json").write_text("{}")
    save_finished(asset, run / desks.FINISHED)
    set_current_run(desk.folder(visitor), run)
    shown = {kind: desk.look(kind, glb, visitor) for kind in ("glb", "splat")}
    assert Path(shown["glb"].value["path"]).read_bytes() == Path(glb).read_bytes()
    assert shown["glb"].camera_position == shown["splat"].camera_position
    seen, exported = (trimesh.load(path).vertices for path in (shown["splat"].value["path"], desk.export(
        "splat", visitor)))
    assert np.ptp(seen, axis=0).max() == pytest.approx(SPLATS_SIDE, abs=0.03)
    assert (seen.min(0) + seen.max(0)) / 2 == pytest.approx(np.zeros(3), abs=0.02)
    assert np.ptp(exported, axis=0).max() == pytest.approx(20, abs=0.4) and exported[:, 1].max() < 0.4  # y down


def test_the_page_offers_the_modules_of_its_checkpoint(client):
    mixers = next(c for c in client.config["components"] if c["props"].get("elem_id") == "mixers")
    assert [value for _, value in mixers["props"]["choices"]] == mixers["props"]["value"] == list(MIXERS)
    assert app.MIXER_NAMES.keys() == set(MODULES)


def test_the_gallery_shows_every_example_under_its_prompt(client):
    gallery = next(c for c in client.config["components"] if c["props"].get("elem_id") == "examples")
    captions = [item["caption"] for item in gallery["props"]["value"]]
    assert captions == [e.request.prompt for e in load_examples(app.EXAMPLES)] and len(captions) == 12


def test_an_example_is_not_put_over_a_run_that_draws(desk):
    desk.line.add("visitor")
    with pytest.raises(Error, match="press Stop first"):
        choose(desk, 0)


def test_a_run_that_begins_takes_the_object_before_out_of_reach(desk, tmp_path):
    """Or else, stopped halfway, it would leave its own views on the page and the other's files behind the buttons."""
    visitor = SimpleNamespace(session_hash="visitor")
    set_current_run(desk.folder(visitor), run_folder(desk.folder(visitor)))
    values = [getattr(GenerationRequest("a red box"), name) for name in (
        "prompt", "num_views", "guidance_scale", "num_inference_steps", "elevation", "seed", "randomize_seed",
        "consistency", "mixers", "symmetry", "one_by_one", "guidance_rescale", "skip_guidance_scale", "redraw")]
    options = list(vars(AssetOptions()).values())
    desk.begin(*values, *options, visitor)
    with pytest.raises(Error, match="press Stop first"):
        desk.begin(*values, *options, visitor)
    after = desk.finish({"stage": "stopped"}, None, visitor)
    refine, prepare = after[3:5]
    assert not refine.interactive and not prepare.interactive
    with pytest.raises(Error, match="Make an object first"):
        desk.export("obj", visitor)


def test_a_file_that_is_ready_too_late_is_not_put_under_the_next_object(desk, monkeypatch):
    visitor = SimpleNamespace(session_hash="visitor")
    run, following = (run_folder(desk.folder(visitor)) for _ in range(2))
    (run / "a-red-box-0.json").write_text("{}")
    set_current_run(desk.folder(visitor), run)
    monkeypatch.setattr(desks, "load_finished", lambda path: SimpleNamespace(
        mesh=None, surface=SimpleNamespace(views=None, cameras=None)))
    monkeypatch.setattr(desks, "export", lambda *args, **kwargs: None)
    assert desk.export("obj", visitor).endswith("a-red-box-0-obj.zip")
    monkeypatch.setattr(desks, "export", lambda *args, **kwargs: set_current_run(desk.folder(visitor), following))
    with pytest.raises(Error, match="another has come on the stage"):
        desk.export("stl", visitor)


def test_runs_of_those_who_never_open_the_page_are_cleaned_up_too(desk):
    visitor = SimpleNamespace(session_hash="program")
    old = run_folder(desk.folder(visitor))
    os.utime(old, (0, 0))
    assert list(desk._work(visitor, lambda run, stop: iter(()))) == [] and not old.exists()


def test_the_lane_is_free_again_after_a_cancelled_call(visitor):
    job = visitor().submit("a red box", **QUICK | {"num_inference_steps": 50})
    next(iter(job))
    job.cancel()
    _, status, _, _ = next(iter(visitor().submit("a red box", **QUICK)))
    assert status["stage"] == "waiting"


def test_the_page_asks_nothing_of_other_servers(address):
    page = httpx.get(address).text
    assert "fonts.googleapis.com/css" not in page
    assert not re.search(r'"analytics_enabled":\s*true', page)
