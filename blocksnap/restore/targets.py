"""Where a backup is written to, and what each place can do with a hole.

A target is never left looking whole when it is not: a file gets its name when it is complete; a device is
refused before the first byte is written if anything uses it.
"""

from __future__ import annotations

import errno
import os
import secrets
import threading
from typing import BinaryIO, Protocol

from blocksnap.errors import TargetError
from blocksnap.restore.flushing import Flusher
from blocksnap.system import blockdev


class TargetExistsError(TargetError):
    """A file stands where the restored one would go."""

    def __init__(self, path: str) -> None:
        self.path = path
        super().__init__(f"{path} exists already", resolution="name another file, or remove this one first")


class TargetTooSmallError(TargetError):
    """The device has fewer bytes than the backup."""

    def __init__(self, path: str, size: int, needed: int) -> None:
        self.path, self.size, self.needed = path, size, needed
        super().__init__(
            f"{path} has {size} bytes and the backup needs {needed}",
            resolution="restore to a larger device, or to a new volume with --create",
        )


class TargetFailedError(TargetError):
    """Writing failed."""

    def __init__(self, path: str, err: OSError) -> None:
        self.path = path
        self.errno = err.errno
        reason = os.strerror(err.errno) if err.errno else str(err)
        super().__init__(
            f"cannot write {path}: {reason}",
            resolution="make room and restore again" if err.errno == errno.ENOSPC else None,
        )


class Target(Protocol):
    """A place of fixed size that takes bytes in any order."""

    @property
    def name(self) -> str:
        """How people call it."""
        ...

    def write(self, offset: int, data: bytes | memoryview) -> None:
        """Write bytes; several threads at once."""
        ...

    def clear(self, offset: int, length: int, *, hole: bool) -> None:
        """Make a range read as zeros, unallocated where it was a hole and the place can."""
        ...

    def finish(self) -> None:
        """Make everything durable and give a file its name."""
        ...

    def reader(self) -> int:
        """Flush, and return a descriptor that reads back what the storage holds."""
        ...

    def close(self) -> None:
        """Let go; what is not finished is dropped."""
        ...


class FileTarget:
    """A new sparse file; it appears under its name when it is complete."""

    def __init__(self, path: str, size: int) -> None:
        self._path = os.path.abspath(path)
        if os.path.lexists(self._path):
            raise TargetExistsError(self._path)
        folder, name = os.path.split(self._path)
        self._temporary: str | None = os.path.join(folder, f".{name}.{secrets.token_hex(4)}.partial")
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        try:
            self._fd = os.open(self._temporary, flags, 0o600)
        except OSError as err:
            raise TargetFailedError(self._path, err) from err
        self._lock = threading.Lock()
        self._flusher = Flusher(self._fd)
        try:
            os.ftruncate(self._fd, size)
        except OSError as err:
            self.close()
            raise TargetFailedError(self._path, err) from err

    @property
    def name(self) -> str:
        """The path."""
        return self._path

    def write(self, offset: int, data: bytes | memoryview) -> None:
        """Write at an offset, one thread at a time.

        The kernel would let only one in anyway, and burn the others' time on spinning.
        """
        with self._lock:
            _write_all(self._fd, self._path, offset, data)
        self._flusher.wrote(len(data))

    def clear(self, offset: int, length: int, *, hole: bool) -> None:
        """Leave it: what was never written of a new file reads as zeros."""

    def finish(self) -> None:
        """Flush and link, which fails if the name was taken meanwhile."""
        if self._temporary is None:
            return
        try:
            self._flusher.finish()
            os.link(self._temporary, self._path)
            os.unlink(self._temporary)
            self._temporary = None
            folder = os.open(os.path.dirname(self._path), os.O_RDONLY | os.O_DIRECTORY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
        except FileExistsError as err:
            raise TargetExistsError(self._path) from err
        except OSError as err:
            raise TargetFailedError(self._path, err) from err

    def reader(self) -> int:
        """Flush, and drop the page cache of the file so that it is really read."""
        try:
            self._flusher.finish()
            os.posix_fadvise(self._fd, 0, 0, os.POSIX_FADV_DONTNEED)
        except OSError as err:
            raise TargetFailedError(self._path, err) from err
        return self._fd

    def close(self) -> None:
        """Close, and remove a file that was not finished."""
        if self._fd < 0:
            return
        self._flusher.stop()
        os.close(self._fd)
        self._fd = -1
        if self._temporary is not None:
            os.unlink(self._temporary)
            self._temporary = None


class DeviceTarget:
    """A block device that nothing uses, held exclusively while it is written."""

    def __init__(self, path: str, size: int) -> None:
        self._path = path
        self._fd = blockdev.open_exclusive(path)
        try:
            capacity = blockdev.size_of(self._fd)
            if capacity < size:
                raise TargetTooSmallError(path, capacity, size)
        except BaseException:
            os.close(self._fd)
            raise
        self._flusher = Flusher(self._fd)

    @property
    def name(self) -> str:
        """The path it was named by."""
        return self._path

    def write(self, offset: int, data: bytes | memoryview) -> None:
        """Write at an offset."""
        _write_all(self._fd, self._path, offset, data)
        self._flusher.wrote(len(data))

    def clear(self, offset: int, length: int, *, hole: bool) -> None:
        """Discard a hole where that leaves zeros; write zeros otherwise."""
        try:
            blockdev.clear(self._fd, offset, length, discard=hole)
        except OSError as err:
            raise TargetFailedError(self._path, err) from err

    def finish(self) -> None:
        """Flush to the device."""
        try:
            self._flusher.finish()
        except OSError as err:
            raise TargetFailedError(self._path, err) from err

    def reader(self) -> int:
        """Flush, and drop the device's page cache so that it is really read."""
        self.finish()
        blockdev.drop_cache(self._fd)
        return self._fd

    def close(self) -> None:
        """Close."""
        if self._fd >= 0:
            self._flusher.stop()
            os.close(self._fd)
            self._fd = -1


def write_stream(stream: BinaryIO, data: bytes | memoryview) -> None:
    """Write to a pipe or terminal; raises TargetFailedError."""
    try:
        stream.write(data)
    except OSError as err:
        raise TargetFailedError("standard output", err) from err


def _write_all(fd: int, name: str, offset: int, data: bytes | memoryview) -> None:
    view = memoryview(data)
    try:
        while view:
            count = os.pwrite(fd, view, offset)
            view, offset = view[count:], offset + count
    except OSError as err:
        raise TargetFailedError(name, err) from err
