"""The benchmark: what it watches, what it counts, and that watching changes nothing."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from drawn_pipeline import box_views

from coser import benchmark, pipeline, reconstruction, studio
from coser.benchmark import (BARS, Report, count_run, fresh_process, main, measure_training, table, time_app, time_run,
                             time_start)
from coser.cameras import Cameras
from coser.models.autoencoder import ViewAutoencoder
from coser.request import GenerationRequest
from coser.stopwatch import PRODUCTS, Stage, Watch, flop_counter, matmul_rate
from coser.studio import Studio

CPU = torch.device("cpu")
REQUEST = GenerationRequest("a red box", num_views=4, num_inference_steps=4)


@pytest.fixture(scope="module")
def made(pipeline_folder):
    """A Studio around the tiny pipeline; what it finally draws is replaced by a box, so that there is a mesh."""
    decode = ViewAutoencoder.latents_to_views

    def draw_a_box(vae, latents):
        decode(vae, latents)
        return box_views("red", Cameras.orbit(len(latents)))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ViewAutoencoder, "latents_to_views", draw_a_box)
        yield Studio(pipeline_folder, "cpu")


def functions(made):
    """Some of those that a watch replaces."""
    return (made.pipeline._predict, made.pipeline.vae.latents_to_preview, reconstruction.fuse, studio.grid,
            studio.export)


@pytest.fixture(scope="module")
def timed(made, tmp_path_factory):
    """A run under the watch: (seconds, stages), its GLB, and functions before it and after it."""
    folder, before = tmp_path_factory.mktemp("timed"), functions(made)
    return time_run(made, REQUEST, folder), (folder / "benchmark.glb").read_bytes(), before, functions(made)


def test_every_stage_is_seen_as_often_as_it_runs_and_together_they_are_the_run(timed):
    seconds, stages = timed[0]
    assert {name: stage.calls for name, stage in stages.items()} == {
        "prompt encoding": 1, "denoising steps": 4, "solver": 4, "previews": 4, "grids": 5, "decoding": 3,
        "encoding": 2, "rendering": 2, "fusing": 3, "consensus fusing": 0, "checking the fit": 3, "simplifying": 7,
        "colouring": 2, "normals": 3, "unwrapping and texture": 1, "placing": 1, "GLB writing and checking": 1,
        "the rest": 1}  # fused at the last two of four steps, where what was checked is what is used, and after
    assert sum(s.seconds for s in stages.values()) == pytest.approx(seconds)
    assert all((s.seconds > 0) == (s.calls > 0) and s.growth >= 0 for s in stages.values())


def test_watching_changes_nothing(made, timed, tmp_path):
    _, watched, before, after = timed
    for _ in made.generate(REQUEST, tmp_path / "plain.glb"):
        pass
    assert (tmp_path / "plain.glb").read_bytes() == watched and before == after


def test_a_watch_counts_calls_and_operations_and_lets_go_after_errors():
    class Owner:
        def product(self, a):
            return a @ a

    owner, a = Owner(), torch.randn(64, 64)
    with pytest.raises(RuntimeError), flop_counter() as counter, Watch(CPU, counter) as watch:
        watch.add(owner, "product", "products")
        owner.product(a)
        owner.product(a)
        owner.product(torch.randn(3, 2))
    assert watch.stages["products"].calls == 2 and watch.stages["products"].gflop == pytest.approx(2 * 2 * 64**3 / 1e9)
    assert "product" not in vars(owner)


def test_attention_counts_as_its_two_matrix_products():
    query, key, value = (torch.randn(2, 3, length, 16) for length in (40, 24, 24))
    with flop_counter() as fused:
        F.scaled_dot_product_attention(query, key, value)
    with flop_counter() as plain:
        (query @ key.transpose(2, 3)).softmax(-1) @ value
    assert fused.get_total_flops() == plain.get_total_flops() == 2 * 2 * 2 * 3 * 40 * 24 * 16


def test_a_denoising_step_counts_as_one_guided_pass_of_the_unet(made, tmp_path):
    pipeline, embeds = made.pipeline, made.pipeline.encode_prompt(["", REQUEST.prompt])
    latents = torch.zeros(2, 4, 4, 16, 16, dtype=pipeline.unet.dtype)
    with torch.no_grad(), flop_counter() as counter:
        pipeline.unet(latents, torch.full((2,), 500.0), embeds.states, Cameras.orbit(4), pooled=embeds.pooled,
                      attention_mask=embeds.mask)
    request = dataclasses.replace(REQUEST, consistency=0.0)  # fusing takes long and denoises nothing
    counted = count_run(made, request, tmp_path)["denoising steps"]
    assert counted == pytest.approx(counter.get_total_flops() / 1e9, rel=1e-3)  # the first step also lays out geometry


def test_training_counts_forward_and_backward():
    stage, figures = measure_training("tiny", CPU, torch.float32, steps=1)
    assert stage.calls == 1 and stage.gflop > 0
    assert figures["training, views a second"] == pytest.approx(4 / stage.seconds)


def test_matmul_rate_is_operations_over_seconds(monkeypatch):
    clock = iter(range(100))
    monkeypatch.setattr("coser.stopwatch.time.perf_counter", lambda: next(clock))  # a second between any two looks
    monkeypatch.setitem(PRODUCTS, "cpu", (100, 3))
    assert matmul_rate(CPU, torch.float32) == pytest.approx(3 * 2 * 100**3 / 1e12)


def test_the_page_is_timed_until_it_answers_and_then_ended(tmp_path, monkeypatch):
    (tmp_path / "app.py").write_text(
        "import http.server, sys\n"
        "open('started', 'w').write(' '.join(sys.argv[1:]))\n"
        "page = http.server.SimpleHTTPRequestHandler\n"
        "http.server.HTTPServer(('127.0.0.1', int(sys.argv[4])), page).serve_forever()\n")
    monkeypatch.setattr(benchmark, "ROOT", tmp_path)
    monkeypatch.chdir(tmp_path)
    processes = []

    def remembered(*arguments, **options):
        processes.append(fresh_process(*arguments, **options))
        return processes[-1]

    monkeypatch.setattr(benchmark, "fresh_process", remembered)
    assert time_app("some/checkpoint", "cpu") > 0
    assert (tmp_path / "started").read_text().startswith("--checkpoint some/checkpoint --port ")
    assert processes[0].poll() is not None
    (tmp_path / "app.py").write_text("raise SystemExit(3)\n")
    with pytest.raises(RuntimeError, match="app.py did not answer"):
        time_app("some/checkpoint", None)


def test_a_studio_starts_in_a_fresh_process(pipeline_folder):
    assert time_start(str(pipeline_folder), "cpu") > 0


def test_the_report_shows_every_figure_against_its_bar():
    figures = {"prompt to GLB, s": 30.0, "start to ready, s": 3.0, "peak memory, GiB": 2.0, "previews, share": 0.1}
    stages = [Stage("denoising steps", 20, 15.0, 3000.0, 7.0), Stage("grids", 3, 0.5)]
    report = Report({"device": "cpu"}, 100.0, figures, stages)
    lines = table(report).splitlines()
    whole = next(line for line in lines if "prompt to GLB" in line).split()
    assert whole == "prompt to GLB, s 30.00 <= 25 missed".split()
    assert sum(line.endswith(" met") for line in lines) == 3
    step = next(line for line in lines if "denoising" in line).split()
    assert step == "denoising steps 20 15.000 50.0% 3000.0 200 2.00 7".split()
    markdown = [line for line in table(report, markdown=True).splitlines() if line.startswith("|")]
    assert len({line.count("|") for line in markdown[:6]}) == 1 and markdown[1].startswith("|---|")


def test_the_command_writes_its_report_and_tells_in_its_exit_code_whether_all_bars_are_met(
        made, pipeline_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(benchmark, "time_app", lambda *args: 9.0)
    monkeypatch.setattr(benchmark, "matmul_rate", lambda *_: 0.1)
    monkeypatch.setattr(pipeline, "fused_steps", lambda total: set())  # what it takes is seen above
    command = ["--checkpoint", str(pipeline_folder), "--device", "cpu", "--num-views", "4", "--steps", "2",
               "--runs", "1", "--json", str(tmp_path / "report.json")]
    monkeypatch.setattr(benchmark, "BARS", dict.fromkeys(BARS, 1e9))
    monkeypatch.setattr(benchmark, "time_start", lambda *args: 5.0)
    assert main(command) == 0 and "met" in capsys.readouterr().out
    report = json.loads(Path(tmp_path / "report.json").read_text())
    assert report["matmul"] == pytest.approx(100) and set(BARS) <= set(report["figures"])
    assert next(s for s in report["stages"] if s["name"] == "denoising steps")["gflop"] > 0
    measured = Report(**report | {"stages": [Stage(**s) for s in report["stages"]]})
    monkeypatch.setattr(benchmark, "measure", lambda *args: measured)  # not again
    monkeypatch.setattr(benchmark, "BARS", dict.fromkeys(BARS, 0.0))
    assert main(command) == 1 and "missed" in capsys.readouterr().out
