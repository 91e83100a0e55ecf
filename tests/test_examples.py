"""Truths about the finished examples: those in the repository, and how they are made."""

import json
from pathlib import Path

import numpy as np
import pygltflib
import pytest
from drawn_pipeline import load_drawn_pipelines, welded
from PIL import Image

from coser.examples import load_example, load_examples, main, make_examples, weights_hash
from coser.models.block import MIXERS
from coser.request import GenerationRequest
from coser.studio import SMALL, TILE, Studio
from coser.views import grid_columns

FOLDER = Path(__file__).parent.parent / "examples"
REQUESTS = [GenerationRequest(f"a {color} box", num_views=6, num_inference_steps=2, mixers=("adjacent", "glance"))
            for color in ("red", "blue")]
SHIPPED = load_examples(FOLDER / "gallery")


@pytest.fixture
def studio(monkeypatch):
    load_drawn_pipelines(monkeypatch)
    return Studio("tests/drawn", device="cpu")


def tiles(grid: Image.Image, num_views: int) -> list[np.ndarray]:
    """The grid's views, uint8 [TILE,TILE,3] each; fails where the picture's size is not that of so many."""
    columns, side = grid_columns(num_views), TILE + 2
    rows = -(-num_views // columns)
    assert grid.size == (columns * side - 2, rows * side - 2)
    pixels = np.asarray(grid.convert("RGB"))
    return [pixels[y * side:y * side + TILE, x * side:x * side + TILE]
            for y, x in (divmod(i, columns) for i in range(num_views))]


def test_the_examples_are_those_of_the_list_and_small_together():
    asked = [line for line in (FOLDER / "gallery.txt").read_text("utf-8").splitlines() if line]
    assert len(asked) == 12 and sorted(e.request.prompt for e in SHIPPED) == sorted(asked)
    assert sum(path.stat().st_size for path in (FOLDER / "gallery").iterdir()) <= 5 * 2**20


def test_the_examples_were_drawn_by_the_shipped_weights():
    stale = [e.request.prompt for e in SHIPPED if e.weights_sha256 != weights_hash(SMALL)]
    assert not stale, "the weights have changed: python -m coser.examples examples/gallery.txt examples/gallery"


@pytest.mark.parametrize("example", SHIPPED, ids=lambda e: e.request.prompt)
def test_an_example_is_whole(example):
    assert example.checkpoint == "small" and not example.request.randomize_seed
    with Image.open(example.views) as grid:
        shown = tiles(grid, example.request.num_views)
    assert all((tile.min(-1) < 235).mean() > 0.01 for tile in shown), "a view is empty"
    mesh = welded(example.glb)
    record = json.loads(example.glb.with_suffix(".json").read_text("utf-8"))
    assert mesh.is_watertight and 100 < len(mesh.faces) == record["mesh"]["faces"]
    extras = pygltflib.GLTF2().load(str(example.glb)).asset.extras
    assert GenerationRequest(**extras["settings"]) == example.request


def test_made_examples_load_again_with_what_was_asked(studio, tmp_path):
    made = list(make_examples(studio, REQUESTS, tmp_path))
    assert [e.request for e in made] == REQUESTS
    assert load_examples(tmp_path) == sorted(made, key=lambda e: e.glb)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        f"a-{color}-box-0.{kind}" for color in ("blue", "red") for kind in ("glb", "json", "webp")]
    with Image.open(made[0].views) as grid:
        first = tiles(grid, 6)[0]
    assert (np.asarray(made[0].thumbnail()) == first).all()
    red, green, blue = first.reshape(-1, 3)[first.reshape(-1, 3).min(1) < 128].mean(0)
    assert red > 2 * max(green, blue)


def test_examples_no_longer_asked_for_go_and_nothing_else_does(studio, tmp_path):
    (tmp_path / "README.md").write_text("about these")
    list(make_examples(studio, REQUESTS, tmp_path))
    list(make_examples(studio, REQUESTS[1:], tmp_path))
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "README.md", "a-blue-box-0.glb", "a-blue-box-0.json", "a-blue-box-0.webp"]


def test_the_command_draws_a_list_of_prompts(monkeypatch, tmp_path, capsys):
    load_drawn_pipelines(monkeypatch)
    (tmp_path / "list.txt").write_text("a red box\n\n")
    main([str(tmp_path / "list.txt"), str(tmp_path / "out"), "--checkpoint", "tests/drawn", "--seed", "3"])
    assert [e.request for e in load_examples(tmp_path / "out")] == [
        GenerationRequest("a red box", seed=3, mixers=MIXERS)]
    assert "a-red-box-3.glb" in capsys.readouterr().out


def test_an_empty_list_is_refused_and_removes_nothing(tmp_path, capsys):
    (tmp_path / "list.txt").write_text("\n")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "kept.json").write_text("{}")
    with pytest.raises(SystemExit):
        main([str(tmp_path / "list.txt"), str(tmp_path / "out")])
    assert "must hold a prompt a line" in capsys.readouterr().err and (tmp_path / "out" / "kept.json").is_file()


def test_without_a_folder_there_are_no_examples(tmp_path):
    assert load_examples(tmp_path / "missing") == []


@pytest.mark.parametrize("broken", ["{", "[]", '{"settings": {"prompt": ""}}', '{"settings": {"prompt": "a box"}}'])
def test_settings_that_cannot_be_read_are_named(broken, tmp_path):
    (tmp_path / "box.json").write_text(broken)
    with pytest.raises(ValueError, match="box.json must hold an example's settings"):
        load_example(tmp_path / "box.json")


def test_a_missing_mesh_is_named(tmp_path):
    settings = SHIPPED[0].glb.with_suffix(".json").read_text("utf-8")
    (tmp_path / "box.json").write_text(settings)
    (tmp_path / "box.webp").touch()
    with pytest.raises(ValueError, match="box.glb"):
        load_examples(tmp_path)


def test_the_hash_follows_the_weights_and_nothing_else(tmp_path):
    for part in ("unet", "vae"):
        (tmp_path / part).mkdir()
        (tmp_path / part / "model.safetensors").write_bytes(part.encode())
    first = weights_hash(tmp_path)
    (tmp_path / "README.md").write_text("words")
    (tmp_path / "vocabulary.safetensors").write_bytes(b"words")
    assert weights_hash(tmp_path) == first and len(first) == 64
    (tmp_path / "unet" / "model.safetensors").write_bytes(b"trained further")
    assert weights_hash(tmp_path) != first
    assert weights_hash("some-one/some-model") == ""
