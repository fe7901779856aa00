"""Which volumes of a run hold what an application has said about its files."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable

from blocksnap.system import freeze, peers

Devices = frozenset[int]
"""Numbers of devices that snapshots are taken of."""


class Placement:
    """The volumes of a run, each with all devices and filesystems above it."""

    def __init__(self, devices: Iterable[int]) -> None:
        self._above = {device: freeze.numbers_above(device) for device in devices}

    def of_directory(self, pid: int, path: str) -> Devices:
        """Return the volumes of the filesystem that process ``pid`` sees at a path; raises OSError.

        None of them when it lies elsewhere, several when one filesystem spans several volumes.
        """
        return self._holding(peers.filesystem_at(pid, path))

    def of_disk(self, path: str) -> Devices:
        """Return the volumes of a device, or of the filesystem that a file lies on; raises OSError."""
        status = os.stat(path)
        if stat.S_ISBLK(status.st_mode):
            return self._holding(frozenset({status.st_rdev}))
        return self._holding(peers.filesystem_at(os.getpid(), path))

    def _holding(self, numbers: frozenset[int]) -> Devices:
        return frozenset(device for device, above in self._above.items() if numbers & above)
