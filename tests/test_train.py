"""Trainings: a run that is killed at any moment resumes to the same bits, and its checkpoints are what was trained."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from coser import train_loop
from coser.models.autoencoder import ViewAutoencoder
from coser.models.block import MIXERS
from coser.models.unet import MultiviewUNet
from coser.optimizer import MasterOptimizer
from coser.pipeline import CoSERPipeline
from coser.train import main
from coser.train_loop import Budget, Options, checkpoints
from tests.tiny import Killed, kill_at_step, lighten, write_renders

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def options(renders, pipeline_folder):
    """verb => what every tiny run of it is started with."""
    common = ["--preset", "tiny", "--renders", str(renders[0]), "--held-out", str(renders[1]), "--device", "cpu",
              "--warmup", "2", "--log-every", "1", "--evaluate-every", "1000"]
    return {"autoencoder": ["autoencoder", *common],
            "denoiser": ["denoiser", *common, "--dtype", "float32", "--autoencoder", str(pipeline_folder / "vae")]}


@pytest.fixture(autouse=True)
def little_beside_the_training(monkeypatch):
    lighten(monkeypatch)


@pytest.fixture(scope="module")
def finished(options, tmp_path_factory):
    """verb => the folder of a run of 6 steps that nothing disturbed."""
    def run(verb):
        if verb not in made:
            made[verb] = tmp_path_factory.mktemp(verb) / "whole"
            main([*options[verb], "--run", str(made[verb]), "--steps", "6", "--save-every", "2"])
        return made[verb]

    made: dict[str, Path] = {}
    return run


def losses(run: Path) -> dict[int, tuple[float, float]]:
    """Step => loss and gradient norm of the training, as last logged."""
    entries = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return {e["step"]: (e["loss"], e["norm"]) for e in entries if "norm" in e}


def assert_same_end(run: Path, expected: Path) -> None:
    a, b = checkpoints(run)[-1], checkpoints(expected)[-1]
    assert a.name == b.name
    files = {p.relative_to(b) for p in b.rglob("*.safetensors")}
    assert files == {p.relative_to(a) for p in a.rglob("*.safetensors")} and len(files) >= 2
    for file in files:
        found, wanted = load_file(a / file), load_file(b / file)
        assert found.keys() == wanted.keys()
        assert [k for k in wanted if not torch.equal(found[k], wanted[k])] == [], file
    assert losses(run) == losses(expected)
    assert [held_out(run)] == [held_out(expected)]


def held_out(run: Path) -> dict:
    entries = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [e for e in entries if "held_out" in e][-1]


@pytest.mark.parametrize("verb", ["autoencoder", "denoiser"])
def test_a_run_killed_between_checkpoints_ends_as_an_uninterrupted_one(verb, options, finished, tmp_path):
    expected = finished(verb)
    command = [*options[verb], "--run", str(tmp_path / "run"), "--steps", "6", "--save-every", "2"]
    with kill_at_step(5), pytest.raises(Killed):
        main(command)
    assert checkpoints(tmp_path / "run")[-1].name == "checkpoint-4"
    main(command)
    assert_same_end(tmp_path / "run", expected)


@pytest.mark.parametrize("verb", ["autoencoder", "denoiser"])
def test_how_often_a_run_saves_does_not_change_its_end(verb, options, finished, tmp_path):
    main([*options[verb], "--run", str(tmp_path / "run"), "--steps", "6"])
    assert_same_end(tmp_path / "run", finished(verb))


def test_a_process_killed_at_any_moment_resumes_to_the_same_end(options, finished, tmp_path):
    expected = finished("autoencoder")
    command = [*options["autoencoder"], "--run", str(tmp_path / "run"), "--steps", "6", "--save-every", "1"]
    environment = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads()), "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen([sys.executable, "-m", "coser.train", *command], env=environment, cwd=tmp_path,
                               stdout=subprocess.DEVNULL)
    while process.poll() is None and not checkpoints(tmp_path / "run"):
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "the run ended before it was killed"
    main(command)
    assert any("resumed" in line for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines())
    assert_same_end(tmp_path / "run", expected)


def test_a_checkpoint_is_a_pipeline_with_the_averaged_weights(finished):
    folder = checkpoints(finished("denoiser"))[-1]
    state = load_file(folder / "training_state.safetensors")
    unet = CoSERPipeline.from_pretrained(folder, dtype=torch.float16).unet
    for name, weight in unet.named_parameters():
        assert torch.equal(weight.flatten(), state[f"ema/{name}"].half().flatten()), name
    assert any(not torch.equal(state[f"ema/{n}"], state[f"master/{n}"]) for n, _ in unet.named_parameters())
    assert not [p for p in folder.rglob("*") if p.suffix in (".bin", ".pt", ".pth", ".ckpt", ".pkl")]


def test_a_checkpoint_s_autoencoder_is_the_one_that_was_given(finished, pipeline_folder):
    saved = load_file(checkpoints(finished("denoiser"))[-1] / "vae" / "diffusion_pytorch_model.safetensors")
    given = load_file(pipeline_folder / "vae" / "diffusion_pytorch_model.safetensors")
    assert all(torch.equal(saved[k], given[k].half()) for k in given)


def test_a_trained_autoencoder_knows_its_latents_statistics(finished):
    vae = ViewAutoencoder.from_pretrained(checkpoints(finished("autoencoder"))[-1] / "vae")
    assert len(vae.config.latent_mean) == len(vae.config.latent_std) == vae.config.latent_channels
    assert all(s > 0 for s in vae.config.latent_std)


def test_a_run_leaves_its_last_checkpoints_a_picture_and_held_out_figures(finished):
    for verb, picture in (("autoencoder", "views-000006.png"), ("denoiser", "samples-000006.png")):
        run = finished(verb)
        assert [p.name for p in checkpoints(run)] == ["checkpoint-4", "checkpoint-6"]
        assert (run / picture).is_file() and held_out(run)["step"] == 6


def test_a_finished_run_stays_as_it_is(options, finished):
    run = finished("autoencoder")
    before = {p: p.stat().st_mtime_ns for p in run.rglob("*.safetensors")}
    main([*options["autoencoder"], "--run", str(run), "--steps", "6", "--save-every", "2"])
    assert {p: p.stat().st_mtime_ns for p in run.rglob("*.safetensors")} == before


def test_data_on_the_device_trains_the_same(options, finished, tmp_path):
    main([*options["denoiser"], "--run", str(tmp_path / "run"), "--steps", "6", "--data-on-device"])
    assert_same_end(tmp_path / "run", finished("denoiser"))


def test_a_denoiser_trains_on_the_elevations_that_are_asked_for(options, tmp_path, capsys):
    renders, _ = write_renders(tmp_path, rings=2)
    command = [*options["denoiser"], "--renders", str(renders), "--steps", "1", "--elevations"]
    main([*command, "20", "--run", str(tmp_path / "run")])
    assert ", 3 rings of 4 views" in capsys.readouterr().out  # of six: the second of each is seen from elsewhere
    with pytest.raises(SystemExit, match=r"elevations must be among those of the rings, .*20.*, got \[45.0\]"):
        main([*command, "45", "--run", str(tmp_path / "other")])


def test_muon_trains_otherwise_than_adamw_alone(options, finished, tmp_path):
    main([*options["autoencoder"], "--run", str(tmp_path / "run"), "--steps", "2", "--no-muon"])
    adamw, muon = losses(tmp_path / "run"), losses(finished("autoencoder"))
    assert muon[1] == adamw[1] and muon[2] != adamw[2]  # the same start, another first step
    kept = [{key.rsplit("/", 1)[-1] for key in load_file(checkpoints(run)[-1] / "training_state.safetensors")}
            for run in (finished("autoencoder"), tmp_path / "run")]
    assert {"momentum_buffer", "exp_avg_sq"} <= kept[0] and "momentum_buffer" not in kept[1] and "exp_avg_sq" in kept[1]


def test_a_frozen_encoder_is_saved_bit_by_bit_with_its_statistics(options, finished, tmp_path):
    start = checkpoints(finished("autoencoder"))[-1] / "vae"
    main([*options["autoencoder"], "--run", str(tmp_path / "run"), "--steps", "2", "--start", str(start),
          "--freeze-encoder"])
    before, after = (ViewAutoencoder.from_pretrained(f) for f in (start, checkpoints(tmp_path / "run")[-1] / "vae"))
    assert before.config.latent_mean == after.config.latent_mean and before.config.latent_std == after.config.latent_std
    assert all(torch.equal(v, after.encoder.state_dict()[k]) for k, v in before.encoder.state_dict().items())
    assert any(not torch.equal(v, after.decoder.state_dict()[k]) for k, v in before.decoder.state_dict().items())


def test_a_denoiser_starts_from_the_weights_it_is_given(options, finished, tmp_path):
    start = checkpoints(finished("denoiser"))[-1]
    main([*options["denoiser"], "--run", str(tmp_path / "run"), "--steps", "1", "--start", str(start), "--lr", "1e-9"])
    weights = [load_file(folder / "unet" / "diffusion_pytorch_model.safetensors")
               for folder in (start, checkpoints(tmp_path / "run")[-1])]
    assert all(torch.allclose(weights[0][k], weights[1][k], rtol=1e-3, atol=1e-6) for k in weights[0])


def test_a_start_s_masters_are_not_rounded_to_what_it_computes_in(options, finished, tmp_path):
    """At a rate of nothing the weights that are saved are those it started from, to the last bit of their float16."""
    start = checkpoints(finished("denoiser"))[-1]
    command = [*options["denoiser"], "--dtype", "bfloat16", "--run", str(tmp_path / "run"), "--steps", "1"]
    main([*command, "--start", str(start), "--lr", "1e-20"])
    before, after = (load_file(folder / "unet" / "diffusion_pytorch_model.safetensors")
                     for folder in (start, checkpoints(tmp_path / "run")[-1]))
    assert all(torch.equal(before[k], after[k]) for k in before)


def test_a_start_goes_on_scanning_and_pooling_as_it_did(options, tmp_path):
    """No weight's shape tells how: a preset's way would make another function of the same weights."""
    other = {"scan_order": "raster", "pool_window": 4, "trajectory_radius": 1.0}
    start, onwards = tmp_path / "start", tmp_path / "onwards"
    main([*options["denoiser"], "--run", str(start), "--steps", "1", "--model", json.dumps(other)])
    main([*options["denoiser"], "--run", str(onwards), "--steps", "1", "--start", str(start / "checkpoint-1"),
          "--model", json.dumps({"pool_window": 2})])
    config = MultiviewUNet.load_config(onwards / "checkpoint-1" / "unet")
    assert {name: config[name] for name in other} == other | {"pool_window": 2}, "unless told otherwise"


def test_a_start_keeps_the_modules_that_the_preset_has_not(options, tmp_path):
    """As the shipped checkpoint does, which has five."""
    mixers = ["adjacent", "temporal"]
    start, onwards = tmp_path / "start", tmp_path / "onwards"
    main([*options["denoiser"], "--run", str(start), "--steps", "1", "--model", json.dumps({"mixers": mixers})])
    main([*options["denoiser"], "--run", str(onwards), "--steps", "1", "--start", str(start / "checkpoint-1"),
          "--lr", "1e-9"])
    before, after = (MultiviewUNet.from_pretrained(folder / "checkpoint-1" / "unet") for folder in (start, onwards))
    assert set(after.config.mixers) == {*MIXERS, "temporal"}
    weights = after.state_dict()
    kept = {k: v for k, v in before.state_dict().items() if ".temporal." in k}
    assert kept and all(torch.allclose(v, weights[k], rtol=1e-3, atol=1e-6) for k, v in kept.items())


def test_a_start_without_a_pipeline_is_refused(options, tmp_path):
    with pytest.raises(SystemExit, match="start must be a pipeline's folder.*nowhere"):
        main([*options["denoiser"], "--run", str(tmp_path / "run"), "--steps", "1", "--start", "nowhere"])


def test_a_start_of_another_shape_is_refused(options, finished, tmp_path):
    start = tmp_path / "other"
    shutil.copytree(checkpoints(finished("denoiser"))[-1] / "unet", start / "unet")
    file = start / "unet" / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    weights.pop(next(iter(weights)))
    save_file(weights, file)
    with pytest.raises(SystemExit, match="start must be a pipeline"):
        main([*options["denoiser"], "--run", str(tmp_path / "run"), "--steps", "1", "--start", str(start)])


@pytest.mark.skipif(shutil.which("g++") is None, reason="compiling the loss needs a C++ compiler")
def test_a_compiled_loss_is_the_same_loss(options, finished, tmp_path):
    main([*options["autoencoder"], "--run", str(tmp_path / "run"), "--steps", "1", "--compile"])
    (loss, norm), (expected, expected_norm) = losses(tmp_path / "run")[1], losses(finished("autoencoder"))[1]
    assert loss == pytest.approx(expected, rel=1e-3) and norm == pytest.approx(expected_norm, rel=0.02)


class Clock:
    """A clock that goes on a second each time it is read."""

    def __init__(self):
        self.now = 0.0

    def __call__(self) -> float:
        self.now += 1
        return self.now


def toy_run(folder: Path, budget: Budget, killed_at: int | None = None) -> int:
    net = nn.Linear(2, 1)

    def loss_of_step(step):
        if step == killed_at:
            raise Killed
        return net(torch.ones(1, 2)).square().mean(), {}

    return train_loop.train_loop(MasterOptimizer(net), loss_of_step, lambda folder: None, lambda step, log: None,
                                 Options(run=folder, budget=budget, save_every=5, log_every=1))


def test_minutes_end_a_run_also_over_several_sessions(tmp_path, monkeypatch):
    monkeypatch.setattr(train_loop.time, "perf_counter", Clock())
    whole = toy_run(tmp_path / "whole", Budget(minutes=1))
    assert 20 < whole <= 60  # each step reads the clock once or twice
    with pytest.raises(Killed):
        toy_run(tmp_path / "parts", Budget(minutes=1), killed_at=17)
    kept = json.loads((checkpoints(tmp_path / "parts")[-1] / "training.json").read_text())
    assert kept["step"] == 15 and kept["seconds"] > 15
    assert abs(toy_run(tmp_path / "parts", Budget(minutes=1)) - whole) <= 2
    assert checkpoints(tmp_path / "parts")[-1].name.startswith("checkpoint-")


def test_the_earlier_of_steps_and_minutes_ends_a_run(tmp_path, monkeypatch):
    monkeypatch.setattr(train_loop.time, "perf_counter", Clock())
    assert toy_run(tmp_path / "steps", Budget(steps=7, minutes=60)) == 7
    assert toy_run(tmp_path / "minutes", Budget(steps=1000, minutes=0.2)) < 13


@pytest.mark.parametrize("wrong, named", [
    (["--steps", "0"], "steps must be more than 0, got 0"), (["--minutes", "-1"], "minutes must be more than 0"),
    (["--steps", "1", "--log-every", "0"], "log_every must be at least 1, got 0"),
    (["--steps", "1", "--save-every", "0"], "save_every must be at least 1"),
    (["--steps", "1", "--evaluate-every", "-2"], "evaluate_every must be at least 1"),
    (["--steps", "1", "--warmup", "-1"], "warmup must be at least 0"),
    (["--steps", "1", "--device", "tpu"], "device must be .*tpu"),
])
def test_numbers_and_devices_that_lead_nowhere_are_refused_before_anything_is_read(options, tmp_path, wrong, named):
    with pytest.raises(SystemExit, match=f"coser: {named}"):
        main([*options["autoencoder"], "--renders", "nowhere", "--run", str(tmp_path / "run"), *wrong])
    assert not (tmp_path / "run").exists()


def test_view_counts_are_looked_at_before_anything_is_encoded(options, tmp_path):
    renders, _ = write_renders(tmp_path)
    with pytest.raises(SystemExit, match="coser: view_counts must divide the 4 rendered views of a ring, got .3."):
        main([*options["denoiser"], "--renders", str(renders), "--run", str(tmp_path / "run"), "--steps", "1",
              "--view-counts", "3"])
    assert not (renders / "latents").exists()


def test_a_run_without_an_end_is_refused(options, tmp_path, capsys):
    with pytest.raises(ValueError, match="steps or minutes must be given"):
        Budget()
    with pytest.raises(SystemExit):
        main([*options["autoencoder"], "--run", str(tmp_path / "run")])
    assert "--minutes" in capsys.readouterr().err


def test_an_unfinished_checkpoint_is_none(tmp_path):
    for name in ("checkpoint-10", "checkpoint-2", "checkpoint-writing"):
        (tmp_path / name).mkdir()
    assert [p.name for p in checkpoints(tmp_path)] == ["checkpoint-2", "checkpoint-10"]
