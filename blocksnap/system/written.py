"""How fast a device is written to, observed from one run to the next.

The kernel counts the sectors written to a device since it came to be (Documentation/block/stat.rst). What
it counted last is kept under /run, which is forgotten at a reboot just as the counter is.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from dataclasses import dataclass
from pathlib import Path

from blocksnap.system import sysfs
from blocksnap.system.blockdev import sysfs_folder

_FOLDER = Path("/run/blocksnap/written")
_SECTOR = 512
_WRITE_SECTORS, _DISCARD_SECTORS = 6, 13


@dataclass(frozen=True, slots=True)
class WriteRate:
    """What was written to a device in so many seconds."""

    written_bytes: int
    seconds: float

    @property
    def bytes_per_second(self) -> float:
        """The average."""
        return self.written_bytes / self.seconds if self.seconds > 0 else 0.0


def touched_bytes(number: int) -> int | None:
    """Return how many bytes were written to a device, or discarded, since it came to be.

    None where the kernel does not count.
    """
    return _counted(number, _WRITE_SECTORS, _DISCARD_SECTORS)


def observe(number: int, name: str) -> WriteRate | None:
    """Return what was written to a device since it was last observed under ``name``, and remember this.

    The first time it is since the boot. None where the kernel does not count.
    """
    written = _counted(number, _WRITE_SECTORS)
    if written is None:
        return None
    now = time.clock_gettime(time.CLOCK_BOOTTIME)
    before_written, before_at = _remembered(name)
    _remember(name, written, now)
    if before_written > written or before_at >= now:
        # It was activated anew meanwhile, and counts from zero.
        before_written, before_at = 0, 0.0
    return WriteRate(written - before_written, now - before_at)


def _counted(number: int, *places: int) -> int | None:
    try:
        fields = sysfs.exact_text(sysfs_folder(number) / "stat").split()
        return sum(int(fields[place]) for place in places) * _SECTOR
    except (OSError, IndexError, ValueError):
        return None


def _remembered(name: str) -> tuple[int, float]:
    try:
        document = json.loads((_FOLDER / name).read_text(errors="replace"))
        return int(document["written"]), float(document["at"])
    except (OSError, ValueError, KeyError, TypeError):
        return 0, 0.0


def _remember(name: str, written: int, now: float) -> None:
    # Without it the next run looks back to the boot, so nothing is lost.
    with contextlib.suppress(OSError):
        _FOLDER.mkdir(parents=True, exist_ok=True, mode=0o700)
        partial = _FOLDER / f".{name}.{os.getpid()}"
        partial.write_text(json.dumps({"written": written, "at": now}))
        partial.replace(_FOLDER / name)
