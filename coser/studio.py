"""What app, command line and API do: a request, or views, become streamed view grids, a GLB and a run file."""

from __future__ import annotations

import json
import logging
import math
import platform
import re
import statistics
import time
from collections.abc import Callable, Iterator, Set
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import diffusers
import torch
import torch.nn.functional as F
from huggingface_hub import snapshot_download
from PIL import Image

from coser import __version__
from coser.cameras import Cameras
from coser.consistency import fused_views
from coser.devices import choose_device, choose_dtype
from coser.finishing import FinishedAsset, finish_asset
from coser.lane import Lane
from coser.models.ssm import scan_backend
from coser.own_views import PosedViews
from coser.pipeline import CoSERPipeline, MultiviewStep, fused_steps, step_order
from coser.reconstruction import Surface, SurfaceStep, stream_surface
from coser.reconstruction.exports import export
from coser.request import SYMMETRY, AssetOptions, GenerationRequest
from coser.scene_meshes import put_together
from coser.scene_prompts import LifeSizes, ScenePlan, scene_plan
from coser.views import ViewSet, picture_grid, views_to_uint8
from coser.vocabulary import load_vocabulary, sentence_embedder, usual_symmetries

log = logging.getLogger("coser")

SMALL = Path(__file__).parent / "checkpoints" / "small"
HUB_ID = r"[\w.-]+/[\w.-]+"
TILE = 256  # pixels a side of one view in the grid, so that previews and the result cover the same place on the screen
GRID_VIEWS = 24  # a grid of visitors' own views shows at most so many of them, spread evenly
LOOK_EVERY = 0.1  # seconds, while a run waits for those before it
SURFACE_SHARE = 0.6  # of what comes after the views: finding the surface; the rest is triangles, texture and files


@dataclass(frozen=True)
class RunUpdate:
    """One moment of a run.

    stage: "waiting", "denoising", "reconstructing", "done" or "stopped". step of total: denoising steps finished.
    percent: 0 to 100, of the time that the run takes. seconds_left: an estimate, None while there is nothing to
    estimate from. seed: None where nothing is drawn. picture: the grid of views so far, None before there are any.
    glb, run_file: paths, and asset, all set when "done". note: from when the run has its turn, what to tell the visitor
    about the prompt or the views; "" when there is nothing to say.
    """

    stage: str
    step: int
    total: int
    percent: int
    seconds_left: float | None
    seed: int | None
    message: str
    picture: Image.Image | None = None
    glb: Path | None = None
    run_file: Path | None = None
    asset: FinishedAsset | None = None
    note: str = ""

    def status(self) -> dict:
        """What a progress line shows, as plain JSON values."""
        left = None if self.seconds_left is None else round(self.seconds_left, 1)
        return {"stage": self.stage, "step": self.step, "total": self.total, "percent": self.percent,
                "seconds_left": left, "seed": self.seed, "message": self.message, "note": self.note}


def is_hub_id(checkpoint: str) -> bool:
    """Whether it names a repository of the hub: "owner/name" that is no place on this machine."""
    here = Path(checkpoint).exists() or Path(checkpoint).parent.is_dir()
    return bool(re.fullmatch(HUB_ID, checkpoint)) and not here


def checkpoint_folder(checkpoint: str) -> Path:
    """A pipeline's folder, downloaded where its hub id is given; ValueError when it is none.

    Downloaded by hand, since diffusers loads no pipeline from the hub that has classes of one's own.
    """
    folder = Path(snapshot_download(checkpoint)) if is_hub_id(checkpoint) else Path(checkpoint)
    if not (folder / "model_index.json").is_file():
        raise ValueError(f"checkpoint must be a folder with a model_index.json or a hub id, got {checkpoint}")
    return folder


class Studio:
    """One loaded pipeline and the lane that serialises its runs.

    checkpoint: a folder in diffusers layout, or the hub id of one, which is downloaded. device: "cpu", "cuda", ...;
    None takes CUDA where there is one. The first log line says what was decided and why. Any number of threads may
    start runs: they take turns in the order in which they came, since they share the weights and the processor, and
    nothing else is shared.
    """

    def __init__(self, checkpoint: str | Path = SMALL, device: str | None = None):
        began = time.perf_counter()
        self.device, device_reason = choose_device(device)
        self.dtype, dtype_reason = choose_dtype(self.device)
        self.checkpoint = str(checkpoint)
        checkpoint = checkpoint_folder(self.checkpoint)
        self.pipeline = CoSERPipeline.from_pretrained(checkpoint).to(self.device, self.dtype)
        embed = sentence_embedder(self.pipeline)
        self.vocabulary = load_vocabulary(checkpoint, embed)  # None: it has not been told
        self.life_sizes = LifeSizes(embed)
        self.symmetries = usual_symmetries(checkpoint, self.pipeline, self.vocabulary)
        self.lane = Lane()
        # what building the mesh took last time, and fusing views in a step; the first run's estimate starts from these
        self._finish_seconds, self._fuse_seconds = 4.0, 3.0
        source = "the shipped one" if checkpoint == SMALL else "as asked"
        scan = scan_backend(self.device)
        scan_reason = "mamba_ssm's kernels load" if scan == "triton" else "no CUDA with triton and mamba_ssm"
        log.info("device %s (%s), dtype %s (%s), scan %s (%s), checkpoint %s (%s), loaded in %.1f s",
                 self.device, device_reason, str(self.dtype).removeprefix("torch."), dtype_reason, scan, scan_reason,
                 self.checkpoint, source, time.perf_counter() - began)

    def generate(self, request: GenerationRequest, glb: Path, should_stop: Callable[[], bool] = lambda: False,
                 options: AssetOptions = AssetOptions()) -> Iterator[RunUpdate]:
        """Draw the views, build the mesh, write `glb` and, beside it, the views (.png) and the run's settings (.json).

        Yields an update at once, one with the starting noise, one after every denoising step, some while the mesh is
        built and one at the end. `should_stop` is asked between them; a stopped run ends with stage "stopped" and
        writes nothing. Several objects are drawn one after the other, each in as many steps, where the request says so.
        Raises ValueError when the views hold nothing that a mesh could be made of.
        """
        request = replace(request.with_drawn_seed(), mixers=self.mixers_for(request))
        plan = scene_plan(request.prompt) if request.one_by_one else None
        order, drawings = step_order(request.num_inference_steps, request.redraw), len(plan.objects) if plan else 1
        fuses = fused_steps(request.num_inference_steps) if request.consistency else set()
        fused = {i for i, step in enumerate(drawings * order) if step in fuses}
        run = _Run(drawings * len(order), self._finish_seconds, request.seed, fused, self._fuse_seconds)
        yield from self._in_turn(run, should_stop,
                                 lambda run: self._generate(run, request, plan, Path(glb), should_stop, options))

    def rebuild(self, posed: PosedViews, title: str, glb: Path, should_stop: Callable[[], bool] = lambda: False,
                options: AssetOptions = AssetOptions()) -> Iterator[RunUpdate]:
        """Build a mesh from one's own posed views; files, updates, stopping and errors as in `generate`.

        title: what the views are called in the files, such as the name of the folder that they came from.
        """
        yield from self._in_turn(_Run(0, self._finish_seconds, None), should_stop,
                                 lambda run: self._rebuild(run, posed, title, Path(glb), should_stop, options))

    def refine(self, asset: FinishedAsset, run_file: Path, glb: Path, should_stop: Callable[[], bool] = lambda: False,
               options: AssetOptions = AssetOptions()) -> Iterator[RunUpdate]:
        """Make an asset again with other options, from its surface and its views; `run_file` is what it came with.

        glb: where the new one goes, with its settings (.json) beside it.
        """
        yield from self._in_turn(_Run(0, self._finish_seconds, None), should_stop,
                                 lambda run: self._refine(run, asset, run_file, Path(glb), options))

    def _in_turn(self, run: "_Run", should_stop: Callable[[], bool],
                 work: Callable[["_Run"], Iterator[RunUpdate]]) -> Iterator[RunUpdate]:
        place = self.lane.enter()
        try:  # left however the run ends, also when the reader goes away in the middle
            ahead = None
            while ahead != 0:
                before, ahead = ahead, self.lane.ahead_of(place)
                if ahead != before:
                    yield run.update("waiting", f"Waiting for {ahead} other run{'s' * (ahead > 1)}" if ahead
                                     else "Starting")
                elif should_stop():
                    yield run.stopped()
                    return
                else:
                    time.sleep(LOOK_EVERY)
            run.start()
            if should_stop():  # asked while this run waited for its turn
                yield run.stopped()
            else:
                yield from work(run)
        finally:
            self.lane.leave(place)

    def _generate(self, run: "_Run", request: GenerationRequest, plan: ScenePlan | None, glb: Path,
                  should_stop: Callable[[], bool], options: AssetOptions) -> Iterator[RunUpdate]:
        run.note = self.vocabulary.nearest(request.prompt).note if self.vocabulary else ""
        run.picture = grid(self._starting_noise(request))
        yield run.update("denoising", "Starting from noise")
        requests = [replace(request, prompt=one.prompt) for one in plan.objects] if plan else [request]
        symmetries = [self.symmetry_for(one) for one in requests]
        drawn = []
        for one, symmetry in zip(requests, symmetries):
            what = f"{one.prompt} ({len(drawn) + 1} of {len(requests)})" if plan else "the views"
            for step in self._stream(one, symmetry):
                run.count(len(drawn) * step.total + step.index, grid(step.views))
                yield run.update("denoising", f"Drawing {what}, step {step.index} of {step.total}")
                if should_stop():
                    yield run.stopped()
                    return
            drawn.append((step.views, step.cameras))
        self._fuse_seconds = run.fuse_seconds
        record = {"title": request.prompt, "settings": asdict(request)}
        record |= {"scene": asdict(plan)} if plan else {"symmetries": list(symmetries[0])}
        record |= self._origin(with_model=True)
        if not plan:
            yield from self._build(run, stream_surface(*drawn[0], drawn=True), record, glb, should_stop, options)
            return
        began = time.perf_counter()
        yield run.update("reconstructing", "Putting the objects together")
        surface = put_together(plan, drawn, self.life_sizes.of)
        run.picture = grid(surface.views)
        if should_stop():
            yield run.stopped()
            return
        yield from self._finish(run, surface, record, glb, began, options)

    def _rebuild(self, run: "_Run", posed: PosedViews, title: str, glb: Path, should_stop: Callable[[], bool],
                 options: AssetOptions) -> Iterator[RunUpdate]:
        count = len(posed.views)
        run.note = " ".join(posed.notes)
        shown = torch.linspace(0, count - 1, min(count, GRID_VIEWS)).round().long()
        run.picture = grid(posed.views[shown])
        record = {"title": title, "own_views": {"count": count, "notes": list(posed.notes)}}
        steps = stream_surface(posed.views.to(self.device), posed.cameras.to(self.device), drawn=posed.drawn)
        yield from self._build(run, steps, record | self._origin(with_model=False), glb, should_stop, options)

    def _build(self, run: "_Run", steps: Iterator[SurfaceStep], record: dict, glb: Path,
               should_stop: Callable[[], bool], options: AssetOptions) -> Iterator[RunUpdate]:
        began = time.perf_counter()
        for step in steps:
            run.finished = SURFACE_SHARE * step.index / step.total
            yield run.update("reconstructing", step.message)
            if should_stop():
                yield run.stopped()
                return
        yield from self._finish(run, step.surface, record, glb, began, options)

    def _finish(self, run: "_Run", surface: Surface, record: dict, glb: Path, began: float,
                options: AssetOptions) -> Iterator[RunUpdate]:
        run.finished = SURFACE_SHARE
        yield run.update("reconstructing", "Making triangles and colours")
        asset = finish_asset(surface, options)
        record |= {"seconds": {"steps": [round(s, 3) for s in run.step_seconds],
                               "reconstruct": round(time.perf_counter() - began, 3)}}
        glb.parent.mkdir(parents=True, exist_ok=True)
        done = self._done(run, asset, record, glb)
        run.picture.save(glb.with_suffix(".png"))  # not before there is a model that it belongs to
        yield done
        self._finish_seconds = time.perf_counter() - began

    def _refine(self, run: "_Run", asset: FinishedAsset, run_file: Path, glb: Path,
                options: AssetOptions) -> Iterator[RunUpdate]:
        run.finished = SURFACE_SHARE
        yield run.update("reconstructing", "Making triangles and colours from the same views")
        record = json.loads(run_file.read_text("utf-8"))
        yield self._done(run, finish_asset(asset.surface, options), record, glb)

    def _done(self, run: "_Run", asset: FinishedAsset, record: dict, glb: Path) -> RunUpdate:
        seconds = time.perf_counter() - run.began
        mesh = asset.mesh
        record["seconds"]["total"] = round(seconds, 3)
        record |= {"asset": asdict(asset.options), "placement": {"scale": asset.scale, "offset": list(asset.offset)},
                   "mesh": {"vertices": len(mesh.vertices), "faces": len(mesh.faces),
                            "texture": 0 if mesh.texture is None else len(mesh.texture)}}
        told = ("title", "settings", "scene", "own_views", "asset", "placement", "versions")
        extras = {key: record[key] for key in told if key in record}
        if "settings" in record:
            settings = record["settings"]
            extras |= {"prompt": settings["prompt"], "seed": settings["seed"],
                       "checkpoint": Path(record["checkpoint"]).name}
        export("glb", mesh, None, None, glb, extras=extras)
        run_file = glb.with_suffix(".json")
        run_file.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        seed = "" if run.seed is None else f", seed {run.seed}"
        painted = "colours at the vertices" if mesh.texture is None else f"texture of {len(mesh.texture)} pixels"
        apart = ", objects drawn one by one" if "scene" in record else ""
        alike = alike_sides(tuple(record.get("symmetries", ())))
        message = f"Done in {seconds:.0f} s: {len(mesh.faces):,} triangles, {painted}{seed}{apart}{alike}"
        return replace(run.update("done", message), percent=100, seconds_left=0.0, glb=glb, run_file=run_file,
                       asset=asset)

    def _origin(self, with_model: bool) -> dict:
        """What a run file says about what made it."""
        versions = {"coser": __version__, "torch": torch.__version__, "diffusers": diffusers.__version__,
                    "python": platform.python_version()}
        model = {"checkpoint": self.checkpoint, "dtype": str(self.dtype).removeprefix("torch.")} if with_model else {}
        return {"versions": versions, "device": str(self.device)} | model

    def _starting_noise(self, request: GenerationRequest) -> ViewSet:
        """What the noise that the run starts from looks like: on the screen before the first step is done."""
        with torch.no_grad():
            latents = self.pipeline.prepare_latents(request.num_views, generator_of(request))
            return self.pipeline.latents_to_views(latents, preview=True)

    def _stream(self, request: GenerationRequest, symmetry: tuple[str, ...]) -> Iterator[MultiviewStep]:
        return self.pipeline.stream(
            request.prompt, num_views=request.num_views, elevation=request.elevation,
            guidance_scale=request.guidance_scale, guidance_rescale=request.guidance_rescale,
            skip_guidance_scale=request.skip_guidance_scale, num_inference_steps=request.num_inference_steps,
            negative_prompt=request.negative_prompt, generator=generator_of(request), consistency=request.consistency,
            redraw=request.redraw, fuse=fused_views, mixers=request.mixers, symmetry=symmetry)

    @property
    def mixers(self) -> tuple[str, ...]:
        """The modules between views that the checkpoint has."""
        return tuple(self.pipeline.unet.config.mixers)

    def mixers_for(self, request: GenerationRequest) -> tuple[str, ...]:
        """Those of them that work where `request` is drawn; ValueError when it asks for others alone."""
        working = tuple(name for name in self.mixers if request.mixers is None or name in request.mixers)
        if request.mixers and not working:
            raise ValueError(f"mixers must be of those that the checkpoint has, {', '.join(self.mixers)}, got "
                             f"{', '.join(request.mixers)}")
        return working

    def symmetry_for(self, request: GenerationRequest) -> tuple[str, ...]:
        """What symmetries the object of `request` is drawn with."""
        chosen = SYMMETRY[request.symmetry]
        return self.symmetries.of_prompt(request.prompt) if chosen is None else chosen


class _Run:
    """The clock of one run: which step it is at, what steps take, what is left.

    total: denoising steps to come. finish_seconds: what building the mesh will take, as far as is known. fused: indices
    of the steps that also fuse the views, which takes fuse_seconds more, as far as is known.
    """

    def __init__(self, total: int, finish_seconds: float, seed: int | None, fused: Set[int] = frozenset(),
                 fuse_seconds: float = 0.0):
        self.total, self.finish_seconds, self.seed = total, finish_seconds, seed
        self.fused, self.fuse_seconds = fused, fuse_seconds
        self.step = self.percent = 0
        self.finished = 0.0  # of building the mesh, 0 to 1
        self.picture: Image.Image | None = None
        self.note = ""
        self.step_seconds: list[float] = []
        self.began = self.mark = time.perf_counter()

    def count(self, step: int, picture: Image.Image) -> None:
        """So many steps are done, which look like this."""
        now = time.perf_counter()
        self.step, self.picture = step, picture
        self.step_seconds.append(now - self.mark)
        self.mark = now
        if step - 1 in self.fused and len(self.step_seconds) > len(self.fused):  # others tell what it takes more
            self.fuse_seconds = max(0.0, self.step_seconds[-1] - self._steady_seconds())

    def start(self) -> None:
        """The run has its turn: what it waited for is not counted."""
        self.began = self.mark = time.perf_counter()

    def update(self, stage: str, message: str) -> RunUpdate:
        left, passed = None, time.perf_counter() - self.began
        if self.step_seconds:
            left = (self._steady_seconds() * (self.total - self.step) + self.finish_seconds * (1 - self.finished)
                    + self.fuse_seconds * sum(index >= self.step for index in self.fused))
        elif self.finished:  # views that were there: what has passed tells what is left
            left = passed * (1 - self.finished) / self.finished
        if left is not None:  # a share of the time, not of the steps, of which the last take longest; never backwards
            self.percent = max(self.percent, min(99, math.floor(100 * passed / max(passed + left, 1e-9))))
        return RunUpdate(stage, self.step, self.total, self.percent, left, self.seed, message, self.picture,
                         note=self.note)

    def _steady_seconds(self) -> float:
        """What a step takes that does nothing but denoise."""
        plain = [seconds for i, seconds in enumerate(self.step_seconds) if i not in self.fused]
        # the first also pays for the text and for warming up
        return statistics.median(plain[1:] or plain or self.step_seconds)

    def stopped(self) -> RunUpdate:
        if self.total:
            where = f"Stopped at step {self.step} of {self.total}."
            kept = "The last views stay; no model was made." if self.step else "Nothing was drawn yet."
        else:
            where, kept = "Stopped.", "No new model was made."
        return replace(self.update("stopped", f"{where} {kept}"), seconds_left=None)


def alike_sides(symmetries: tuple[str, ...]) -> str:
    """What a message adds about an object's symmetries; "" where there is none."""
    for name, sides in (("round", "all sides"), ("quarter", "four sides")):  # each has the ones below it
        if name in symmetries:
            return f", {sides} alike"
    sides = [sides for name, sides in (("mirror", "left and right"), ("back", "front and back")) if name in symmetries]
    return f", {', '.join(sides)} alike" if sides else ""


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
