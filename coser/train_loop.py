"""The loop of all trainings: a budget that ends a run, a log, whole checkpoints, and going on from the last one."""

from __future__ import annotations

import contextlib
import json
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from safetensors.torch import load_file, save_file

from coser.optimizer import MasterOptimizer, schedule
from coser.peers import Peers

KEEP_CHECKPOINTS = 2


@dataclass(frozen=True)
class Budget:
    """When a run ends: after `steps`, or after `minutes` of training (all sessions of the run together).

    until: a reading of time.perf_counter() by which the last evaluation and checkpoint are written, too; how long they
    take is measured before the first step. processor_time: minutes are those that the process computes on a processor,
    all threads together: trainings on a shared machine then get the same work done, whatever runs beside them.
    """

    steps: int | None = None
    minutes: float | None = None
    until: float | None = None
    processor_time: bool = False

    def __post_init__(self):
        if self.steps is None and self.minutes is None and self.until is None:
            raise ValueError("steps or minutes must be given, got neither: a run without an end has no schedule")
        for name in ("steps", "minutes"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name} must be more than 0, got {value}")

    def progress(self, step: int, seconds: float, ending: float = 0.0) -> float:
        """How much of the run is over, 0 to 1; depends on the clock only when `minutes` or `until` is given.

        seconds: spent so far, all sessions together. ending: what the end takes, in seconds, where `until` is given.
        """
        progress = max(step / self.steps if self.steps else 0.0, seconds / 60 / self.minutes if self.minutes else 0.0)
        if self.until is None:
            return progress
        left = self.until - time.perf_counter() - ending
        return max(progress, seconds / (seconds + left) if left > 0 else 1.0)


@dataclass(frozen=True)
class Options:
    """What the loop needs to know; each is a command-line option of the same name.

    save_every: steps. save_minutes: a checkpoint with an evaluation also after so many minutes without one.
    """

    run: Path
    budget: Budget
    save_every: int = 500
    log_every: int = 20
    evaluate_every: int = 500
    warmup: int = 100
    decay_from: float = 0.6
    save_minutes: float | None = None

    def __post_init__(self):
        for name in ("save_every", "log_every", "evaluate_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.warmup < 0:
            raise ValueError(f"warmup must be at least 0, got {self.warmup}")


class Meter(Protocol):
    """Watches the steps of a training, evaluations and checkpoints left out: see coser.throughput.Throughput."""

    def step(self) -> contextlib.AbstractContextManager:
        """Around each step."""

    def figures(self) -> dict[str, float]:
        """What joins a line of the log: about the steps since the last line."""


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
               save_weights: Callable[[Path], None], evaluate: Callable[[int, Log], None], options: Options,
               meter: Meter | None = None, peers: Peers = Peers()) -> int:
    """Runs or resumes a training to the end of its budget; returns the number of steps done.

    loss_of_step: step => loss and figures to log. save_weights: writes the model (averaged weights are in it) into a
    folder. evaluate: logs held-out figures and writes pictures (averaged weights are in it). meter: adds its figures to
    the log. peers: the processes that run this together, each with the loss of its share; the first one's clock is
    theirs, and it alone logs, evaluates and saves.
    """
    log = Log(options.run / "log.jsonl") if peers.first else lambda **entry: None
    seconds, start_step = 0.0, 0
    if checkpoints(options.run):
        last = checkpoints(options.run)[-1]
        optimizer.load_state(load_file(last / "training_state.safetensors"))
        training = json.loads((last / "training.json").read_text())
        seconds, start_step = training["seconds"], training["step"]
        log(resumed=last.name, seconds=seconds)
    peers.wait()  # all have read what the first one is about to replace
    clock = time.process_time if options.budget.processor_time else time.perf_counter
    started = clock() - seconds
    step, saved_step, ending = start_step, start_step, 0.0

    def save(evaluated: bool, saved: bool = True) -> None:
        nonlocal saved_step, ending
        began = time.perf_counter()
        saved_step = step if saved else saved_step
        if not peers.first:
            return
        optimizer.use_average()
        if evaluated:
            evaluate(step, log)
            ending = max(ending, time.perf_counter() - began)
        if not saved:
            optimizer.use_masters()
            return
        folder, temporary = options.run / f"checkpoint-{step}", options.run / "checkpoint-writing"
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        save_weights(temporary)
        save_file(optimizer.state(), temporary / "training_state.safetensors")
        (temporary / "training.json").write_text(json.dumps({"step": step, "seconds": clock() - started}))
        shutil.rmtree(folder, ignore_errors=True)
        temporary.rename(folder)  # a killed run leaves whole checkpoints only
        for old in checkpoints(options.run)[:-KEEP_CHECKPOINTS]:
            shutil.rmtree(old)
        optimizer.use_masters()
        if evaluated:
            ending = max(ending, time.perf_counter() - began)

    if options.budget.until is not None and peers.agreed(options.budget.progress(step, seconds)) < 1:
        save(True)  # measures the end, and finds out now rather than then whether it works
    saved_at = clock() - started
    while (progress := peers.agreed(options.budget.progress(step, (now := clock() - started), ending))) < 1:
        with meter.step() if meter else contextlib.nullcontext():
            loss, figures = loss_of_step(step)
            loss.backward()
            peers.average_gradients(optimizer.params)
            norm = optimizer.step(schedule(progress, step, options.warmup, options.decay_from))
        step += 1
        if step % options.log_every == 0:
            log(step=step, loss=float(peers.mean(loss.detach())), norm=norm, progress=progress,
                seconds=clock() - started, **{k: float(v) for k, v in figures.items()},
                **(meter.figures() if meter else {}))
        overdue = options.save_minutes is not None and now - saved_at > 60 * options.save_minutes
        if step % options.save_every == 0 or overdue:
            save(step % options.evaluate_every == 0 or overdue)
            saved_at = clock() - started
        elif step % options.evaluate_every == 0:
            save(True, saved=False)
    if step > saved_step or (step > start_step and step % options.evaluate_every):
        save(True)
    peers.wait()  # the last checkpoint is there when any of them returns
    return step
