"""A thread whose error is raised where it is waited for."""

from __future__ import annotations

import threading
from collections.abc import Callable


class Background(threading.Thread):
    """Work beside the main thread that does not outlive it; its error is raised where it is waited for."""

    def __init__(self, work: Callable[[], None]):
        super().__init__(daemon=True)
        self.work, self.error = work, None
        self.start()

    def run(self) -> None:
        try:
            self.work()
        except Exception as error:  # handed to whoever waits
            self.error = error

    def wait(self, timeout: float | None = None) -> bool:
        """Whether it has ended, after `timeout` seconds at most. Raises what it raised."""
        self.join(timeout)
        if self.error is not None:
            raise self.error
        return not self.is_alive()
