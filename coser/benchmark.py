"""Measures the product's speed and memory, stage by stage: python -m coser.benchmark.

The seconds are those of one real run through the Studio, in which the functions that make up the stages are watched;
the stages' floating point operations are counted afterwards, outside the timing. Matrix products, convolutions and
attention count; the Triton scan on CUDA is a custom kernel, which the counter does not see.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from coser import consistency, finishing, reconstruction, studio, train_denoiser
from coser.cameras import Cameras
from coser.data.dataset import RingBatch
from coser.devices import choose_device, choose_dtype
from coser.flow import flow_loss
from coser.models.unet import MultiviewUNet
from coser.optimizer import MasterOptimizer
from coser.pipeline import CoSERPipeline, PromptEmbeds
from coser.request import GenerationRequest
from coser.stopwatch import Stage, Watch, flop_counter, matmul_rate, peak_memory, synchronize
from coser.studio import SMALL, Studio, log_to_terminal

BARS = {"prompt to GLB, s": 25.0, "start to ready, s": 12.0, "peak memory, GiB": 4.0, "previews, share": 0.15}
PROMPT = "a red barrel"
PREVIEWS = ("previews", "grids")  # what showing the steps costs
ROOT = Path(__file__).parent.parent


@dataclass(frozen=True)
class Report:
    """What was measured. matmul: GFLOP/s of a plain fp32 product. figures: name => value, some of which have bars."""

    machine: dict[str, str | int]
    matmul: float
    figures: dict[str, float]
    stages: list[Stage] = field(default_factory=list)


def watch_run(watch: Watch, pipeline: CoSERPipeline) -> None:
    """The stages of a run, in their order."""
    watch.add(pipeline, "encode_prompt", "prompt encoding")
    watch.add(pipeline, "_predict", "denoising steps")
    watch.add(pipeline.scheduler, "step", "solver")
    watch.add(pipeline.vae, "latents_to_preview", "previews")
    watch.add(studio, "grid", "grids")
    watch.add(pipeline.vae, "latents_to_views", "decoding")
    watch.add(pipeline.vae, "views_to_latents", "encoding")
    watch.add(consistency, "render_mesh", "rendering")
    watch.add(reconstruction, "fuse", "fusing")
    watch.add(reconstruction, "fuse_consensus", "consensus fusing")
    watch.add(reconstruction, "silhouette_likeness", "checking the fit")
    watch.add(reconstruction, "keep_parts", "simplifying")
    watch.add(reconstruction, "simplify", "simplifying")
    watch.add(reconstruction, "color_vertices", "colouring")
    watch.add(reconstruction, "with_normals", "normals")
    watch.add(reconstruction, "bake_texture", "unwrapping and texture")
    watch.add(finishing, "place", "placing")
    watch.add(studio, "export", "GLB writing and checking")


def time_run(made: Studio, request: GenerationRequest, folder: Path) -> tuple[float, dict[str, Stage]]:
    """One run of the Studio: seconds from prompt to GLB, and its stages; "the rest" is what no stage explains."""
    with Watch(made.device) as watch:
        watch_run(watch, made.pipeline)
        began = time.perf_counter()
        for _ in made.generate(request, folder / "benchmark.glb"):
            pass
        seconds = time.perf_counter() - began
    rest = seconds - sum(stage.seconds for stage in watch.stages.values())
    return seconds, watch.stages | {"the rest": Stage("the rest", 1, rest)}


def count_run(made: Studio, request: GenerationRequest, folder: Path) -> dict[str, float]:
    """GFLOP a call of every stage that computes on tensors, from a run of three steps."""
    short = GenerationRequest(**asdict(request) | {"num_inference_steps": min(3, request.num_inference_steps)})
    with flop_counter() as counter, Watch(made.device, counter) as watch:
        watch_run(watch, made.pipeline)
        with contextlib.suppress(ValueError):  # three steps may draw nothing that a mesh could be made of
            for _ in made.generate(short, folder / "benchmark.glb"):
                pass
    return {name: stage.gflop / stage.calls for name, stage in watch.stages.items() if stage.calls}


def fresh_process(arguments: list[str], **options) -> subprocess.Popen:
    """A Python process of its own, with as many threads as this one."""
    environment = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return subprocess.Popen([sys.executable, *arguments], env=environment, **options)


def time_start(checkpoint: str, device: str | None) -> float:
    """Seconds from a fresh process to a Studio that is ready."""
    code = (f"from coser.studio import Studio, log_to_terminal; log_to_terminal(); Studio({checkpoint!r}, {device!r}); "
            "print('ready', flush=True)")
    began = time.perf_counter()
    with fresh_process(["-c", code], stdout=subprocess.PIPE, text=True) as process:
        line = process.stdout.readline()
        seconds = time.perf_counter() - began
    if line != "ready\n":
        raise ValueError(f"checkpoint must be one that a Studio can start with, got {checkpoint}")
    return seconds


def time_app(checkpoint: str, device: str | None, longest: float = 300.0) -> float:
    """Seconds from `python app.py` to the page's first answer over HTTP."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    arguments = [str(ROOT / "app.py"), "--checkpoint", checkpoint, "--port", str(port)]
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    began = time.perf_counter()
    process = fresh_process(arguments + (["--device", device] if device else []), stdout=subprocess.DEVNULL,
                            stderr=subprocess.DEVNULL)
    try:
        while time.perf_counter() - began < longest and process.poll() is None:
            with contextlib.suppress(urllib.error.URLError, ConnectionError):
                opener.open(f"http://127.0.0.1:{port}/", timeout=5).close()
                return time.perf_counter() - began
            time.sleep(0.02)
        raise RuntimeError(f"app.py did not answer on port {port}; run it by itself to see why")
    finally:
        process.terminate()
        process.wait()


def measure(checkpoint: str, device: str | None, num_views: int, steps: int, runs: int) -> Report:
    """The whole report: starts in fresh processes, then `runs` runs here.

    Of the stages, the last run's seconds are told, and the growth of the peak memory over all runs.
    """
    request = GenerationRequest(prompt=PROMPT, num_views=num_views, num_inference_steps=steps)
    figures = {"start to ready, s": time_start(checkpoint, device), "start to page, s": time_app(checkpoint, device)}
    made = Studio(checkpoint, device)
    with tempfile.TemporaryDirectory(prefix="coser-") as folder:
        seconds, stages = time_run(made, request, Path(folder))
        figures["first prompt to GLB, s"] = figures["prompt to GLB, s"] = seconds
        for _ in range(runs - 1):
            before = stages
            figures["prompt to GLB, s"], stages = time_run(made, request, Path(folder))
            for name, stage in stages.items():
                stage.growth += before[name].growth
        figures["peak memory, GiB"] = peak_memory()
        if made.device.type == "cuda":
            figures["peak GPU memory, GiB"] = torch.cuda.max_memory_allocated(made.device) / 2**30
        gflop = count_run(made, request, Path(folder))
    for name, stage in stages.items():
        stage.gflop = gflop.get(name, 0.0) * stage.calls
    figures["previews, share"] = sum(stages[name].seconds for name in PREVIEWS) / figures["prompt to GLB, s"]
    return Report(machine(made), 1000 * matmul_rate(made.device, torch.float32), figures, list(stages.values()))


def machine(made: Studio) -> dict[str, str | int]:
    return {"device": torch.cuda.get_device_name(made.device) if made.device.type == "cuda" else str(made.device),
            "threads": torch.get_num_threads(), "dtype": str(made.dtype).removeprefix("torch."),
            "torch": torch.__version__, "checkpoint": Path(made.checkpoint).name}


def measure_training(preset: str, device: torch.device, dtype: torch.dtype,
                     steps: int = 5) -> tuple[Stage, dict[str, float]]:
    """The denoiser's training step on random latents of 12-view rings: its stage, and views and GFLOP a second.

    A step is what coser.train_denoiser does: loss, gradients, optimiser; batches are made beforehand.
    """
    sizes = train_denoiser.PRESETS[preset]
    unet = MultiviewUNet(**sizes["model"]).to(device, dtype, memory_format=torch.channels_last)
    optimizer = MasterOptimizer(unet, lr=1e-4)
    num_views = max(sizes["view_counts"])
    rings = max(1, sizes["views_per_batch"] // num_views)
    config = unet.unet2d.config
    latents = torch.randn(rings, num_views, config.in_channels, config.sample_size, config.sample_size)
    batch = RingBatch(latents, Cameras.orbit(num_views), [PROMPT] * rings)
    states = torch.randn(rings, 16, config.cross_attention_dim, device=device).to(dtype)
    embeds = PromptEmbeds(states, torch.ones(rings, 16, dtype=torch.bool, device=device), states.mean(1))

    def step() -> None:
        flow_loss(unet, batch, embeds, torch.Generator().manual_seed(0)).backward()
        optimizer.step()

    with flop_counter() as counter:  # also the warm-up
        step()
    stage = Stage("training step", steps, gflop=counter.get_total_flops() / 1e9 * steps)
    synchronize(device)
    began = time.perf_counter()
    for _ in range(steps):
        step()
    synchronize(device)
    stage.seconds = time.perf_counter() - began
    return stage, {"training, views a second": rings * num_views * steps / stage.seconds}


def table(report: Report, markdown: bool = False) -> str:
    """The report as text: machine, figures with their bars, and a line a stage."""
    lines = ["  ".join(f"{name} {value}" for name, value in report.machine.items()),
             f"plain fp32 matrix product: {report.matmul:.0f} GFLOP/s", ""]
    rows = [["figure", "measured", "bar", ""]]
    for name, value in report.figures.items():
        bar = BARS.get(name)
        rows.append([name, f"{value:.2f}", "" if bar is None else f"<= {bar:g}",
                     "" if bar is None else "met" if value <= bar else "missed"])
    lines += aligned(rows, markdown) + [""]
    rows = [["stage", "calls", "seconds", "share", "GFLOP", "GFLOP/s", "of matmul", "peak grew, MiB"]]
    whole = report.figures["prompt to GLB, s"]
    for stage in report.stages:
        rate = stage.gflop / max(stage.seconds, 1e-9)
        share = f"{stage.seconds / whole:.1%}" if stage.name != "training step" else "-"
        computed = [f"{stage.gflop:.1f}", f"{rate:.0f}", f"{rate / report.matmul:.2f}"]
        rows.append([stage.name, str(stage.calls), f"{stage.seconds:.3f}", share,
                     *(computed if stage.gflop > 0.05 else ["-"] * 3), f"{stage.growth:.0f}"])
    return "\n".join(lines + aligned(rows, markdown))


def aligned(rows: list[list[str]], markdown: bool) -> list[str]:
    """Rows as lines with columns that stand below one another; the first row is the heading."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    cells = [[row[0].ljust(widths[0])] + [c.rjust(w) for c, w in zip(row[1:], widths[1:])] for row in rows]
    if not markdown:
        return ["  ".join(row).rstrip() for row in cells]
    lines = ["| " + " | ".join(row) + " |" for row in cells]
    return lines[:1] + ["|" + "|".join(["---"] + ["--:"] * (len(widths) - 1)) + "|"] + lines[1:]


def main(argv: list[str] | None = None) -> int:
    """Measure, print, and say in the exit code whether every bar is met (0) or not (1)."""
    parser = argparse.ArgumentParser(prog="python -m coser.benchmark", description=__doc__.split("\n")[0])
    parser.add_argument("--checkpoint", default=str(SMALL), help="a folder in diffusers layout (the shipped one)")
    parser.add_argument("--device", help="cpu or cuda (default: cuda where there is one)")
    parser.add_argument("--num-views", type=int, default=12)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--runs", type=int, default=2, help="runs in one process; the last one's stages are shown")
    parser.add_argument("--threads", type=int, help="processor threads (default: torch's own choice)")
    parser.add_argument("--training", action="store_true", help="measure the denoiser's training step, too")
    parser.add_argument("--preset", default="small", choices=sorted(train_denoiser.PRESETS), help="whose training step")
    parser.add_argument("--json", type=Path, help="file for the whole report")
    parser.add_argument("--markdown", action="store_true", help="print Markdown tables")
    args = parser.parse_args(argv)
    log_to_terminal()
    if args.threads:
        torch.set_num_threads(args.threads)
    try:
        report = measure(args.checkpoint, args.device, args.num_views, args.steps, args.runs)
    except ValueError as error:
        parser.exit(2, f"coser.benchmark: {error}\n")
    if args.training:
        device = choose_device(args.device)[0]
        stage, figures = measure_training(args.preset, device, choose_dtype(device)[0])
        report.stages.append(stage)
        report.figures.update(figures)
    print(table(report, args.markdown))
    if args.json:
        args.json.write_text(json.dumps(asdict(report), indent=2) + "\n", encoding="utf-8")
    return int(any(report.figures[name] > bar for name, bar in BARS.items()))


if __name__ == "__main__":
    sys.exit(main())
