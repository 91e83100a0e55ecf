"""What the app, the command line and the API do: one request becomes streamed view grids, a GLB and a run file."""

from __future__ import annotations

import json
import logging
import math
import platform
import re
import shutil
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from hashlib import sha256
from pathlib import Path

import diffusers
import torch
import torch.nn.functional as F
from PIL import Image

from coser import __version__
from coser.consistency import fused_views
from coser.models.ssm import scan_backend
from coser.pipeline import CoSERPipeline, MultiviewStep
from coser.reconstruction import Mesh, reconstruct, save_glb
from coser.request import GenerationRequest
from coser.views import ViewSet, picture_grid, views_to_uint8
from coser.vocabulary import load_vocabulary, sentence_embedder

log = logging.getLogger("coser")

SMALL = Path(__file__).parent / "checkpoints" / "small"
HUB_ID = r"[\w.-]+/[\w.-]+"
KEPT_SECONDS = 4 * 3600  # how long a visitor's files lie ready: a page may stay open for days
TILE = 256  # pixels a side of one view in the grid, so that previews and the result cover the same place on the screen


@dataclass(frozen=True)
class GenerationUpdate:
    """One moment of a run.

    stage: "waiting", "denoising", "reconstructing", "done" or "stopped". step of total: denoising steps finished.
    percent: 0 to 100 of the whole run. seconds_left: an estimate, None while there is nothing to estimate from.
    picture: the grid of views so far, None before the first step. glb, run_file: paths, set when "done".
    note: from when the run has its turn, what to tell the visitor about the prompt; "" when there is nothing to say.
    """

    stage: str
    step: int
    total: int
    percent: int
    seconds_left: float | None
    seed: int
    message: str
    picture: Image.Image | None = None
    glb: Path | None = None
    run_file: Path | None = None
    note: str = ""

    def status(self) -> dict:
        """What a progress line shows, as plain JSON values."""
        left = None if self.seconds_left is None else round(self.seconds_left, 1)
        return {"stage": self.stage, "step": self.step, "total": self.total, "percent": self.percent,
                "seconds_left": left, "seed": self.seed, "message": self.message, "note": self.note}


class Studio:
    """One loaded pipeline and the lane that serialises its runs.

    checkpoint: a folder in diffusers layout (or a hub id). device: "cpu", "cuda", ...; None takes CUDA where there is
    one. The first log line says what was decided and why. Any number of threads may call `generate`: runs wait for
    each other, since they share the weights and the processor, and nothing else is shared.
    """

    def __init__(self, checkpoint: str | Path = SMALL, device: str | None = None):
        began = time.perf_counter()
        self.device, device_reason = choose_device(device)
        self.dtype, dtype_reason = choose_dtype(self.device)
        self.checkpoint = str(checkpoint)
        if not (Path(checkpoint) / "model_index.json").is_file() and not re.fullmatch(HUB_ID, str(checkpoint)):
            raise ValueError(f"checkpoint must be a folder with a model_index.json or a hub id, got {checkpoint}")
        self.pipeline = CoSERPipeline.from_pretrained(checkpoint).to(self.device, self.dtype)
        self.vocabulary = load_vocabulary(checkpoint, sentence_embedder(self.pipeline))  # None: it has not been told
        self.lane = threading.Lock()
        self._finish_seconds = 2.0  # what reconstruction took last time; the first run's estimate starts from this
        source = "the shipped one" if Path(checkpoint) == SMALL else "as asked"
        scan = scan_backend(self.device)
        scan_reason = "mamba_ssm's kernels load" if scan == "triton" else "no CUDA with triton and mamba_ssm"
        log.info("device %s (%s), dtype %s (%s), scan %s (%s), checkpoint %s (%s), loaded in %.1f s",
                 self.device, device_reason, str(self.dtype).removeprefix("torch."), dtype_reason, scan, scan_reason,
                 checkpoint, source, time.perf_counter() - began)

    def generate(self, request: GenerationRequest, glb: Path, should_stop: Callable[[], bool] = lambda: False,
                 **options: int) -> Iterator[GenerationUpdate]:
        """Draw the views, build the mesh, write `glb` and, beside it, the views (.png) and the run's settings (.json).

        Yields an update at once, one with the starting noise, one after every denoising step, one when reconstruction
        starts and one at the end.
        `should_stop` is asked between steps; a stopped run ends with stage "stopped" and writes nothing. `options` go
        to `reconstruct`. Raises ValueError when the views hold nothing that a mesh could be made of.
        """
        run = _Run(request.with_drawn_seed(), self._finish_seconds)
        yield run.update("waiting", "Waiting for the run before this one" if self.lane.locked() else "Starting")
        while not self.lane.acquire(timeout=0.2):
            if should_stop():
                yield run.stopped()
                return
        try:  # released however the run ends, also when the reader goes away in the middle
            yield from self._generate(run, Path(glb), should_stop, options)
        finally:
            self.lane.release()

    def _generate(self, run: "_Run", glb: Path, should_stop: Callable[[], bool],
                  options: dict[str, int]) -> Iterator[GenerationUpdate]:
        if should_stop():  # asked while this run waited for its turn
            yield run.stopped()
            return
        last = None
        run.note = self.vocabulary.nearest(run.request.prompt).note if self.vocabulary else ""
        run.picture = grid(self._starting_noise(run.request))
        yield run.update("denoising", "Starting from noise")
        for step in self._stream(run.request):
            last = step
            run.count(step, grid(step.views))
            yield run.update("denoising", f"Drawing the views, step {step.index} of {step.total}")
            if should_stop():
                yield run.stopped()
                return
        yield run.update("reconstructing", "Building the mesh from the views")
        began = time.perf_counter()
        mesh = reconstruct(last.views, last.cameras, **options)
        run_file = self._write(run, mesh, last.views, glb, time.perf_counter() - began)
        self._finish_seconds = time.perf_counter() - began
        seconds = time.perf_counter() - run.began
        message = f"Done in {seconds:.0f} s: {len(mesh.faces):,} triangles, seed {run.request.seed}"
        yield replace(run.update("done", message), percent=100, seconds_left=0.0, glb=glb, run_file=run_file)

    def _starting_noise(self, request: GenerationRequest) -> ViewSet:
        """What the noise that the run starts from looks like: on the screen before the first step is done."""
        with torch.no_grad():
            latents = self.pipeline.prepare_latents(request.num_views, generator_of(request))
            return self.pipeline.latents_to_views(latents, preview=True)

    def _stream(self, request: GenerationRequest) -> Iterator[MultiviewStep]:
        return self.pipeline.stream(
            request.prompt, num_views=request.num_views, elevation=request.elevation,
            guidance_scale=request.guidance_scale, num_inference_steps=request.num_inference_steps,
            negative_prompt=request.negative_prompt, generator=generator_of(request), consistency=request.consistency,
            fuse=fused_views)

    def _write(self, run: "_Run", mesh: Mesh, views: ViewSet, glb: Path, reconstruct_seconds: float) -> Path:
        settings = asdict(run.request)
        versions = {"coser": __version__, "torch": torch.__version__, "diffusers": diffusers.__version__,
                    "python": platform.python_version()}
        glb.parent.mkdir(parents=True, exist_ok=True)
        save_glb(mesh, glb, extras={"prompt": run.request.prompt, "seed": run.request.seed, "settings": settings,
                                    "versions": versions, "checkpoint": Path(self.checkpoint).name})
        grid(views).save(glb.with_suffix(".png"))
        record = {
            "settings": settings, "versions": versions, "checkpoint": self.checkpoint, "device": str(self.device),
            "dtype": str(self.dtype).removeprefix("torch."),
            "seconds": {"steps": [round(s, 3) for s in run.step_seconds], "reconstruct": round(reconstruct_seconds, 3),
                        "total": round(time.perf_counter() - run.began, 3)},
            "mesh": {"vertices": len(mesh.vertices), "faces": len(mesh.faces)},
        }
        run_file = glb.with_suffix(".json")
        run_file.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        return run_file


class _Run:
    """The clock of one run: which step it is at, what steps take, what is left."""

    def __init__(self, request: GenerationRequest, finish_seconds: float):
        self.request, self.finish_seconds = request, finish_seconds
        self.step = 0
        self.picture: Image.Image | None = None
        self.note = ""
        self.step_seconds: list[float] = []
        self.began = self.mark = time.perf_counter()

    def count(self, step: MultiviewStep, picture: Image.Image) -> None:
        now = time.perf_counter()
        self.step, self.picture = step.index, picture
        self.step_seconds.append(now - self.mark)
        self.mark = now

    def update(self, stage: str, message: str) -> GenerationUpdate:
        total = self.request.num_inference_steps
        left = None
        if self.step_seconds:
            steady = self.step_seconds[1:] or self.step_seconds  # the first also pays for the text and for warming up
            left = statistics.median(steady) * (total - self.step) + self.finish_seconds
        percent = math.floor(100 * self.step / (total + 1))  # the mesh counts as one step more
        return GenerationUpdate(stage, self.step, total, percent, left, self.request.seed, message,
                                self.picture, note=self.note)

    def stopped(self) -> GenerationUpdate:
        total = self.request.num_inference_steps
        kept = "The last views stay; no model was made." if self.step else "Nothing was drawn yet."
        update = self.update("stopped", f"Stopped at step {self.step} of {total}. {kept}")
        return replace(update, seconds_left=None)


def generator_of(request: GenerationRequest) -> torch.Generator:
    """The request's own source of noise; on the CPU, so that a seed means the same noise on every device."""
    return torch.Generator("cpu").manual_seed(request.seed)


def grid(views: ViewSet) -> Image.Image:
    """ViewSet => one picture of all views on white, TILE pixels a view whatever the views' own size."""
    if views.views.shape[-1] != TILE:
        views = ViewSet(*(F.interpolate(t.float(), (TILE, TILE), mode="bilinear")
                          for t in (views.views, views.masks, views.depths)))
    return picture_grid(views_to_uint8(views))


def log_to_terminal() -> None:
    """For entry points: our own lines on stderr, and of the libraries only what is wrong."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    log.setLevel(logging.INFO)
    diffusers.utils.logging.set_verbosity_error()
    diffusers.utils.logging.disable_progress_bar()


def choose_device(device: str | None) -> tuple[torch.device, str]:
    """The device to run on and why; ValueError when CUDA is asked for and missing."""
    if device is None:
        found = torch.cuda.is_available()
        return torch.device("cuda" if found else "cpu"), "CUDA found" if found else "no CUDA here"
    if torch.device(device).type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device must be one that this machine has, got {device!r} without CUDA; cpu is allowed")
    return torch.device(device), "as asked"


def choose_dtype(device: torch.device) -> tuple[torch.dtype, str]:
    """The weights' dtype on a device and why: bfloat16 where it is the quick one, else float32."""
    if device.type == "cuda":
        return torch.bfloat16, "CUDA"
    if device.type == "cpu" and torch.cpu._is_amx_tile_supported():
        return torch.bfloat16, "the processor has AMX"
    return torch.float32, "no quick bfloat16 here"


def file_name(prompt: str, seed: int) -> str:
    """A GLB's name that a person recognises in a downloads folder: "a-red-barrel-7.glb"."""
    words = re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:40].strip("-")
    return f"{words or 'asset'}-{seed}.glb"


def session_folder(root: Path, session: str) -> Path:
    """One visitor's folder under `root`, made when missing; named by a hash, for session names come from outside."""
    folder = root / sha256(session.encode()).hexdigest()[:16]
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def run_folder(session: Path) -> Path:
    """A new folder for one run of a session."""
    return Path(tempfile.mkdtemp(prefix="run-", dir=session))


def remove_old_runs(root: Path, seconds: float = KEPT_SECONDS) -> None:
    """Delete the runs, of all sessions under `root`, that are older than `seconds`."""
    for folder in root.glob("*/run-*"):
        if time.time() - folder.stat().st_mtime > seconds:
            shutil.rmtree(folder, ignore_errors=True)
