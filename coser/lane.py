"""One run at a time, in the order in which they came."""

from __future__ import annotations

import threading


class Lane:
    """Places in a line; whoever has nobody ahead works until leaving. Any number of threads may enter."""

    def __init__(self):
        self._places: list[object] = []
        self._changing = threading.Lock()

    def enter(self) -> object:
        """A new place at the end."""
        place = object()
        with self._changing:
            self._places.append(place)
        return place

    def ahead_of(self, place: object) -> int:
        """How many are before a place, the one that works among them."""
        with self._changing:
            return self._places.index(place)

    def leave(self, place: object) -> None:
        """Give a place up, at work or before."""
        with self._changing:
            self._places.remove(place)

    def __len__(self) -> int:
        """How many work or wait."""
        return len(self._places)
