"""How a run shares the disks: at fixed rates, or holding back while others wait for them.

Reading is done by one thread and storing by another, and each asks before it goes on. Only these wait: the
commands that take and remove snapshots never do, since others wait for those.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path

from blocksnap.controller.settings import PaceSettings
from blocksnap.errors import BlocksnapError
from blocksnap.system import pressure
from blocksnap.system.command import has_program, run

_BURST_SECONDS = 0.1
_WINDOW_SECONDS = 0.1
_FIRST_PAUSE_SECONDS = 0.02
_LONGEST_PAUSE_SECONDS = 1.0

Wait = Callable[[float], object]
"""Sleeps so many seconds, or less when the run ends."""


class TokenBucket:
    """Says how long to wait for a rate to hold, with a tenth of a second of it saved up at most."""

    def __init__(self, rate: float) -> None:
        """``rate`` is in bytes a second."""
        self._rate = rate
        self._free_at = float("-inf")

    def take(self, length: int, now: float) -> float:
        """Take so many bytes and return the seconds to wait before they are moved."""
        self._free_at = max(self._free_at, now - _BURST_SECONDS)
        delay = max(self._free_at - now, 0.0)
        self._free_at += length / self._rate
        return delay


class Backoff:
    """Pauses between windows of reading, twice as long each time that others waited too much, else half."""

    def __init__(self, limit: float) -> None:
        """``limit`` is the share of the time that others may wait, from 0 to 1."""
        self._limit = limit
        self._pause = 0.0

    def after_window(self, waited_share: float) -> float:
        """Return the seconds to pause after a window in which others waited for this share of the time."""
        if waited_share > self._limit:
            self._pause = min(max(self._pause * 2, _FIRST_PAUSE_SECONDS), _LONGEST_PAUSE_SECONDS)
        else:
            self._pause = self._pause / 2 if self._pause > _FIRST_PAUSE_SECONDS else 0.0
        return self._pause


class Pace:
    """The pace of one run (pipeline.protocols.Pace); ``held_back_seconds`` is what it cost."""

    def __init__(
        self,
        settings: PaceSettings,
        *,
        clock: Callable[[], float] = time.monotonic,
        find_files: Callable[[], pressure.PressureFiles | None] = pressure.find_pressure_files,
    ) -> None:
        self._clock = clock
        self._reads = TokenBucket(settings.read_rate) if settings.read_rate else None
        self._writes = TokenBucket(settings.write_rate) if settings.write_rate else None
        self._gentle = settings.policy == "gentle"
        self._backoff = Backoff(settings.pressure_percent / 100)
        self._files = find_files() if self._gentle else None
        self._before: dict[Path, int] = {}
        self._window_began: float | None = None
        self._waited_ourselves = 0.0
        self._lock = threading.Lock()
        self.held_back_seconds = 0.0

    def begin_reading(self) -> None:
        """Called by the thread that reads, before anything else."""
        self._window_began = None
        if self._gentle and has_program("ionice"):
            try:
                run("ionice", "--class", "idle", "--pid", str(threading.get_native_id()))
            except BlocksnapError:
                # It is a courtesy; where it is not allowed the pauses have to do.
                return

    def before_read(self, length: int, wait: Wait) -> None:
        """Wait until so many bytes may be read."""
        delay = self._reads.take(length, self._clock()) if self._reads else 0.0
        self._hold(delay + self._pause(), wait)

    def after_read(self, seconds: float) -> None:
        """Note for how long the read itself waited for the disks."""
        self._waited_ourselves += seconds

    def before_write(self, length: int, wait: Wait) -> None:
        """Wait until so many bytes may be stored."""
        self._hold(self._writes.take(length, self._clock()) if self._writes else 0.0, wait)

    def _pause(self) -> float:
        """Return how long to pause, at the end of a window."""
        if self._files is None:
            return 0.0
        now = self._clock()
        if self._window_began is None:
            self._begin_window(now)
            return 0.0
        elapsed = now - self._window_began
        if elapsed < _WINDOW_SECONDS:
            return 0.0
        waited = pressure.longest_wait(self._files.paths, self._before) / 1e6
        if self._files.ours_too:
            # Both may wait at the same time, so others waited at least for the rest.
            waited -= self._waited_ourselves
        pause = self._backoff.after_window(max(waited, 0.0) / elapsed)
        # What others wait while we pause is not our doing.
        self._window_began = None if pause else now
        self._waited_ourselves = 0.0
        return pause

    def _begin_window(self, now: float) -> None:
        self._window_began, self._waited_ourselves = now, 0.0
        if self._files is not None:
            pressure.longest_wait(self._files.paths, self._before)

    def _hold(self, seconds: float, wait: Wait) -> None:
        if seconds <= 0:
            return
        began = self._clock()
        wait(seconds)
        with self._lock:
            self.held_back_seconds += self._clock() - began
