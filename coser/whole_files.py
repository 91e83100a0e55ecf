"""Files that are there whole or not at all, also after a kill and with other processes writing the same one."""

from __future__ import annotations

import contextlib
import os
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
