"""The whole recipe in one command and one time budget: assets => renders, autoencoder, latents, denoiser, shards.

`python -m coser.train all --assets ASSETS --run NAME --minutes 28`. What the next budget needs lies in `runs/<name>/`:
`renders/` (elsewhere with --renders, see `coser.recipe_renders`), `autoencoder/` and `denoiser/` (runs as of
`coser.train`), `pipeline/` and `shards/` (what was learnt, see `coser.shards`), and `recipe.json`: for each stage
whether it is finished, its seconds and its figures. The same command again, here or on a copy elsewhere, skips what is
finished, resumes what is not from its last checkpoint, and goes on training the denoiser.

Every stage looks at the clock and stops itself; what a stage does between two looks (loading a model, drawing one
prompt, one step) may pass the end of a budget, so a budget of few minutes on a busy machine can be overrun.

On CUDA the autoencoder starts on the first rings while processes on the CPU render the rest. On a CPU the stages run
one after another: two jobs on two cores take far longer than one after the other.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import shlex
import shutil
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from coser import train_autoencoder, train_denoiser
from coser.background import Background
from coser.caption_states import captions_of, encode_captions
from coser.consistency import CONSISTENCY, fused_views
from coser.data.dataset import Ring, held_out_views, list_rings
from coser.devices import add_dtype_option
from coser.evaluate_prompts import evaluate_prompts
from coser.latents import same_weights, weights_hash
from coser.pipeline import GUIDANCE_RESCALE, CoSERPipeline
from coser.questions import read_prompts
from coser.recipe_record import Record, training_figures
from coser.recipe_renders import RecipeRenders
from coser.shards import TRAINING_STATE, read_shards, write_shards
from coser.train_autoencoder import autoencoder_figures, reconstruct_views
from coser.train_loop import Budget, Options, checkpoints

VERB = "all"
# At most these shares of the budget; the denoiser gets what is left.
RENDER_SHARE, AUTOENCODER_SHARE, LATENTS_SHARE = 0.3, 0.25, 0.25
EVALUATION_SHARE = 0.08  # kept for evaluation and shards until a session has measured how long they take
MOST_EVALUATION_SHARE, EVALUATION_MARGIN = 0.25, 1.25
START_AND_EXIT = 20.0  # seconds that Python takes outside of `run`, at most
CHECKPOINTS = 8  # a budget, each with an evaluation
NEVER = 1_000_000_000  # steps: checkpoints go by the clock
FIRST_RINGS = 100  # enough for the autoencoder's first steps
RELIST_EVERY = 50  # steps; the rings rendered meanwhile join
WAIT = 0.1  # seconds between two looks at what is being rendered
# Not tried on any GPU yet: batches large enough that launching kernels is not what takes the time.
GPU_ARGUMENTS = {"autoencoder": "--batch-size 128 --data-on-device --compile",
                 "denoiser": "--views-per-batch 1536 --data-on-device --compile"}
PROMPT_SECONDS = {"cpu": 60.0, "cuda": 15.0}  # the first prompt is drawn only where so many are left
PROMPTS = Path(__file__).parent.parent / "examples" / "prompts.txt"
DRAWING = dict(num_views=12, num_inference_steps=20, guidance_scale=4.0, guidance_rescale=GUIDANCE_RESCALE,
               consistency=CONSISTENCY, fuse=fused_views)

Parse = Callable[[list[str]], tuple[argparse.Namespace, Options]]


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--assets", type=Path, required=True, help="packed folder, or GLB, glTF or OBJ files")
    parser.add_argument("--run", type=Path, required=True, help="name below runs/, or a path")
    parser.add_argument("--minutes", type=float, required=True, help="all of it ends within so many minutes")
    parser.add_argument("--preset", default="small", help="sizes and rates",
                        choices=sorted(train_autoencoder.PRESETS.keys() & train_denoiser.PRESETS.keys()))
    parser.add_argument("--start", type=Path, help="pipeline folder whose weights to start from")
    parser.add_argument("--autoencoder", type=Path, help="finished autoencoder (.../vae): none is trained")
    parser.add_argument("--renders", type=Path, help="where rings lie or go, else in the run's folder")
    parser.add_argument("--min-quality", type=int, default=0, help="of the assets to train on")
    parser.add_argument("--rings", type=int, default=1, help="of each asset to train on")
    parser.add_argument("--num-views", type=int, default=24, help="of a ring")
    parser.add_argument("--size", type=int, default=256, help="pixels a side of a view")
    parser.add_argument("--scenes", type=int, default=0, help="so many scenes of two or three assets join")
    parser.add_argument("--stretched", type=int, default=0, help="so many stretched copies of each asset join")
    parser.add_argument("--repainted", action="store_true", help="copies of the rings in other colours join")
    parser.add_argument("--workers", type=int, help="processes that render, else one a core but two beside a GPU")
    parser.add_argument("--overlap", action=argparse.BooleanOptionalAction,
                        help="train the autoencoder while the rest renders (default: on CUDA)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add_dtype_option(parser)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, help="end each training after so many steps, all sessions together")
    parser.add_argument("--log-every", type=int, default=20)
    parser.add_argument("--save-every", type=int, default=NEVER, help="steps; checkpoints are also made by the clock")
    parser.add_argument("--evaluate-every", type=int, default=NEVER)
    parser.add_argument("--save-minutes", type=float, help=f"else {CHECKPOINTS} checkpoints a budget")
    parser.add_argument("--warmup", type=int, default=100)
    parser.add_argument("--decay-from", type=float, default=0.6)
    parser.add_argument("--prompts", type=int, default=8, help="prompts drawn for the figures at the end")
    parser.add_argument("--with-state", action="store_true", help="put the denoiser's training state into the shards")
    for verb in ("autoencoder", "denoiser"):
        parser.add_argument(f"--{verb}-arguments", default="", metavar="'--lr 1e-3 ...'",
                            help=f"more options of `coser.train {verb}`, which count more than ours")


def run(options: argparse.Namespace, loop: Options, parse: Parse) -> None:
    """All stages within the budget. parse: command line of a `coser.train` verb => its options."""
    recipe = Recipe(options, loop.run, parse)
    recipe.render()  # beside a GPU only until the first rings are there
    recipe.train_autoencoder()
    recipe.finish_rendering()
    recipe.encode()
    if recipe.train_denoiser():
        recipe.evaluate()
        recipe.write_shards()


def evaluate_pipeline(folder: Path, held_out: Path, count: int, device: str, dtype: torch.dtype,
                      until: float) -> dict:
    """Figures of a pipeline folder: of its autoencoder on held-out renders, and medians over `count` of our prompts.

    Stops before a prompt that would probably end after `until` (a reading of time.perf_counter()). A prompt whose
    views show no surface counts as drawn, without a mesh.
    """
    pipeline = CoSERPipeline.from_pretrained(folder, dtype=dtype).to(device)
    pipeline.set_progress_bar_config(disable=True)
    views = held_out_views(list_rings(held_out))
    figures: dict = {"autoencoder": autoencoder_figures(reconstruct_views(pipeline.vae, views), views)}
    prompts = read_prompts(PROMPTS)
    scores, drawn, longest = [], 0, PROMPT_SECONDS.get(torch.device(device).type, 0.0)
    for prompt in prompts[::max(1, len(prompts) // max(1, count))][:count]:
        began = time.perf_counter()
        if began + EVALUATION_MARGIN * longest > until:
            break
        with contextlib.suppress(ValueError):  # nothing that a mesh could be made of
            scores += [score for score, _, _ in evaluate_prompts(pipeline, [prompt], **DRAWING)]
        took = time.perf_counter() - began
        drawn, longest = drawn + 1, max(longest, took) if drawn else took
    figures |= {"prompts": drawn, "meshes": len(scores), "watertight": sum(s.watertight for s in scores)}
    for name in ("seconds", "cross", "own_psnr", "own_iou", "sharpness"):
        if scores:
            figures[name] = statistics.median(float(getattr(s, name)) for s in scores)
    return figures


class Recipe:
    """One session: the stages in their order, each within its share of what is left."""

    def __init__(self, options: argparse.Namespace, folder: Path, parse: Parse):
        self.began = time.perf_counter()
        self.options, self.folder, self.parse = options, folder, parse
        self.seconds = 60 * options.minutes
        self.until = self.began + self.seconds - min(START_AND_EXIT, 0.02 * self.seconds)
        self.cuda = torch.device(options.device).type == "cuda"
        self.record = Record(folder / "recipe.json")
        self.renders = RecipeRenders(options.renders or folder / "renders", options.assets, options.min_quality,
                                     options.rings, options.num_views, options.size, options.scenes, options.repainted,
                                     options.stretched)
        self.rendering: Background | None = None
        self.vae = self._finished_autoencoder()
        self.record.sessions.append({"minutes": options.minutes, "device": options.device, "torch": torch.__version__,
                                     "threads": torch.get_num_threads()})
        self.record.write()

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[dict]:
        """Around a stage: figures go into the dict; "finished" among them may say that it is not. Errors leave none."""
        began, figures = time.perf_counter(), {}
        print(f"== {name}: minute {(began - self.began) / 60:.1f} of {self.options.minutes:g}", flush=True)
        yield figures
        finished = figures.pop("finished", True)
        self.record.add(name, time.perf_counter() - began, finished, figures)
        self.record.sessions[-1]["seconds"] = round(time.perf_counter() - self.began, 2)
        self.record.write()

    def share(self, share: float) -> float:
        """The reading of the clock at which a stage that starts now has used its share of the budget."""
        return min(time.perf_counter() + share * self.seconds, self.until)

    # rendering

    def render(self) -> None:
        """Renders all, or beside a GPU that has an autoencoder to train, until the first rings are there."""
        if self.renders.made():
            print("== render: all rings are there", flush=True)
            if not self.record.finished("render"):
                self.record.add("render", 0.0, True, self.renders.figures())
            return
        overlap = self.cuda if self.options.overlap is None else self.options.overlap
        if not overlap or self.vae is not None:
            self._render(self.share(RENDER_SHARE), self.options.device)
            return
        until = self.share(RENDER_SHARE)
        self.rendering = Background(lambda: self._render(until, "cpu"))
        self._encode_captions_ahead()
        first = min(FIRST_RINGS, len(self.renders.assets) * self.options.rings)
        while not self.rendering.wait(WAIT) and not (self.renders.held_out_made() and self.renders.count() >= first):
            pass

    def finish_rendering(self) -> None:
        if self.rendering is not None:
            self.rendering.wait()
            self.rendering = None

    def _render(self, until: float, device: str) -> None:
        before = self.renders.count()
        workers = self.options.workers or max(1, (os.cpu_count() or 1) - (2 if self.cuda else 0))
        with self.stage("render") as figures:
            began = time.perf_counter()
            self.renders.make(device, workers, until)
            figures |= self.renders.figures(time.perf_counter() - began, self.renders.count() - before)
            figures["finished"] = self.renders.made()

    # trainings

    def _arguments(self, verb: str) -> list[str]:
        """The command line of a training, which says all that its run depends on."""
        o = self.options
        arguments = [verb, "--preset", o.preset, "--renders", self.renders.train, "--held-out", self.renders.held_out,
                     "--run", self.folder / verb, "--minutes", o.minutes, "--device", o.device, "--dtype", o.dtype,
                     "--seed", o.seed, "--log-every", o.log_every, "--save-every", o.save_every,
                     "--evaluate-every", o.evaluate_every, "--warmup", o.warmup, "--decay-from", o.decay_from,
                     "--save-minutes", o.save_minutes or o.minutes / CHECKPOINTS]
        if o.steps is not None:
            arguments += ["--steps", o.steps]
        if verb == "denoiser":
            arguments += ["--encoded-only"]
            arguments += ["--autoencoder", self.vae or self.folder / "autoencoder"]
            arguments += ["--start", o.start] if o.start else []
        else:
            arguments += ["--start", o.start / "vae"] if o.start else []
            arguments += ["--relist-every", RELIST_EVERY] if self.rendering else []
        arguments += shlex.split(GPU_ARGUMENTS[verb]) if self.cuda else []
        return [str(a) for a in arguments] + shlex.split(getattr(o, f"{verb}_arguments"))

    def _train(self, verb: str, until: float) -> None:
        options, loop = self.parse(self._arguments(verb))
        options.run_verb(options, dataclasses.replace(loop, budget=Budget(options.steps, until=until)))

    def _finished_autoencoder(self) -> Path | None:
        """The folder of the autoencoder that the options give or an earlier session finished."""
        denoiser = checkpoints(self.folder / "denoiser")
        if self.options.autoencoder:
            if denoiser and not same_weights(self.options.autoencoder, denoiser[-1] / "vae"):
                raise ValueError(f"autoencoder must be the one whose latents {denoiser[-1]} learnt, got "
                                 f"{self.options.autoencoder}; give another --run to begin anew")
            return self.options.autoencoder
        if not self.record.finished("autoencoder"):
            return None
        found = checkpoints(self.folder / "autoencoder") or denoiser  # a denoiser's checkpoint carries a copy
        if not found:
            raise ValueError(f"{self.record.path} says that the autoencoder is finished, but neither "
                             f"{self.folder / 'autoencoder'} nor {self.folder / 'denoiser'} holds a checkpoint")
        return found[-1] / "vae"

    def train_autoencoder(self) -> None:
        if self.vae is not None:
            print(f"== autoencoder: {self.vae}", flush=True)
            if not self.record.finished("autoencoder"):
                self.record.add("autoencoder", 0.0, True, {"given": str(self.vae)})
            return
        run = self.folder / "autoencoder"
        with self.stage("autoencoder") as figures:
            spent = 0.0
            if checkpoints(run):
                spent = json.loads((checkpoints(run)[-1] / "training.json").read_text())["seconds"]
            self._train("autoencoder", self.share(max(0.0, AUTOENCODER_SHARE - spent / self.seconds)))
            if not checkpoints(run):
                raise ValueError(f"minutes must leave time to train an autoencoder after rendering, got "
                                 f"{self.options.minutes:g}; the same command again goes on")
            self.vae = checkpoints(run)[-1] / "vae"
            figures |= training_figures(run)

    def _encode_captions_ahead(self) -> None:
        """The captions' text states, while the GPU would wait for the first rings."""
        options, _ = self.parse(self._arguments("denoiser"))
        rings = [Ring(a.path, a.id, a.object, a.captions, a.colors)
                 for a in self.renders.assets + self.renders.held_out_assets]
        encode_captions(train_denoiser.small_pipeline(options, None), captions_of(rings),
                        train_denoiser.cache_folder(options))

    def encode(self) -> None:
        """Latents of all rings and text states of all captions, into files: the denoiser then waits for none."""
        options, _ = self.parse(self._arguments("denoiser"))
        options.encoded_only = False
        rings = self.renders.count() * (2 if options.mirror else 1)
        known = self.renders.train / "latents"
        if (self.record.finished("latents") and self.record.figures("latents").get("rings") == rings
                and any(known.glob(f"{weights_hash(self.vae)}-*.safetensors"))):
            print("== latents: all are there", flush=True)
            return
        with self.stage("latents") as figures:
            pipeline = train_denoiser.small_pipeline(options, train_denoiser.load_autoencoder(options)[1])
            data = train_denoiser.prepare(options, pipeline, self.share(LATENTS_SHARE))
            figures |= {"rings": len(data.rings), "of": rings, "captions": len(data.texts.states),
                        "finished": len(data.rings) == rings and self.record.finished("render")}

    def train_denoiser(self) -> bool:
        """Trains until what evaluation and shards need is all that is left; whether there is a checkpoint then."""
        run = self.folder / "denoiser"
        with self.stage("denoiser") as figures:
            self._train("denoiser", self.until - self._reserve())
            figures |= training_figures(run)
            figures["finished"] = bool(checkpoints(run))
        if not checkpoints(run):
            print("no time was left for the denoiser; the same command again goes on", flush=True)
        return bool(checkpoints(run))

    # the end

    def _reserve(self) -> float:
        """Seconds to keep for evaluation and shards: as measured by an earlier session on this kind of device."""
        known = [s for s in ("evaluation", "shards") if self.record.finished(s)]
        before = [s["device"] for s in self.record.sessions[:-1]]
        if len(known) < 2 or before[-1:] != [self.options.device]:
            return EVALUATION_SHARE * self.seconds
        measured = sum(self.record.stages[s]["last_seconds"] for s in known)
        return min(EVALUATION_MARGIN * measured, MOST_EVALUATION_SHARE * self.seconds)

    def evaluate(self) -> None:
        with self.stage("evaluation") as figures:
            checkpoint = checkpoints(self.folder / "denoiser")[-1]
            shards = self.record.stages.get("shards", {}).get("last_seconds", 0.0)
            figures |= evaluate_pipeline(checkpoint, self.renders.held_out, self.options.prompts, self.options.device,
                                         getattr(torch, self.options.dtype), self.until - shards)
            figures["finished"] = figures["prompts"] == self.options.prompts

    def write_shards(self) -> None:
        """Shards of the last checkpoint, and `pipeline/`, joined from them: what was written is what can be read."""
        with self.stage("shards") as figures:
            checkpoint = checkpoints(self.folder / "denoiser")[-1]
            written = write_shards(checkpoint, self.folder / "shards",
                                   leave_out=() if self.options.with_state else TRAINING_STATE)
            shutil.rmtree(self.folder / "pipeline", ignore_errors=True)
            files = read_shards(self.folder / "shards", self.folder / "pipeline")
            figures |= {"checkpoint": checkpoint.name, "shards": len(written), "files": len(files),
                        "bytes": sum(f.stat().st_size for f in files)}
