"""What has no snapshots: a block device that nobody uses, and a plain file.

Both are read as they are. A device is held exclusively meanwhile, so nobody can mount it; but processes
that merely open it, as virtual machines do their disks, are kept from neither. So both are looked at again
before the commit. Where hooks stop who uses it, that is looked at when they have, and they hold until it was
read (docs/design.md, section 4.3).
"""

from __future__ import annotations

import contextlib
import os
import time

from blocksnap.extents.changes import Binding, Changes, Parent
from blocksnap.extents.scan import compare_all, scan_file
from blocksnap.system import blockdev, cgroup, written
from blocksnap.system.files import Writers, who_writes
from blocksnap.system.host import host_id, process_start
from blocksnap.system.mounts import mounts_of, users_of_device
from blocksnap.volumes.base import Ledger, Trace, VolumeKind
from blocksnap.volumes.cold import ColdSnapshot
from blocksnap.volumes.errors import (
    FileInUseError,
    NoSuchVolumeError,
    VolumeChangedError,
    VolumeInUseError,
)

_SECOND_NS = 1_000_000_000
_TICK_NS = 20_000_000
_LOOKS = 3
_STATE_WORDS = ("its size", "its content", "its owner, mode or name")


class _ColdVolume:
    """Something on this host that is known by its path and of which there are no snapshots."""

    def __init__(self, path: str, size: int) -> None:
        self._path = path
        self._size = size

    @property
    def name(self) -> str:
        """The path by which it was named."""
        return self._path

    @property
    def key(self) -> str:
        """The path, on this host."""
        return f"{host_id()}:{self._path}"

    @property
    def size(self) -> int:
        """Size when the volume was looked up."""
        return self._size

    @property
    def snapshot_device(self) -> int | None:
        """None: it is read as it is."""
        return None

    def trace(self, run: str) -> Trace | None:  # noqa: ARG002 - protocol
        """Nothing is left behind."""
        return None


class FileVolume(_ColdVolume):
    """A plain file, read where it is."""

    kind: VolumeKind = "file"

    def __init__(self, path: str, *, quiet: bool = False) -> None:
        """``quiet``: somebody says that it is not written to, though it may be open for that."""
        path = os.path.realpath(path)
        super().__init__(path, os.stat(path).st_size)
        self._quiet = quiet

    def prepare(self) -> None:
        """Make sure that nobody who runs has it open for writing."""
        FileSnapshot(self._path, quiet=self._quiet).remove()

    def take_snapshot(self, run: str, ledger: Ledger | None = None) -> FileSnapshot:  # noqa: ARG002 - protocol
        """Open the file and remember its state; raises FileInUseError."""
        return FileSnapshot(self._path, quiet=self._quiet)


class FileSnapshot(ColdSnapshot):
    """A file that is hoped to stay as it is; ``check`` tells whether it did."""

    def __init__(self, path: str, *, quiet: bool = False) -> None:
        """``quiet``: nobody asks who has it open for writing. Raises NoSuchVolumeError, FileInUseError."""
        try:
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as err:
            raise NoSuchVolumeError(path, os.strerror(err.errno or 0)) from err
        super().__init__(fd)
        self._path = path
        try:
            self._writers: Writers | None = None if quiet else who_writes(fd)
            if self._writers == "running":
                raise FileInUseError(path)
            self._state = self._look_when_settled()
            os.posix_fadvise(self._fd, 0, 0, os.POSIX_FADV_SEQUENTIAL)
        except BaseException:
            self.remove()
            raise

    @property
    def size(self) -> int:
        """Size in bytes."""
        return self._state[0]

    @property
    def binding(self) -> Binding:
        """The file's state, for people to see."""
        size, modified, _ = self._state
        return {
            "source": "file",
            "path": self._path,
            "size": size,
            "modified_ns": modified,
            "writers": self._writers or "not asked",
        }

    def find_changes(self, parent: Parent | None) -> Changes:
        """Everything that holds data is read."""
        return scan_file(self._fd, self.size, parent)

    def check(self) -> None:
        """Make sure that the file was not written to."""
        state = self._look()
        if state != self._state:
            what = next(
                word for word, now, then in zip(_STATE_WORDS, state, self._state, strict=True) if now != then
            )
            raise VolumeChangedError(self._path, what)
        # What is written through a mapping need not show in its times.
        if self._writers is not None and who_writes(self._fd) not in ("none", self._writers):
            raise VolumeChangedError(self._path, "somebody has opened it for writing")

    def _look_when_settled(self) -> tuple[int, int, int]:
        """Look at a time from which on a write gives it other times than it has.

        The kernel stamps with a clock that lags behind by a tick of up to 10 ms; some filesystems keep
        seconds, or two (FAT).
        """
        _, modified, changed = state = self._look()
        newest = max(modified, changed)
        grain = _TICK_NS if newest % _SECOND_NS else 2 * _SECOND_NS
        left = newest + grain - time.time_ns()
        if 0 < left <= grain:
            time.sleep(left / _SECOND_NS)
            state = self._look()
        return state

    def _look(self) -> tuple[int, int, int]:
        status = os.fstat(self._fd)
        return status.st_size, status.st_mtime_ns, status.st_ctime_ns


class DeviceVolume(_ColdVolume):
    """A block device that nobody writes to."""

    kind: VolumeKind = "device"

    def __init__(self, path: str) -> None:
        """It may be in use: ``prepare`` and ``take_snapshot`` look whether it is."""
        try:
            self._number = os.stat(path).st_rdev
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as err:
            raise NoSuchVolumeError(path, os.strerror(err.errno or 0)) from err
        try:
            super().__init__(path, blockdev.size_of(fd))
        finally:
            os.close(fd)

    def prepare(self) -> None:
        """Make sure that it is still unused."""
        os.close(_open_unused(self._path, self._number)[0])

    def take_snapshot(self, run: str, ledger: Ledger | None = None) -> DeviceSnapshot:  # noqa: ARG002 - protocol
        """Take the device for ourselves."""
        return DeviceSnapshot(self._path, self._number)


class DeviceSnapshot(ColdSnapshot):
    """A device that is held so that nobody can begin to write to it."""

    def __init__(self, path: str, number: int) -> None:
        fd, self._writers = _open_unused(path, number)
        super().__init__(fd)
        self._path = path
        self._number = number
        self._size = blockdev.size_of(self._fd)
        self._touched = self._count_touched()

    @property
    def size(self) -> int:
        """Size in bytes."""
        return self._size

    @property
    def binding(self) -> Binding:
        """The device's name and size, for people to see."""
        return {
            "source": "device",
            "path": self._path,
            "size": self._size,
            "writers": self._writers or "not asked",
        }

    def find_changes(self, parent: Parent | None) -> Changes:
        """Everything is read."""
        return compare_all(self._size, parent)

    def check(self) -> None:
        """Make sure that nobody wrote to it, or mounted it for that, and that the size is the same."""
        writable = [mount.point for mount in mounts_of(self._number) if not mount.read_only]
        if writable:
            raise VolumeChangedError(self._path, f"it is mounted for writing on {writable[0]}")
        if blockdev.size_of(self._fd) != self._size:
            raise VolumeChangedError(self._path, "its size")
        touched = self._count_touched()
        if touched is not None and self._touched is not None and touched != self._touched:
            raise VolumeChangedError(self._path, f"{touched - self._touched} bytes were written or discarded")
        if self._writers is not None:
            now, names = _who_writes(self._number)
            if now not in ("none", self._writers):
                raise VolumeChangedError(self._path, "; ".join(names))

    def _count_touched(self) -> int | None:
        # As long as we have it open, what others write to it may stay in its page cache.
        with contextlib.suppress(OSError):
            os.fsync(self._fd)
        return written.touched_bytes(self._number)


def _who_writes(number: int) -> tuple[Writers, list[str]]:
    """Say who keeps a device open for writing, and what to call those who do not stand still."""
    for _ in range(_LOOKS):
        found = blockdev.lasting_writers(number)
        running = {pid: name for pid, name in found.items() if not cgroup.stands_still(pid)}
        # Who has ended does not write any more, but may have left the device open to a child.
        if all(process_start(pid) is not None for pid in running):
            break
    return ("running" if running else "frozen" if found else "none"), list(running.values())


def _open_unused(path: str, number: int) -> tuple[int, Writers | None]:
    """Open a device exclusively; or shared, when nobody but read-only mounts use it.

    Tells who has it open for writing, none of whom runs; None where that was not asked, for such mounts.
    """
    shared = False
    try:
        try:
            fd = blockdev.open_exclusive(path, writable=False, direct=True)
        except blockdev.DeviceBusyError:
            mounts = mounts_of(number)
            if (
                not mounts
                or not all(mount.read_only for mount in mounts)
                or len(users_of_device(number)) > len(mounts)
            ):
                raise
            fd = os.open(path, os.O_RDONLY | os.O_DIRECT | os.O_CLOEXEC)
            shared = True
    except blockdev.DeviceBusyError as err:
        raise VolumeInUseError(path, err.users) from err
    except (blockdev.DeviceError, OSError) as err:
        raise NoSuchVolumeError(path, str(err)) from err
    try:
        if blockdev.device_number(fd) != number:
            raise NoSuchVolumeError(path, "it became another device meanwhile")
        writers, names = (None, []) if shared else _who_writes(number)
        if writers == "running":
            raise VolumeInUseError(path, names)
    except BaseException:
        os.close(fd)
        raise
    return fd, writers
