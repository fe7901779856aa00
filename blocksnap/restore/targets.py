"""Where a backup is written to, and what each place can do with a hole.

A target is never left looking whole when it is not: a file gets its name when it is complete; a device is
refused before the first byte is written if anything uses it. Nor is a whole file thrown away because its name
cannot be had.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import threading
from typing import BinaryIO, Protocol

from blocksnap.errors import TargetError
from blocksnap.restore.flushing import Flusher
from blocksnap.system import blockdev

_AT_FDCWD = -100
_RENAME_NOREPLACE = 1
_NAME_BYTES = 255
# link(2) on FAT and exFAT, on SMB, and on FUSE: there are no hard links.
_NO_LINKS = frozenset({errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK})
_NO_FLAGS = frozenset({errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP})


class TargetExistsError(TargetError):
    """A file stands where the restored one would go."""

    def __init__(self, path: str) -> None:
        self.path = path
        super().__init__(f"{path} exists already", resolution="name another file, or remove this one first")


class NameTakenError(TargetExistsError):
    """A file has appeared where the restored one was to go."""

    def __init__(self, path: str, complete: str) -> None:
        super().__init__(path)
        self.complete = complete
        self.resolution = f"the restored file is complete: it is {complete}; give it another name"


class NameFailedError(TargetError):
    """The restored file is complete and cannot be given its name."""

    def __init__(self, path: str, complete: str, err: OSError) -> None:
        self.path, self.complete = path, complete
        self.errno = err.errno
        super().__init__(
            f"cannot give the restored file the name {path}: {_reason(err)}",
            resolution=f"it is complete: rename {complete}",
        )


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
        super().__init__(
            f"cannot write {path}: {_reason(err)}",
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
        _require_free(self._path)
        self._temporary: str | None = _hidden(self._path)
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
        """Flush and give the file its name.

        When only the naming fails, as when the name was taken meanwhile, the complete file stays under the
        hidden name that the error tells.
        """
        if self._temporary is None:
            return
        try:
            self._flusher.finish()
        except OSError as err:
            raise TargetFailedError(self._path, err) from err
        complete = self._temporary
        try:
            _give_name(complete, self._path)
        except FileExistsError as err:
            self._temporary = None
            raise NameTakenError(self._path, complete) from err
        except OSError as err:
            self._temporary = None
            raise NameFailedError(self._path, complete, err) from err
        self._temporary = None
        try:
            _flush_folder(os.path.dirname(self._path))
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
            # A failure here must not hide what led to it.
            with contextlib.suppress(OSError):
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
        try:
            blockdev.drop_cache(self._fd)
        except OSError as err:
            raise TargetFailedError(self._path, err) from err
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


def _reason(err: OSError) -> str:
    return os.strerror(err.errno) if err.errno else str(err)


def _require_free(path: str) -> None:
    """Raise TargetError unless a file can have this name: a name too long has to show now, not at the end."""
    try:
        os.lstat(path)
    except FileNotFoundError:
        return
    except OSError as err:
        raise TargetFailedError(path, err) from err
    raise TargetExistsError(path)


def _hidden(path: str) -> str:
    """Return a name beside ``path`` for what is not complete, no longer than a name may be."""
    folder, name = os.path.split(path)
    end = f".{secrets.token_hex(4)}.partial"
    while len(os.fsencode(name)) > _NAME_BYTES - len(end) - 1:
        name = name[:-1]
    return os.path.join(folder, f".{name}{end}")


def _give_name(hidden: str, path: str) -> None:
    """Rename a file without ever replacing another; raises FileExistsError, OSError."""
    try:
        os.link(hidden, path)
    except OSError as err:
        if err.errno not in _NO_LINKS:
            raise
    else:
        # The file has its name; a second, hidden one is no reason to call the restore failed.
        with contextlib.suppress(OSError):
            os.unlink(hidden)
        return
    try:
        _rename_new(hidden, path)
    except OSError as err:
        if err.errno not in _NO_FLAGS:
            raise
    else:
        return
    # Neither of the calls that look and rename in one step is there, so a file that comes in between is lost.
    if os.path.lexists(path):
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), path)
    os.rename(hidden, path)


def _rename_new(old: str, new: str) -> None:
    """Call renameat2(2) with RENAME_NOREPLACE, which Python does not have."""
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    if not hasattr(libc, "renameat2"):
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
    if libc.renameat2(_AT_FDCWD, os.fsencode(old), _AT_FDCWD, os.fsencode(new), _RENAME_NOREPLACE):
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), new)


def _flush_folder(path: str) -> None:
    folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(folder)
    except OSError as err:
        # SMB and FUSE may have no fsync for a directory.
        if err.errno not in _NO_FLAGS:
            raise
    finally:
        os.close(folder)


def _write_all(fd: int, name: str, offset: int, data: bytes | memoryview) -> None:
    view = memoryview(data)
    try:
        while view:
            count = os.pwrite(fd, view, offset)
            view, offset = view[count:], offset + count
    except OSError as err:
        raise TargetFailedError(name, err) from err
