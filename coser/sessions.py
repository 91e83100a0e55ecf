"""Where a visitor's files lie: a folder a session, a folder a run, cleaned up by age."""

from __future__ import annotations

import re
import shutil
import tempfile
import time
from hashlib import sha256
from pathlib import Path

KEPT_SECONDS = 4 * 3600  # how long a visitor's files lie ready: a page may stay open for days
CURRENT = "current"  # in a session's folder: the name of its newest finished run


def file_name(title: str, seed: int | None = None) -> str:
    """A GLB's name that a person recognises in a downloads folder: "a-red-barrel-7.glb"."""
    words = re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-")[:40].strip("-")
    return f"{words or 'asset'}{'' if seed is None else f'-{seed}'}.glb"


def session_folder(root: Path, session: str) -> Path:
    """One visitor's folder under `root`, made when missing; named by a hash, for session names come from outside."""
    folder = root / sha256(session.encode()).hexdigest()[:16]
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def run_folder(session: Path) -> Path:
    """A new folder for one run of a session."""
    return Path(tempfile.mkdtemp(prefix="run-", dir=session))


def set_current_run(session: Path, run: Path | None) -> None:
    """Remember which run of a session is on its stage; None: one that nothing can be made from again.

    A file, so that a worker process of the web server sees it, too.
    """
    if run is None:
        (session / CURRENT).unlink(missing_ok=True)
    else:
        (session / CURRENT).write_text(run.name, encoding="utf-8")


def current_run(session: Path) -> Path | None:
    """The run on a session's stage; None where there is none, or it has been cleaned up. Asking keeps it: it counts as
    new from then on (`remove_old_runs`)."""
    note = session / CURRENT
    folder = session / note.read_text("utf-8") if note.is_file() else None
    if folder is None or not folder.is_dir():
        return None
    folder.touch()
    return folder


def remove_old_runs(root: Path, seconds: float = KEPT_SECONDS) -> None:
    """Delete the runs, of all sessions under `root`, that are older than `seconds`."""
    for folder in root.glob("*/run-*"):
        try:
            age = time.time() - folder.stat().st_mtime
        except FileNotFoundError:  # another visitor's call was quicker
            continue
        if age > seconds:
            shutil.rmtree(folder, ignore_errors=True)
