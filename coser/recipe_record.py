"""What a recipe's stages leave behind: recipe.json, and the figures of a training's log."""

from __future__ import annotations

import json
import statistics
import threading
from pathlib import Path

from coser.whole_files import whole_file

STAGES = ("render", "autoencoder", "latents", "denoiser", "evaluation", "shards")


class Record:
    """recipe.json: what each stage left; written anew whenever a stage ends, also by a thread that renders."""

    def __init__(self, path: Path):
        self.path, self.lock = path, threading.RLock()
        self.stages: dict[str, dict] = {}
        self.sessions: list[dict] = []
        if path.is_file():
            found = json.loads(path.read_text(encoding="utf-8"))
            self.stages, self.sessions = found["stages"], found["sessions"]

    def finished(self, stage: str) -> bool:
        return self.stages.get(stage, {}).get("finished", False)

    def figures(self, stage: str) -> dict:
        return self.stages.get(stage, {}).get("figures", {})

    def add(self, stage: str, seconds: float, finished: bool, figures: dict) -> None:
        """seconds: of this session; `seconds` of the record are those of all sessions in which the stage ended."""
        with self.lock:
            before = self.stages.get(stage, {}).get("seconds", 0.0)
            entry = {"finished": finished, "seconds": round(before + seconds, 2), "last_seconds": round(seconds, 2),
                     "figures": figures}
            self.stages = {s: entry if s == stage else self.stages[s] for s in STAGES if s == stage or s in self.stages}
            self.write()

    def write(self) -> None:
        with self.lock:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with whole_file(self.path) as writing:
                writing.write_text(json.dumps({"stages": self.stages, "sessions": self.sessions}, indent=1) + "\n",
                                   encoding="utf-8")


def last_session(log: Path) -> list[dict]:
    """The lines of a training's log since it last resumed."""
    lines = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()] if log.is_file() else []
    resumed = [i for i, line in enumerate(lines) if "resumed" in line]
    return lines[resumed[-1]:] if resumed else lines


def training_figures(run: Path) -> dict:
    """What a training's last session logged: its last held-out figures, and medians of what it did in a second."""
    lines = last_session(run / "log.jsonl")
    figures = {k: v for k, v in next((e for e in reversed(lines) if "held_out" in e), {}).items() if k != "held_out"}
    for name in ("views_per_second", "tflops", "mfu"):
        values = [e[name] for e in lines if name in e]
        if values:
            figures[name] = statistics.median(values)
    return figures
