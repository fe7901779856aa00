"""A restore to a thin volume stops before the pool, which others live on too, is full.

A pool that is full makes the writes of all its volumes wait, and then fail. So it is looked at again and
again while it is written to. When it is nearly full the restore waits for a while, in which LVM may extend
the pool (thin_pool_autoextend_threshold), and then ends: a new volume is removed, what was there can be gone
on with.
"""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass

from blocksnap.errors import TargetError
from blocksnap.system import devmapper
from blocksnap.system.blockdev import sysfs_folder
from blocksnap.system.dm_status import StatusReader

_UNDER_WAY_BYTES = 8 << 20
"""At least; less is written at a time, and counted before it is."""
_LOOK_SECONDS = 0.25
_SECTOR = 512


@dataclass(frozen=True, slots=True)
class RestoreLimits:
    """How full a restore may make a pool, and how long it waits for room."""

    data_percent: float = 98.0
    """8 MiB, or a quarter of a tiny pool, stay free in any case."""
    metadata_percent: float = 95.0
    wait_seconds: float = 20.0
    """dmeventd looks at a pool every ten seconds."""


USUAL_LIMITS = RestoreLimits()


class PoolFillingError(TargetError):
    """The pool of a target is nearly full."""

    def __init__(self, pool: str, part: str, percent: float, limit_percent: float) -> None:
        self.pool, self.part, self.percent = pool, part, percent
        self.limit_percent = limit_percent
        super().__init__(
            f"the {part} of thin pool {pool} would be full: it is {percent:.1f} % full, and no more is "
            f"written before other volumes are hurt (limits.restore_{part}_percent = {limit_percent:g})",
            resolution=f"extend it: {self.remedy}; then restore again",
        )

    @property
    def remedy(self) -> str:
        """The command that makes room."""
        return f"lvextend {'--size' if self.part == 'data' else '--poolmetadatasize'} +SIZE {self.pool}"


class PoolWatch:
    """Told of every write before it is made, by several threads."""

    def __init__(self, device: int, limits: RestoreLimits, first: dict[str, int] | None = None) -> None:
        """Watch the pool that a device lies on, if it does; ``first`` keeps how full it was at first."""
        self._limits = limits
        pool = devmapper.pool_below(device)
        self._uuid = devmapper.dm_uuid(pool) if pool is not None else None
        self._lock = threading.Lock()
        self._given_up = threading.Event()
        self._first: dict[str, int] = {} if first is None else first
        self._looked = 0.0
        self._may_write = 0
        self._failure: PoolFillingError | None = None
        if pool is not None:
            name = devmapper.dm_name(pool) or ""
            self._name = "/".join(devmapper.decode_name(name.removesuffix("-tpool")) or (name,))
            self._size_file = sysfs_folder(pool) / "size"
            self._look(0)

    @property
    def is_there(self) -> bool:
        """Whether there is a pool at all."""
        return self._uuid is not None

    def give_up(self) -> None:
        """Have nobody wait for room any longer; from any thread."""
        self._given_up.set()

    def before(self, length: int) -> None:
        """Wait, or raise PoolFillingError, where that many bytes more could be too much."""
        if self._uuid is None:
            return
        with self._lock:
            self._may_write -= length
            if self._may_write > 0 and time.monotonic() - self._looked < _LOOK_SECONDS:
                return
            if self._failure is not None:
                # Another thread has waited.
                raise self._failure
            deadline = time.monotonic() + self._limits.wait_seconds
            while (found := self._look(length)) is not None:
                if time.monotonic() >= deadline or self._given_up.wait(_LOOK_SECONDS):
                    self._failure = found
                    raise found

    def _look(self, length: int) -> PoolFillingError | None:
        """Look once whether there is room for so much.

        What is written over what is there takes no room of a pool that is as full as before.
        """
        with StatusReader() as reader:
            text = reader.read(self._uuid or "")
        self._looked = time.monotonic()
        if text is None:
            return None
        status = devmapper.parse_pool_status(text)
        if not status.data_total:
            return None
        size = int(self._size_file.read_text()) * _SECTOR
        left = room_left(size, status.data_percent, self._limits.data_percent)
        # What comes until half of that is written cannot be too much.
        self._may_write = int(left / 2)
        for part, used, percent, limit, is_short in (
            ("data", status.data_used, status.data_percent, self._limits.data_percent, left <= length),
            (
                "metadata",
                status.metadata_used,
                status.metadata_percent,
                self._limits.metadata_percent,
                status.metadata_percent > self._limits.metadata_percent,
            ),
        ):
            if used > self._first.setdefault(part, used) and is_short:
                return PoolFillingError(self._name, part, percent, limit)
        return None


def room_left(size: int, percent: float, limit_percent: float) -> float:
    """Return how many bytes may still be written to a pool of so many that is so full; negative if none."""
    spare = max(size * (100 - limit_percent) / 100, min(_UNDER_WAY_BYTES, size / 4))
    return size * (100 - percent) / 100 - spare
