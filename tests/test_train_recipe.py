"""The recipe, rehearsed whole on tiny sizes: killed, copied, gone on with, and what it leaves."""

import json
import shutil
import time

import pytest
import torch
import trimesh
from solids import cube, sphere, table

from coser import agreement, evaluate_prompts, recipe_renders, train_denoiser, train_loop, train_recipe
from coser.background import Background
from coser.data.assets import split_assets
from coser.data.dataset import list_rings
from coser.latents import same_weights
from coser.models.unet import MultiviewUNet
from coser.pipeline import CoSERPipeline
from coser.recipe_record import STAGES, Record
from coser.shards import read_shards
from coser.train import main
from coser.train_denoiser import sample_flop
from coser.train_loop import checkpoints
from coser.train_recipe import PROMPTS
from tests.tiny import Killed, lighten

SOLIDS = {"red-cube": cube(0.5), "big-cube": cube(0.6), "ball": sphere(0.7, rows=6), "table": table()}
TINY = ["--preset", "tiny", "--device", "cpu", "--dtype", "float32", "--minutes", "10", "--size", "64",
        "--num-views", "4", "--workers", "1", "--prompts", "1", "--log-every", "1", "--warmup", "2"]


@pytest.fixture(scope="module")
def assets(tmp_path_factory):
    """Four solids as GLB files with their captions beside them."""
    folder = tmp_path_factory.mktemp("assets")
    for name, (vertices, faces, _) in SOLIDS.items():
        trimesh.Trimesh(vertices.numpy(), faces.numpy(), process=False).export(folder / f"{name}.glb")
        (folder / f"{name}.txt").write_text(f"a {name.replace('-', ' ')}\nan object\n")
    return folder


def draw_little(monkeypatch) -> None:
    """Evaluations draw four views in two steps and fuse them coarsely: untrained weights draw all over the place."""
    monkeypatch.setattr(train_recipe, "DRAWING", dict(num_views=4, num_inference_steps=2))
    monkeypatch.setattr(train_recipe, "PROMPT_SECONDS", {})
    for module in (agreement, evaluate_prompts):
        monkeypatch.setattr(module, "QUICK", module.QUICK | {"resolution": 32})


@pytest.fixture(autouse=True)
def little_beside_the_training(monkeypatch):
    lighten(monkeypatch)
    draw_little(monkeypatch)


def recipe(run) -> dict:
    return json.loads((run / "recipe.json").read_text())


def log(run) -> list[dict]:
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


def stamps(folder) -> dict:
    return {p.relative_to(folder): p.stat().st_mtime_ns for p in folder.rglob("*.safetensors")}


def kill_denoiser_at(step, monkeypatch):
    """The run dies as by SIGKILL between the gradients and the update of a step of the denoiser."""
    schedule, trained = train_loop.schedule, train_denoiser.run
    denoising = []

    def watched(*args):
        denoising.append(True)
        return trained(*args)

    def until(progress, at, *args):
        if denoising and at == step:
            raise Killed
        return schedule(progress, at, *args)

    monkeypatch.setattr(train_denoiser, "run", watched)
    monkeypatch.setattr(train_loop, "schedule", until)


@pytest.fixture(scope="module")
def killed(assets, tmp_path_factory):
    """A run that was killed at the denoiser's step 3, one step after its last checkpoint."""
    run = tmp_path_factory.mktemp("first") / "run"
    with pytest.MonkeyPatch.context() as monkeypatch:
        lighten(monkeypatch)
        kill_denoiser_at(3, monkeypatch)
        with pytest.raises(Killed):
            main(["all", "--assets", str(assets), "--run", str(run), *TINY, "--steps", "4",
                  "--denoiser-arguments", "--save-every 2"])
    return run


@pytest.fixture(scope="module")
def finished(assets, killed, tmp_path_factory):
    """The killed run, gone on with as a copy, which is what another machine gets: (copy, what it held before)."""
    run = tmp_path_factory.mktemp("second") / "copied"
    shutil.copytree(killed, run)
    before = stamps(run)
    with pytest.MonkeyPatch.context() as monkeypatch:
        lighten(monkeypatch)
        monkeypatch.setattr(train_denoiser, "sample_flop", sample_flop)  # here operations are counted
        draw_little(monkeypatch)
        main(["all", "--assets", str(assets), "--run", str(run), *TINY, "--steps", "4"])
    return run, before


def test_a_killed_run_leaves_records_of_what_it_finished_alone(killed):
    stages = recipe(killed)["stages"]
    assert list(stages) == ["render", "autoencoder", "latents"] and all(s["finished"] for s in stages.values())
    assert checkpoints(killed / "denoiser")[-1].name == "checkpoint-2" and not (killed / "shards").exists()


def test_a_copy_goes_on_where_the_killed_run_stopped(killed, finished):
    run, before = finished
    kept = {p: when for p, when in stamps(run).items() if p.parts[0] in ("renders", "autoencoder")}
    assert kept and kept == {p: when for p, when in before.items() if p.parts[0] in ("renders", "autoencoder")}
    assert {"resumed": "checkpoint-2"}.items() <= next(e for e in log(run / "denoiser") if "resumed" in e).items()
    steps = [e["step"] for e in log(run / "denoiser") if "norm" in e]
    assert steps == [1, 2, 3, 3, 4]  # the third is done again
    losses = {e["step"]: e["loss"] for e in log(killed / "denoiser") if "norm" in e}
    again = [e["loss"] for e in log(run / "denoiser") if e.get("step") == 3 and "norm" in e]
    assert again == [losses[3]] * 2


def test_a_finished_recipe_has_all_stages_their_seconds_and_figures(finished):
    found = recipe(finished[0])
    assert list(found["stages"]) == list(STAGES) and len(found["sessions"]) == 2
    assert all(s["finished"] and s["seconds"] >= 0 for s in found["stages"].values())
    figures = {name: stage["figures"] for name, stage in found["stages"].items()}
    assert figures["render"]["rings"] == figures["latents"]["rings"] == 3 and figures["render"]["held_out"] == 1
    assert figures["autoencoder"]["step"] == figures["denoiser"]["step"] == 4
    assert 0 < figures["denoiser"]["mfu"] < 1 and figures["denoiser"]["views_per_second"] > 0
    assert figures["evaluation"]["prompts"] == 1 and figures["evaluation"]["autoencoder"]["psnr"] > 0


def test_shards_join_to_the_last_checkpoint_s_pipeline_and_it_draws(finished, tmp_path):
    run, last = finished[0], checkpoints(finished[0] / "denoiser")[-1]
    read_shards(run / "shards", tmp_path / "joined")
    files = {p.relative_to(last) for p in last.rglob("*") if p.is_file() and not p.name.startswith("training")}
    for folder in (tmp_path / "joined", run / "pipeline"):
        assert {p.relative_to(folder) for p in folder.rglob("*") if p.is_file()} == files
        assert all((folder / f).read_bytes() == (last / f).read_bytes() for f in files)
    pipeline = CoSERPipeline.from_pretrained(tmp_path / "joined", dtype=torch.float32)
    step = pipeline("a red cube", num_views=4, num_inference_steps=1, generator=torch.Generator().manual_seed(0))
    assert step.views.views.shape == (4, 3, 64, 64) and bool(step.views.views.isfinite().all())


def test_a_new_budget_where_renders_and_the_autoencoder_s_run_stayed_behind_goes_on(assets, finished, tmp_path):
    run = tmp_path / "third"
    shutil.copytree(finished[0], run, ignore=lambda folder, names: {"renders", "autoencoder"} & set(names))
    main(["all", "--assets", str(assets), "--run", str(run), *TINY, "--steps", "5", "--prompts", "0"])
    assert not (run / "autoencoder").exists() and len(list_rings(run / "renders" / "train")) == 3
    assert checkpoints(run / "denoiser")[-1].name == "checkpoint-5"
    assert recipe(run)["stages"]["shards"]["figures"]["checkpoint"] == "checkpoint-5"
    vaes = [f / "vae" for f in (checkpoints(run / "denoiser")[-1], checkpoints(finished[0] / "autoencoder")[-1])]
    assert same_weights(*vaes)


def test_another_autoencoder_than_the_denoiser_s_is_refused(assets, finished, pipeline_folder):
    with pytest.raises(SystemExit, match="autoencoder must be the one whose latents"):
        main(["all", "--assets", str(assets), "--run", str(finished[0]), *TINY,
              "--autoencoder", str(pipeline_folder / "vae")])


def test_pipelines_to_start_from_and_given_autoencoders_are_taken(assets, finished, tmp_path):
    start = finished[0] / "pipeline"
    main(["all", "--assets", str(assets), "--run", str(tmp_path / "given"), *TINY, "--steps", "1", "--prompts", "0",
          "--start", str(start), "--autoencoder", str(start / "vae"), "--denoiser-arguments", "--lr 1e-9"])
    stages = recipe(tmp_path / "given")["stages"]
    assert stages["autoencoder"]["figures"] == {"given": str(start / "vae")}
    unets = [MultiviewUNet.from_pretrained(f / "unet") for f in (start, tmp_path / "given" / "pipeline")]
    for a, b in zip(*(u.parameters() for u in unets)):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-6)


def test_the_autoencoder_trains_while_the_rest_renders(assets, tmp_path, monkeypatch):
    monkeypatch.setattr(train_recipe, "FIRST_RINGS", 1)
    rendered, trained = recipe_renders.render_assets, train_recipe.train_autoencoder.run
    listed = []

    def one_then_wait(chosen, output, *args, **kwargs):
        if output.name == "train":
            rendered(chosen[:1], output, *args, **kwargs)
            while not listed:
                time.sleep(0.01)
        rendered(chosen, output, *args, **kwargs)

    def watched(options, loop):
        listed.append(len(list_rings(options.renders)))
        assert options.relist_every
        trained(options, loop)

    monkeypatch.setattr(recipe_renders, "render_assets", one_then_wait)
    monkeypatch.setattr(train_recipe.train_autoencoder, "run", watched)
    main(["all", "--assets", str(assets), "--run", str(tmp_path / "run"), *TINY, "--steps", "2", "--prompts", "0",
          "--overlap"])
    assert listed == [1] and recipe(tmp_path / "run")["stages"]["latents"]["figures"]["rings"] == 3
    assert list((tmp_path / "run" / "renders" / "train" / "latents").glob("captions-*"))


def test_an_error_while_rendering_beside_is_raised_and_not_waited_out():
    def fail():
        raise ValueError("a broken mesh")

    with pytest.raises(ValueError, match="a broken mesh"):
        Background(fail).wait(60)


def test_a_budget_that_is_over_ends_the_recipe_without_a_checkpoint_and_the_next_one_goes_on(assets, tmp_path, capsys):
    command = ["all", "--assets", str(assets), "--run", str(tmp_path / "run"), *TINY, "--steps", "1", "--prompts", "0"]
    began = time.perf_counter()
    with pytest.raises(SystemExit, match="minutes must leave time"):
        main([*command, "--minutes", "0.0001"])
    assert time.perf_counter() - began < 30
    main(command)
    assert list(recipe(tmp_path / "run")["stages"]) == list(STAGES)


def test_loose_assets_are_held_out_by_their_name_and_packed_ones_as_they_say(assets, tmp_path):
    train, held_out = split_assets(assets)
    assert len(train) == 3 and len(held_out) == 1 and {a.id for a in train + held_out} == set(SOLIDS)
    again = split_assets(shutil.copytree(assets, tmp_path / "elsewhere"))
    assert [a.id for a in again[1]] == [held_out[0].id]
    (tmp_path / "one").mkdir()
    shutil.copy(assets / "ball.glb", tmp_path / "one")
    with pytest.raises(ValueError, match="at least two"):
        split_assets(tmp_path / "one")
    row = {"shard": "none.npz", "captions": ["x"]}
    (tmp_path / "packed").mkdir()
    rows = [row | {"id": i, "split": s} for i, s in (("a", "train"), ("b", "val"), ("c", "extra"), ("d", "train"))]
    (tmp_path / "packed" / "index.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    train, held_out = split_assets(tmp_path / "packed")
    assert [a.id for a in train] == ["a", "d"] and [a.id for a in held_out] == ["b"]


def test_a_record_keeps_the_order_of_stages_and_adds_up_sessions(tmp_path):
    record = Record(tmp_path / "recipe.json")
    record.add("shards", 1.0, True, {})
    record.add("render", 2.0, False, {"rings": 1})
    again = Record(tmp_path / "recipe.json")
    again.add("render", 3.0, True, {"rings": 2})
    assert list(again.stages) == ["render", "shards"] and again.stages["render"]["seconds"] == 5.0
    assert not record.finished("render") and Record(tmp_path / "recipe.json").finished("render")
    assert Record(tmp_path / "recipe.json").figures("render") == {"rings": 2}


def test_there_are_prompts_to_draw():
    assert len(PROMPTS.read_text("utf-8").splitlines()) >= 8
