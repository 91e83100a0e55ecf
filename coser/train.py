"""Train the small model: `python -m coser.train autoencoder|denoiser --preset small --renders RENDERS --run NAME`.

A run lives in `runs/<name>/`: `log.jsonl`, sample pictures, and `checkpoint-<step>/`, each a loadable pipeline folder (for
the autoencoder: its own folder) plus the training state. Starting the same command again resumes from the last checkpoint
and ends where an uninterrupted run would have ended, because every step draws its randomness from (seed, step).
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Callable

import torch
from safetensors.torch import load_file, save_file

from coser.optimizer import MasterOptimizer, schedule

KEEP_CHECKPOINTS = 2


@dataclass(frozen=True)
class Budget:
    """When a run ends: after `steps`, or after `minutes` of training (all sessions of the run together)."""

    steps: int | None = None
    minutes: float | None = None

    def __post_init__(self):
        if self.steps is None and self.minutes is None:
            raise ValueError("give --steps or --minutes: a run without an end has no learning-rate schedule")

    def progress(self, step: int, seconds: float) -> float:
        """How much of the run is over, 0 to 1; depends on the clock only when `minutes` is given."""
        return max(step / self.steps if self.steps else 0.0, seconds / 60 / self.minutes if self.minutes else 0.0)


@dataclass(frozen=True)
class Options:
    """What the loop needs to know; each is a command-line option of the same name."""

    run: Path
    budget: Budget
    save_every: int = 500
    log_every: int = 20
    evaluate_every: int = 500
    warmup: int = 100
    decay_from: float = 0.6


class Log:
    """Appends JSON lines to the run's log.jsonl and prints them."""

    def __init__(self, path: Path):
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path

    def __call__(self, **entry) -> None:
        entry = {k: round(v, 5) if isinstance(v, float) else v for k, v in entry.items()}
        with self.path.open("a") as file:
            file.write(json.dumps(entry) + "\n")
        print(" ".join(f"{k} {v}" for k, v in entry.items()), flush=True)


def checkpoints(run: Path) -> list[Path]:
    """The finished checkpoints of a run, oldest first."""
    found = [p for p in run.glob("checkpoint-*") if p.name.split("-")[1].isdigit()]
    return sorted(found, key=lambda p: int(p.name.split("-")[1]))


def train_loop(optimizer: MasterOptimizer, loss_of_step: Callable[[int], tuple[torch.Tensor, dict]],
               save_weights: Callable[[Path], None], evaluate: Callable[[int, Log], None], options: Options) -> int:
    """Runs or resumes a training to the end of its budget; returns the number of steps done.

    loss_of_step: step => loss and figures to log. save_weights: writes the model (averaged weights are in it) into a
    folder. evaluate: logs held-out figures and writes pictures (averaged weights are in it).
    """
    log = Log(options.run / "log.jsonl")
    seconds, start_step = 0.0, 0
    if checkpoints(options.run):
        last = checkpoints(options.run)[-1]
        optimizer.load_state(load_file(last / "training_state.safetensors"))
        training = json.loads((last / "training.json").read_text())
        seconds, start_step = training["seconds"], training["step"]
        log(resumed=last.name, seconds=seconds)
    started = time.perf_counter() - seconds
    step, saved_step = start_step, start_step

    def save(evaluated: bool) -> None:
        nonlocal saved_step
        saved_step = step
        optimizer.use_average()
        if evaluated:
            evaluate(step, log)
        folder, temporary = options.run / f"checkpoint-{step}", options.run / "checkpoint-writing"
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        save_weights(temporary)
        save_file(optimizer.state(), temporary / "training_state.safetensors")
        (temporary / "training.json").write_text(json.dumps({"step": step, "seconds": time.perf_counter() - started}))
        shutil.rmtree(folder, ignore_errors=True)
        temporary.rename(folder)  # a killed run leaves whole checkpoints only
        for old in checkpoints(options.run)[:-KEEP_CHECKPOINTS]:
            shutil.rmtree(old)
        optimizer.use_masters()

    while (progress := options.budget.progress(step, time.perf_counter() - started)) < 1:
        loss, figures = loss_of_step(step)
        loss.backward()
        norm = optimizer.step(schedule(progress, step, options.warmup, options.decay_from))
        step += 1
        if step % options.log_every == 0:
            log(step=step, loss=float(loss.detach()), norm=norm, progress=progress,
                seconds=time.perf_counter() - started, **{k: float(v) for k, v in figures.items()})
        if step % options.save_every == 0:
            save(step % options.evaluate_every == 0)
    if step > saved_step or step % options.evaluate_every:
        save(True)
    return step


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m coser.train", description=__doc__.split("\n")[0],
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    from coser import train_autoencoder, train_denoiser

    for module in (train_autoencoder, train_denoiser):
        verb = verbs.add_parser(module.VERB, help=module.__doc__.split("\n")[0],
                                formatter_class=argparse.ArgumentDefaultsHelpFormatter)
        add_common_options(verb)
        module.add_options(verb)
        verb.set_defaults(run_verb=module.run)
    options = parser.parse_args(arguments)
    options.run_verb(options, Options(
        run=Path("runs") / options.run if options.run.parent == Path(".") else options.run,
        budget=Budget(options.steps, options.minutes), save_every=options.save_every, log_every=options.log_every,
        evaluate_every=options.evaluate_every, warmup=options.warmup, decay_from=options.decay_from))


def add_common_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--preset", default="small", help="a name in the verb's table of presets")
    parser.add_argument("--renders", type=Path, required=True, help="folder written by coser.data.render")
    parser.add_argument("--held-out", type=Path, required=True, help="rendered rings that are never trained on")
    parser.add_argument("--run", type=Path, required=True, help="name below runs/, or a path")
    parser.add_argument("--steps", type=int, help="end after so many steps")
    parser.add_argument("--minutes", type=float, help="end after so many minutes of training")
    parser.add_argument("--lr", type=float, help="learning rate, else the preset's")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--limit", type=int, help="train on the first so many rings only")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"), help="dtype of the computation")
    parser.add_argument("--data-on-device", action="store_true", help="keep the whole data set on the device")
    parser.add_argument("--adamw", action="store_true", help="AdamW for all weights instead of Muon for matrices")
    parser.add_argument("--save-every", type=int, default=500)
    parser.add_argument("--evaluate-every", type=int, default=500)
    parser.add_argument("--log-every", type=int, default=20)
    parser.add_argument("--warmup", type=int, default=100, help="steps of linear learning-rate warm-up")
    parser.add_argument("--decay-from", type=float, default=0.6, help="share of the run after which the rate falls")


if __name__ == "__main__":
    main()
