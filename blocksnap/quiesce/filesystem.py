"""Filesystems that the snapshot itself would not freeze.

LVM suspends the volume, and with it the kernel freezes the filesystem that lies directly on it. One above
encryption, partitions, RAID, a loop device or another volume group it does not find, nor btrfs (which does
not tell the block layer of itself). Those are frozen here; and never the others, because a snapshot of a
frozen filesystem is refused (EBUSY, Linux 6.1).

A filesystem that this host, LVM or we ourselves write to is never frozen: its dirty pages are flushed.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from blocksnap.quiesce.base import Guard, Strength, Trace
from blocksnap.quiesce.errors import FilesystemFreezeError
from blocksnap.system import blockdev, freeze, mounts
from blocksnap.system.command import CommandError, CommandTimeoutError
from blocksnap.system.freeze import Layer
from blocksnap.system.watchdog import Safeguard, Thaw

SYSTEM_PATHS = ("/", "/etc", "/usr", "/var", "/var/log/journal", "/run", "/tmp", "/dev/shm")  # noqa: S108
"""Where the host writes, or reads programs from, whatever else it does."""
Action = Literal["freeze", "flush", "leave"]


@dataclass(frozen=True, slots=True)
class Decision:
    """What is done about a filesystem, and why."""

    layer: Layer
    action: Action
    reason: str


def decide(layer: Layer, protected: Collection[int]) -> Decision:
    """Decide about a filesystem above a volume; ``protected`` are those that are never frozen."""
    mount = layer.mount
    if mount.read_only:
        return Decision(layer, "leave", "nothing is written to it")
    if layer.depth == 0 and mount.filesystem != "btrfs":
        return Decision(layer, "leave", "the snapshot freezes it")
    if mount.device in protected:
        return Decision(layer, "flush", "this host, LVM or blocksnap itself needs it")
    if layer.depth == 0:
        return Decision(layer, "freeze", "the snapshot does not find a btrfs on the volume")
    return Decision(layer, "freeze", "it lies above other devices, where the snapshot does not find it")


def protected_filesystems(paths: Iterable[str]) -> set[int]:
    """Return the filesystems, as mountinfo numbers them, that must not stand still for these paths' sake.

    Those that a filesystem lies on are protected with it, through loop devices too; and those with swap.
    """
    table = mounts.read_mounts()
    wanted = []
    for path in [*SYSTEM_PATHS, __file__, *paths, *mounts.swap_files()]:
        mount = mounts.mount_under(path)
        if mount is not None:
            wanted.append(mount.device)
    found: set[int] = set()
    while wanted:
        filesystem = wanted.pop()
        if filesystem in found:
            continue
        found.add(filesystem)
        for device in _devices_below(filesystem, table):
            backing = freeze.backing_filesystem(device)
            if backing is not None:
                wanted.append(backing)
            wanted += [mount.device for mount in mounts.mounts_of(device, table)]
    return found


def is_mounted(filesystem: int) -> bool:
    """Tell whether a filesystem, as mountinfo numbers it, is mounted anywhere still."""
    return any(mount.device == filesystem for mount in mounts.read_mounts())


class FilesystemFreeze:
    """One filesystem that is frozen by us."""

    strength: Strength = "frozen"

    def __init__(self, layer: Layer) -> None:
        """Open it; raises FilesystemFreezeError."""
        self._point = layer.mount.point
        self._device = layer.mount.device
        self._guard: Guard | None = None
        self._began = False
        try:
            self._fd = os.open(self._point, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError as err:
            raise FilesystemFreezeError(self._point, os.strerror(err.errno or 0)) from err
        if mounts.filesystem_of(self._fd) != self._device:
            self.close()
            raise FilesystemFreezeError(self._point, "another one was mounted there meanwhile")

    @property
    def name(self) -> str:
        """``filesystem on POINT``."""
        return f"filesystem on {self._point}"

    def safeguards(self) -> Sequence[Safeguard]:
        """Return the thawing."""
        return [Thaw(self._fd)]

    def trace(self) -> Trace | None:
        """Return where it is."""
        return {"kind": "filesystem", "point": self._point, "device": self._device}

    def attend(self, guard: Guard) -> None:
        """Write out what is dirty, so that the freeze has little to do."""
        self._guard = guard
        _flush(self._point, self._device)

    def begin(self, deadline: float) -> None:  # noqa: ARG002 - the kernel takes none; the watchdog keeps it
        """Freeze it."""
        if self._guard is None:
            return
        self._guard.arm(0)
        # Before the call: an interrupt may arrive right behind it.
        self._began = True
        try:
            freeze.freeze(self._fd)
        except OSError as err:
            # It is not ours to thaw.
            self._began = False
            self._guard.disarm(0)
            problem = {
                errno.EBUSY: "somebody else has frozen it",
                errno.EOPNOTSUPP: "its kind cannot be frozen",
            }.get(err.errno or 0, os.strerror(err.errno or 0))
            raise FilesystemFreezeError(self._point, problem) from err

    def end(self, deadline: float) -> None:  # noqa: ARG002 - it takes no time
        """Thaw it; raises FilesystemFreezeError when it was thawed before."""
        if self._guard is None or not self._began:
            return
        guard, self._guard = self._guard, None
        try:
            was_frozen = freeze.thaw(self._fd)
        except OSError as err:
            raise FilesystemFreezeError(
                self._point, f"and not thawed: {os.strerror(err.errno or 0)}"
            ) from err
        guard.disarm(0)
        if not was_frozen:
            raise FilesystemFreezeError(self._point, "somebody thawed it before the snapshots were taken")

    def close(self) -> None:
        """Close it."""
        if self._fd >= 0:
            os.close(self._fd)
        self._fd = -1


class FilesystemFlush:
    """A filesystem that cannot be frozen: what was written by then goes to the volume."""

    strength: Strength = "frozen"

    def __init__(self, layer: Layer) -> None:
        self._point = layer.mount.point
        self._device = layer.mount.device

    @property
    def name(self) -> str:
        """``flush of POINT``."""
        return f"flush of {self._point}"

    def safeguards(self) -> Sequence[Safeguard]:
        """Nothing is left standing."""
        return []

    def trace(self) -> Trace | None:
        """Nothing is left standing."""
        return None

    def attend(self, guard: Guard) -> None:  # noqa: ARG002 - there is nothing to guard
        """Write out what is dirty now, so that there is little left later."""
        _flush(self._point, self._device)

    def begin(self, deadline: float) -> None:  # noqa: ARG002 - it is asked for once
        """Write out what is dirty."""
        _flush(self._point, self._device)

    def end(self, deadline: float) -> None:
        """Nothing stands still."""

    def close(self) -> None:
        """Nothing is open."""


def thaw_leftover(trace: Trace) -> bool:
    """Thaw a filesystem that a dead run of this boot left frozen; False when it is not, or not there.

    Raises FilesystemFreezeError.
    """
    device = trace["device"]
    # It may have been mounted elsewhere meanwhile: that does not thaw it.
    for point in dict.fromkeys(mount.point for mount in mounts.read_mounts() if mount.device == device):
        try:
            fd = os.open(point, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError:
            continue
        try:
            if mounts.filesystem_of(fd) == device:
                return freeze.thaw(fd)
        except OSError as err:
            raise FilesystemFreezeError(point, f"and not thawed: {os.strerror(err.errno or 0)}") from err
        finally:
            os.close(fd)
    return False


def _flush(point: str, filesystem: int) -> None:
    """Write out what is dirty, if it is mounted still; raises FilesystemFreezeError."""
    try:
        mounts.flush(point)
    except (CommandError, CommandTimeoutError) as err:
        if isinstance(err, CommandError) and not is_mounted(filesystem):
            return
        raise FilesystemFreezeError(point, f"it cannot be flushed: {err.brief}") from err


def _devices_below(filesystem: int, table: list[mounts.Mount]) -> set[int]:
    """Return the block devices that a filesystem's data goes through."""
    found: set[int] = set()
    wanted = [
        number
        for mount in table
        if mount.device == filesystem and (number := mounts.device_of(mount)) is not None
    ]
    while wanted:
        number = wanted.pop()
        if number not in found:
            found.add(number)
            wanted += blockdev.slaves(number)
    return found
