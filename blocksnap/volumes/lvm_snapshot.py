"""What snapshots of LVM volumes have in common, thin or classic: name, trace, readers, time."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import blake2b
from typing import TYPE_CHECKING, Self

from blocksnap.system import blockdev
from blocksnap.volumes.base import SnapshotTiming, Trace

if TYPE_CHECKING:
    from blocksnap.system.lvm_report import LvRecord


def snapshot_name(run: str, lv_uuid: str) -> str:
    """Return the name of the snapshot that a run takes of a volume: short, and of no other run or volume."""
    digest = blake2b(f"{run}/{lv_uuid}".encode(), digest_size=5).hexdigest()
    prefix = "".join(letter for letter in run if letter.isalnum())[:12]
    return f"blocksnap-{prefix}-{digest}"


def snapshot_trace(lv: LvRecord, run: str) -> Trace:
    """Return what a run writes down before it takes a snapshot of a volume."""
    return {
        "kind": "lvm",
        "vg": lv.vg_name,
        "vg_uuid": lv.vg_uuid,
        "lv": snapshot_name(run, lv.lv_uuid),
        "origin": lv.name,
        "origin_uuid": lv.lv_uuid,
        "run": run,
    }


class Readers:
    """The descriptors by which a snapshot is being read, so that another thread can take it away."""

    def __init__(self) -> None:
        self._open: set[int] = set()
        self._lock = threading.Lock()
        self._is_over = False

    @contextmanager
    def reading(self, number: int) -> Iterator[int]:
        """Open a device by its number, past the page cache."""
        fd = blockdev.open_by_number(number)
        with self._lock:
            self._open.add(fd)
        if self._is_over:
            # Opened while the others were cut off.
            self.cut_off()
        try:
            yield fd
        finally:
            with self._lock:
                self._open.discard(fd)
            os.close(fd)

    def cut_off(self) -> None:
        """Put /dev/null in the place of whoever reads, who would hold the device open: reads end there."""
        self._is_over = True
        nothing = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
        try:
            with self._lock:
                for fd in self._open:
                    os.dup2(nothing, fd, inheritable=False)
        finally:
            os.close(nothing)


class FreezeWatch:
    """Measures, by looking, how long a device is suspended.

    One too short to be seen counts as none, and the snapshot is then dated to before ``lvcreate``: rather
    too early than too late.
    """

    def __init__(self, number: int | None) -> None:
        self._path = (
            f"/sys/dev/block/{blockdev.number_text(number)}/dm/suspended" if number is not None else None
        )
        self._fd = -1
        self._last_running = 0.0
        self._began = self._taken = 0.0
        self._suspended = False
        self._frozen = 0.0

    def __enter__(self) -> Self:
        if self._path is not None:
            with contextlib.suppress(OSError):
                self._fd = os.open(self._path, os.O_RDONLY | os.O_CLOEXEC)
        self._last_running = time.monotonic()
        self._began = time.time()
        return self

    def __exit__(self, *_: object) -> None:
        if self._fd >= 0:
            os.close(self._fd)
        if not self._taken:
            self._taken = self._began
        self._fd = -1

    def observe(self) -> None:
        """Look once."""
        now = time.monotonic()
        if self._fd >= 0 and _reads_one(self._fd):
            if not self._suspended:
                self._taken = time.time()
            self._suspended = True
        else:
            if self._suspended:
                # From the last look that saw it running to the first: rather too long than too short.
                self._frozen = max(self._frozen, now - self._last_running)
            self._suspended = False
            self._last_running = now

    def timing(self) -> SnapshotTiming:
        """Return what was seen."""
        return SnapshotTiming(taken_at=self._taken, freeze_seconds=self._frozen)


def _reads_one(fd: int) -> bool:
    try:
        return os.pread(fd, 1, 0) == b"1"
    except OSError:
        return False
