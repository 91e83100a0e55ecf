"""Truths about `python -m coser`: its files, its progress lines and its exit codes."""

import json
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest
import trimesh
from captures import REFUSED, refused
from drawn_pipeline import NOTHING, DrawnPipeline, box_views, fit_in_few_steps, load_drawn_pipelines, mean_color, welded
from PIL import Image

from coser.__main__ import main
from coser.cameras import Cameras
from coser.vocabulary import Verdict

QUICK = ["--num-views", "6", "--num-inference-steps", "3", "--checkpoint", "tests/drawn",
         "--max-faces", "500", "--texture-size", "512"]


@pytest.fixture(autouse=True)
def drawn(monkeypatch, tmp_path):
    load_drawn_pipelines(monkeypatch)
    monkeypatch.chdir(tmp_path)


def test_a_prompt_becomes_a_glb_and_its_path_is_all_that_stdout_says(capsys, tmp_path):
    assert main(["a red box", "-o", "box.glb", *QUICK]) == 0
    out, err = capsys.readouterr()
    assert out == "box.glb\n" and welded(tmp_path / "box.glb").is_watertight
    assert "step 3 of 3" in err and "s left" in err and "100 %" in err and "Traceback" not in err


def test_a_note_about_the_prompt_is_said_once_before_the_steps_and_not_on_stdout(monkeypatch, capsys):
    unknown = Verdict(False, 0.5, ("box", "crate"))
    unknowing = SimpleNamespace(nearest=lambda prompt: unknown, nearest_kind=lambda noun: None)
    monkeypatch.setattr("coser.studio.load_vocabulary", lambda *args: unknowing)
    assert main(["a red violin", "-o", "violin.glb", *QUICK]) == 0
    out, err = capsys.readouterr()
    assert out == "violin.glb\n" and err.count(unknown.note) == 1
    assert err.index(unknown.note) < err.index("step 1 of 3")


def test_without_an_output_the_glb_is_named_after_prompt_and_drawn_seed(capsys, tmp_path):
    assert main(["a red box", "--randomize-seed", *QUICK]) == 0
    glb = tmp_path / capsys.readouterr().out.strip()
    seed = json.loads(glb.with_suffix(".json").read_text())["settings"]["seed"]
    assert glb.name == f"a-red-box-{seed}.glb"


@pytest.mark.parametrize("arguments, named", [
    ([""], "prompt"), (["a box", "--num-views", "3"], "num_views"), (["a box", "-o", "box.obj"], "output"),
    (["a box", "-o", "missing/box.glb"], "output"), (["a box", "-o", "box.GLB"], "output"),
    (["a box", "--elevation", "31"], "elevation"),
    ([], "prompt"), (["a box", "--views", "."], "prompt"), (["a box", "--max-faces", "3"], "max_faces"),
    (["a box", "--texture-size", "77"], "texture_size"), (["a box", "--origin", "moon"], "origin"),
    (["a box", "--symmetry", "sideways"], "symmetry"),
])
def test_wrong_arguments_exit_with_2_and_one_line_that_names_them(arguments, named, capsys):
    assert main(arguments) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"coser: {named} must ") and err.count("\n") == 1


@pytest.mark.parametrize("arguments", [
    [NOTHING, *QUICK], ["a box", "--checkpoint", "not/a/checkpoint"], ["a box", "--device", "gpu"],
    ["a box", *QUICK, "--mixers", "dense"],
])
def test_what_cannot_be_made_exits_with_1_and_a_message(arguments, capsys, tmp_path):
    assert main(arguments) == 1
    out, err = capsys.readouterr()
    assert out == "" and "coser: " in err and "Traceback" not in err
    assert not list(tmp_path.glob("*.glb")) and not list(tmp_path.glob(".*"))


def test_views_of_ones_own_become_an_asset_in_several_formats(capsys, tmp_path, monkeypatch):
    fit_in_few_steps(monkeypatch)
    (tmp_path / "ring").mkdir()
    views = box_views("a blue box", Cameras.orbit(6, 10.0))
    for i, picture in enumerate(views.on_background().permute(0, 2, 3, 1)):
        Image.fromarray((picture * 255).round().byte().numpy()).save(tmp_path / "ring" / f"{i}.png")
    assert main(["--views", "ring", "--elevation", "10", "-o", "mine.glb", "--also", "stl", "ply", "--longest-side",
                 "0.1", *QUICK[4:]]) == 0
    out, err = capsys.readouterr()
    assert out.split() == ["mine.glb", "mine.stl", "mine.ply"] and "Traceback" not in err
    assert trimesh.load(tmp_path / "mine.stl").extents.max() == pytest.approx(100.0, abs=0.01)
    assert welded(tmp_path / "mine.glb").is_watertight and mean_color(tmp_path / "mine.glb").argmax() == 2


def test_a_folder_without_pictures_exits_with_2_and_one_line(capsys, tmp_path):
    (tmp_path / "empty").mkdir()
    assert main(["--views", "empty"]) == 2 and main(["--views", "nowhere"]) == 2
    err = capsys.readouterr().err
    assert err.count("coser: ") == 2 and err.count("\n") == 2 and "Traceback" not in err


@pytest.mark.parametrize("wrong", REFUSED)
def test_unusable_views_of_ones_own_exit_with_2_and_the_message_of_their_reader(wrong, capsys, tmp_path):
    assert main(["--views", str(refused(wrong, tmp_path))]) == 2
    err = capsys.readouterr().err
    assert re.search(REFUSED[wrong], err) and err.startswith("coser: ") and err.count("\n") == 1


def test_an_interrupt_exits_with_130_and_leaves_no_file(monkeypatch, capsys, tmp_path):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt
        yield

    monkeypatch.setattr(DrawnPipeline, "stream", interrupted)
    assert main(["a red box", "-o", "box.glb", *QUICK]) == 130
    assert "interrupted" in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_what_was_written_before_an_interrupt_or_an_error_is_said(monkeypatch, capsys, tmp_path):
    for error, code in ((KeyboardInterrupt(), 130), (OSError("no space left"), 1)):
        def fails(*args, error=error, **kwargs):
            raise error

        monkeypatch.setattr("coser.__main__.export", fails)
        assert main(["a red box", "-o", "box.glb", "--also", "obj", *QUICK]) == code
        out, err = capsys.readouterr()
        assert out.strip() == "box.glb" and (tmp_path / "box.glb").is_file() and "nothing was written" not in err


def test_importing_coser_loads_nothing_else():
    loaded = "import sys; before = set(sys.modules); import coser; print(sorted(set(sys.modules) - before))"
    path = f"import sys; sys.path.insert(0, {str(sys.modules['coser'].__path__[0] + '/..')!r}); "
    assert subprocess.check_output([sys.executable, "-c", path + loaded], text=True).strip() == "['coser']"
