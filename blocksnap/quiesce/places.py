"""Which volumes of a run hold what an application has said about its files."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable
from dataclasses import dataclass

from blocksnap.system import freeze, mounts, peers

VolumeKeys = frozenset[str]
"""Volumes of a run, by their keys."""


@dataclass(frozen=True, slots=True)
class Target:
    """A volume that a snapshot is taken of: the device, and the file where it is an image on that device."""

    key: str
    device: int
    image: str | None = None

    def numbers_above(self) -> frozenset[int]:
        """Return all devices and filesystems whose data lies in it; of an image, through loop devices."""
        if self.image is None:
            return freeze.numbers_above(self.device)
        loops = mounts.loop_numbers_of(self.image)
        return frozenset().union(*(freeze.numbers_above(number) for number in loops))

    def is_image(self, status: os.stat_result) -> bool:
        """Tell whether a file is this image; False where that has gone. Raises OSError."""
        try:
            return self.image is not None and os.path.samestat(os.stat(self.image), status)
        except (FileNotFoundError, NotADirectoryError):
            return False


class Placement:
    """The volumes of a run, each with all devices and filesystems above it.

    ``frozen`` are the filesystems, as mountinfo numbers them, that the run itself freezes.
    """

    def __init__(self, targets: Iterable[Target], frozen: Iterable[int] = ()) -> None:
        self._above = {target: target.numbers_above() for target in targets}
        self._frozen = frozenset(frozen)

    def of_directory(self, pid: int, path: str) -> VolumeKeys:
        """Return the volumes of the filesystem or device that process ``pid`` sees at a path; raises OSError.

        None of them when it lies elsewhere, several when one filesystem spans several volumes.
        """
        return self._holding(peers.filesystem_at(pid, path))

    def is_frozen(self, pid: int, path: str) -> bool:
        """Tell whether the run freezes the filesystem that process ``pid`` sees at a path; raises OSError.

        One that is only flushed goes on between the snapshots of its volumes.
        """
        return bool(peers.filesystem_at(pid, path) & self._frozen)

    def of_disk(self, path: str) -> VolumeKeys:
        """Return the volumes of a device, or of the filesystem that a file lies on; raises OSError."""
        status = os.stat(path)
        if stat.S_ISBLK(status.st_mode):
            return self._holding(frozenset({status.st_rdev}))
        is_one = frozenset(target.key for target in self._above if target.is_image(status))
        return is_one | self._holding(peers.filesystem_at(os.getpid(), path))

    def _holding(self, numbers: frozenset[int]) -> VolumeKeys:
        return frozenset(target.key for target, above in self._above.items() if numbers & above)
