"""The first of the problems that are found, and how many more there are."""

from __future__ import annotations

import threading
from collections.abc import Callable

from blocksnap.errors import DamageError

_MOST_TOLD = 1000


class MoreProblemsError(DamageError):
    """More cannot be read than anybody wants to hear of."""

    def __init__(self, places: int) -> None:
        self.places = places
        super().__init__(
            f"{places} more places cannot be read", resolution="run: blocksnap check --read-data, and repair"
        )


class Problems:
    """Holds problems up to a number of them: one lost chunk can stand in a large volume millions of times.

    For any threads: maps are walked in one while chunks are read in another.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._first: list[DamageError] = []
        self._more = 0

    def add(self, err: DamageError, places: int = 1) -> None:
        """Take one more, or as many as ``places``."""
        with self._lock:
            if len(self._first) < _MOST_TOLD:
                self._first.append(err)
                places -= 1
            self._more += places

    def told(self, key: Callable[[DamageError], int] | None = None) -> list[DamageError]:
        """Return the first, in the order in which they came or by a key, and one for all others."""
        with self._lock:
            first = list(self._first) if key is None else sorted(self._first, key=key)
            return [*first, MoreProblemsError(self._more)] if self._more else first
