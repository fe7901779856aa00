"""A descriptor in place of a snapshot: what is read as it is, of which nothing stays and nothing fills up."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from blocksnap.extents.changes import BasePolicy
from blocksnap.volumes.base import Level, SnapshotTiming


class ColdSnapshot:
    """What every such snapshot is; ``fd`` is closed at the end, and -1 while there is none yet."""

    def __init__(self, fd: int = -1) -> None:
        self._fd = fd
        self._lock = threading.Lock()
        self._timing = SnapshotTiming(taken_at=time.time(), freeze_seconds=0.0)

    @property
    def timing(self) -> SnapshotTiming:
        """When it was opened."""
        return self._timing

    @contextmanager
    def open_reader(self) -> Iterator[int]:
        """Yield the descriptor; the reads of a file go through the page cache."""
        yield self._fd

    def levels(self) -> tuple[Level, ...]:
        """There is nothing that it fills."""
        return ()

    def drop(self) -> None:
        """Make reads end, with /dev/null in its place: there is nothing to be removed."""
        with self._lock:
            if self._fd >= 0:
                nothing = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
                os.dup2(nothing, self._fd, inheritable=False)
                os.close(nothing)

    def decide_base(self, policy: BasePolicy) -> None:
        """There is nothing that could stay."""

    def settle(self, owner: str, *, stays: bool) -> None:
        """There is nothing that could stay."""

    def remove(self) -> None:
        """Close the descriptor."""
        with self._lock:
            if self._fd >= 0:
                os.close(self._fd)
                self._fd = -1
