"""Watch what a snapshot fills while a run goes on, and give the snapshot up before production is hurt.

A thin pool that is full makes everybody's writes wait and then fail; a classic snapshot that is full is worth
nothing. So each thing that fills is looked at several times a second, in a thread of its own that neither the
reading nor the storing can hold up. When it is too full, or would be before the next looks could help at the
rate at which it fills, all snapshots of the run are removed at once, whoever reads them, and the run fails
with what to extend. Nothing is extended here: that is the administrator's, or dmeventd's.

Once everything is read nobody needs the snapshots any more: then they still go, but the run does not fail.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from blocksnap.controller.settings import LimitSettings
from blocksnap.errors import BlocksnapError, StorageError, VolumeError
from blocksnap.volumes.base import Level, Snapshot

INTERVAL_SECONDS = 0.25
HORIZON_SECONDS = 5.0
"""What it takes at most to see that something fills up and to remove the snapshots."""
_RATE_SECONDS = 1.0
_JOIN_SECONDS = 30.0

Watch = Callable[[], BlocksnapError | None]
"""Looks once, and returns why the run has to end, or None."""


class FillingError(VolumeError):
    """What the snapshot fills is nearly full (exit code 14)."""

    def __init__(self, level: Level, reason: str) -> None:
        self.level = level
        what, fix = {
            "pool data": (f"data of thin pool {level.of}", f"lvextend --size +SIZE {level.of}"),
            "pool metadata": (
                f"metadata of thin pool {level.of}",
                f"lvextend --poolmetadatasize +SIZE {level.of}",
            ),
            "store": (
                f"the exception store of {level.of}",
                "raise limits.store_percent, and see that the volume group has room for it",
            ),
            "filesystem": (level.of, "make room there, or take the backup when less is written"),
        }[level.part]
        advice = (
            f"extend it: {fix}; or let LVM do it (thin_pool_autoextend_threshold in lvm.conf)"
            if level.part.startswith("pool")
            else fix
        )
        super().__init__(
            f"{what} {reason}: the snapshot was removed before it is full",
            details="nothing was committed; what was stored is taken over by the next backup",
            resolution=advice,
        )


class SnapshotTooOldError(VolumeError):
    """A snapshot lived as long as it may (exit code 14)."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        super().__init__(
            f"the snapshot was removed because it lived for {seconds:g} s, which is what limits allow",
            details="nothing was committed; what was stored is taken over by the next backup",
            resolution="raise limits.snapshot_seconds, or the rates in pace",
        )


class RepositoryFillingError(StorageError):
    """There is less room left for the repository than was asked for (exit code 1)."""

    def __init__(self, place: str, free_bytes: int, wanted_bytes: int) -> None:
        self.place, self.free_bytes, self.wanted_bytes = place, free_bytes, wanted_bytes
        super().__init__(
            f"{place} has {free_bytes} bytes left, less than limits.repository_free ({wanted_bytes})",
            resolution="blocksnap forget and prune, or make room",
        )


@dataclass(frozen=True, slots=True)
class _Look:
    at: float
    used: int


class LevelWatch:
    """Watches what the snapshot of one volume fills."""

    def __init__(
        self, snapshot: Snapshot, limits: LimitSettings, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._snapshot = snapshot
        self._limits = {
            "pool data": limits.drop_data_percent,
            "pool metadata": limits.drop_metadata_percent,
            "store": limits.cow_percent,
            "filesystem": limits.drop_data_percent,
        }
        self._clock = clock
        self._looks: dict[tuple[str, str], deque[_Look]] = {}

    def __call__(self) -> BlocksnapError | None:
        """Look once."""
        try:
            levels = self._snapshot.levels()
        except VolumeError as err:
            return err
        now = self._clock()
        for level in levels:
            looks = self._looks.setdefault((level.of, level.part), deque())
            # Of a second or so: one burst is no rate.
            while looks and now - looks[0].at > _RATE_SECONDS:
                looks.popleft()
            looks.append(_Look(now, level.used))
            elapsed = now - looks[0].at
            rate = (level.used - looks[0].used) / elapsed if elapsed > 0 else 0.0
            reason = judge(level, self._limits[level.part], rate)
            if reason is not None:
                return FillingError(level, reason)
        return None


def judge(level: Level, limit_percent: float, rate: float) -> str | None:
    """Say why something is too full, given how many units a second it fills by; None when it is not."""
    if not level.total:
        return None
    percent = 100 * level.used / level.total
    if percent > limit_percent:
        return f"is {percent:.1f} % full, beyond {limit_percent:g} %"
    if rate > 0 and level.used + rate * HORIZON_SECONDS >= level.total:
        seconds = (level.total - level.used) / rate
        return f"is {percent:.1f} % full and would be full in {seconds:.1f} s"
    return None


class AgeWatch:
    """Watches for how long the snapshots have been there."""

    def __init__(self, seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._seconds = seconds
        self._clock = clock
        self._began = clock()

    def __call__(self) -> BlocksnapError | None:
        """Look at the clock."""
        too_old = self._clock() - self._began > self._seconds
        return SnapshotTooOldError(self._seconds) if too_old else None


class RoomWatch:
    """Watches the room where the repository lies; ``free_bytes`` returns None where nobody can tell."""

    def __init__(self, place: str, free_bytes: Callable[[], int | None], wanted_bytes: int) -> None:
        self._place = place
        self._free_bytes = free_bytes
        self._wanted = wanted_bytes

    def __call__(self) -> BlocksnapError | None:
        """Look once."""
        free = self._free_bytes()
        if free is None or free >= self._wanted:
            return None
        return RepositoryFillingError(self._place, free, self._wanted)


class Guard:
    """A context in which the watches look again and again, each in a thread of its own.

    Leaving it raises what a watch found, in the place of whatever that led to.
    """

    def __init__(
        self,
        snapshots: Sequence[Snapshot],
        watches: Sequence[Watch],
        *,
        interval_seconds: float = INTERVAL_SECONDS,
    ) -> None:
        self._snapshots = tuple(snapshots)
        self._interval = interval_seconds
        self._lock = threading.Lock()
        self._stopping = threading.Event()
        self._needed = True
        self._found: BlocksnapError | None = None
        self._error: BlocksnapError | None = None
        self.warnings: list[str] = []
        self._threads = [
            threading.Thread(target=self._watch, args=(watch,), daemon=True, name="blocksnap-guard")
            for watch in watches
        ]

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, err: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stopping.set()
        for thread in self._threads:
            # One that hangs, at a file server that is gone, must not keep the snapshots from being removed.
            thread.join(_JOIN_SECONDS)
        if self._error is not None and (err is None or isinstance(err, Exception)):
            raise self._error from err

    def claim(self) -> None:
        """Say that the snapshots are needed, again; raises what was found since they were not."""
        with self._lock:
            if self._found is not None:
                raise self._found
            self._needed = True

    def release(self) -> None:
        """Say that the snapshots are not needed any more; raises what was found until now."""
        with self._lock:
            if self._error is not None:
                raise self._error
            self._needed = False

    def _watch(self, look: Watch) -> None:
        while not self._stopping.is_set():
            try:
                found = look()
            except (BlocksnapError, OSError) as err:
                # Without eyes there is no guard, and no snapshot without a guard.
                found = (
                    err if isinstance(err, BlocksnapError) else VolumeError(f"the guard cannot look: {err}")
                )
            if found is not None:
                self._trip(found)
                return
            self._stopping.wait(self._interval)

    def _trip(self, found: BlocksnapError) -> None:
        with self._lock:
            if self._stopping.is_set() or self._found is not None:
                return
            self._found = found
            if self._needed:
                self._error = found
            else:
                self.warnings.append(found.brief)
        for snapshot in self._snapshots:
            try:
                snapshot.drop()
            except BlocksnapError as err:
                self.warnings.append(f"a snapshot could not be removed in time: {err}")
