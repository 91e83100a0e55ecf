"""Files and folders that are whole or not there at all, also after a kill; files also with others writing the same."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Gives a name of this process's own beside `path` to write to, which becomes `path` at the end, in one step.

    After an error nothing is left of it, and a file that was there stays. Listings by a file's ending do not see it.
    """
    writing = path.with_name(f"{path.name}.writing-{os.getpid()}")
    try:
        yield writing
        writing.replace(path)
    finally:
        writing.unlink(missing_ok=True)


def fresh_folder(folder: Path) -> Path:
    """An empty folder beside `folder`, to be renamed to it when all is written; what a killed run left there goes."""
    writing = folder.with_name(folder.name + ".writing")
    shutil.rmtree(writing, ignore_errors=True)
    writing.mkdir(parents=True)
    return writing
