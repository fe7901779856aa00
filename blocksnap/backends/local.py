"""Objects as files of a local directory.

An object is visible under its name completely or not at all: it is written to a file without a name
(O_TMPFILE), flushed, and linked to its name, which fails if the name is taken; then its directory is
flushed. A crash therefore leaves nothing. Where the filesystem has no O_TMPFILE the file has a
name under ``tmp/`` until then, and whoever writes next removes those that nobody holds locked.
All calls go through the descriptor of the root directory, which may be renamed meanwhile.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import secrets
import stat
import threading
from collections import OrderedDict
from collections.abc import Iterator
from datetime import UTC, datetime

from blocksnap.backends.base import Backend, Buffer, ObjectInfo, ObjectWriter, is_name, validate_name
from blocksnap.backends.errors import (
    BackendAwayError,
    BackendFailedError,
    NoSuchPlaceError,
    ObjectExistsError,
    ObjectMissingError,
)

_TEMPORARY = "tmp"
_OPEN_FILES = 64
_MOST_BYTES = 256 << 20
"""Of an object that is read whole: nothing that is meant to be has a third of that."""
_LAST_SECOND = int(datetime(9000, 1, 1, tzinfo=UTC).timestamp())
_READ_FLAGS = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
"""Without waiting for whoever writes to a pipe that lies where an object should."""
_ALWAYS_THERE = "config"
"""An object that every repository has."""
_NO_TMPFILE = {errno.EOPNOTSUPP, errno.EISDIR, errno.EINVAL, errno.ENOENT}
_NO_LINKS = {errno.EPERM, errno.EMLINK, errno.EOPNOTSUPP, errno.ENOSYS}


class _LocalWriter(ObjectWriter):
    def __init__(self, backend: LocalBackend) -> None:
        self._backend = backend
        self._fd, self._temporary = backend._open_temporary()  # noqa: SLF001

    def write(self, data: Buffer) -> None:
        view = memoryview(data).cast("B")
        try:
            while view:
                view = view[os.write(self._fd, view) :]
        except OSError as err:
            raise BackendFailedError("write an object", self._backend.place, err) from err

    def publish(self, name: str) -> None:
        self._backend._link(self._fd, self._temporary, validate_name(name))  # noqa: SLF001
        self.abort()

    def abort(self) -> None:
        if self._fd < 0:
            return
        os.close(self._fd)
        self._fd = -1
        if self._temporary:
            self._backend._unlink_temporary(self._temporary)  # noqa: SLF001


class LocalBackend(Backend):
    """A directory of this host (or mounted on it)."""

    def __init__(self, path: str) -> None:
        self._path = os.path.abspath(path)
        self._root = -1
        self._lock = threading.Lock()
        self._folders: set[str] = set()
        self._files: OrderedDict[str, int] = OrderedDict()
        self._readers: dict[int, int] = {}
        self._swept = False

    @property
    def place(self) -> str:
        """The directory's path."""
        return self._path

    def create(self) -> None:
        """Make the directory (0700), flushed into its parent."""
        try:
            os.makedirs(self._path, mode=0o700, exist_ok=True)
            _sync_directory(os.path.dirname(self._path))
        except OSError as err:
            raise BackendFailedError("make the directory", self._path, err) from err

    def open_writer(self) -> ObjectWriter:
        """Start an object as a file without a name."""
        return _LocalWriter(self)

    def read(self, name: str) -> bytes:
        """Return a whole object."""
        with self._or_away(name):
            fd = self._open(name)
            try:
                size = os.fstat(fd).st_size
                if size > _MOST_BYTES:
                    raise BackendFailedError(f"read {name}", self._path, OSError(errno.EFBIG, ""))
                data = bytearray(size)
                self._fill(fd, name, 0, memoryview(data))
            finally:
                os.close(fd)
        return bytes(data)

    def read_range_into(self, name: str, offset: int, buffer: memoryview) -> None:
        """Fill the buffer by pread from a descriptor that stays open for the next call."""
        with self._or_away(name):
            fd = self._borrow(name)
            try:
                self._fill(fd, name, offset, buffer)
            finally:
                self._give_back(fd)

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        """Walk the folder; a missing one has no objects, and what others put there is passed over."""
        folder = validate_name(prefix.rstrip("/")) if prefix else ""
        yield from self._walk(folder)

    def flush(self, name: str) -> None:
        """Flush the directory: its creator may have been killed between link(2) and that."""
        try:
            self._sync_folder(validate_name(name).rpartition("/")[0])
        except OSError as err:
            raise BackendFailedError(f"flush {name}", self._path, err) from err

    def free_bytes(self) -> int:
        """Return what the file system has left for this user."""
        try:
            status = os.fstatvfs(self._open_root())
        except OSError as err:
            raise BackendFailedError("ask for free space", self._path, err) from err
        return status.f_bavail * status.f_frsize

    def delete(self, name: str) -> None:
        """Unlink and flush the directory."""
        root = self._open_root()
        try:
            os.unlink(validate_name(name), dir_fd=root)
            self._sync_folder(name.rpartition("/")[0])
        except FileNotFoundError as err:
            raise ObjectMissingError(name) from err
        except OSError as err:
            raise BackendFailedError(f"delete {name}", self._path, err) from err

    def close(self) -> None:
        """Close all descriptors."""
        with self._lock:
            for fd in self._files.values():
                os.close(fd)
            self._files.clear()
            if self._root >= 0:
                os.close(self._root)
                self._root = -1

    def _open_root(self) -> int:
        if self._root < 0:
            try:
                self._root = os.open(self._path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            except (FileNotFoundError, NotADirectoryError) as err:
                raise NoSuchPlaceError(self._path) from err
            except OSError as err:
                raise BackendFailedError("open the directory", self._path, err) from err
        return self._root

    def _open(self, name: str) -> int:
        root = self._open_root()
        try:
            fd = os.open(validate_name(name), _READ_FLAGS, dir_fd=root)
            if stat.S_ISREG(os.fstat(fd).st_mode):
                return fd
            # Passed over in listings, too.
            os.close(fd)
            raise ObjectMissingError(name)
        except (FileNotFoundError, NotADirectoryError) as err:
            raise ObjectMissingError(name) from err
        except OSError as err:
            raise BackendFailedError(f"open {name}", self._path, err) from err

    def _borrow(self, name: str) -> int:
        with self._lock:
            fd = self._files.get(name)
            if fd is None:
                fd = self._open(name)
                self._files[name] = fd
            self._files.move_to_end(name)
            self._readers[fd] = self._readers.get(fd, 0) + 1
            return fd

    def _give_back(self, fd: int) -> None:
        with self._lock:
            self._readers[fd] -= 1
            if not self._readers[fd]:
                del self._readers[fd]
            for name in [n for n, f in self._files.items() if f not in self._readers]:
                if len(self._files) <= _OPEN_FILES:
                    break
                os.close(self._files.pop(name))

    def _fill(self, fd: int, name: str, offset: int, buffer: memoryview) -> None:
        done = 0
        try:
            while done < len(buffer):
                count = os.preadv(fd, [buffer[done:]], offset + done)
                if not count:
                    raise EOFError(f"{name} ends at {offset + done}")
                done += count
        except OSError as err:
            raise BackendFailedError(f"read {name}", self._path, err) from err

    @contextlib.contextmanager
    def _or_away(self, name: str) -> Iterator[None]:
        """Raise BackendAwayError for an error in this block that is the storage's and not the object's."""
        try:
            yield
        except BackendFailedError as err:
            # The kernel has one word for a bad sector and for a disk that was pulled out.
            if err.errno == errno.EIO and not self._answers(name):
                raise BackendAwayError(self._path, OSError(errno.EIO, os.strerror(errno.EIO))) from err
            raise

    def _answers(self, name: str) -> bool:
        """Tell whether anything can be read from the storage itself: of this object, or of another."""
        return any(
            self._reads(*each)
            for each in ((name, os.SEEK_SET), (name, os.SEEK_END), (_ALWAYS_THERE, os.SEEK_SET))
        )

    def _reads(self, name: str, whence: int) -> bool:
        """Tell whether the first or the last byte of an object can be read, past the page cache."""
        try:
            fd = os.open(name, _READ_FLAGS, dir_fd=self._root)
        except OSError:
            return False
        try:
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            last = os.fstat(fd).st_size - 1
            return last >= 0 and len(os.pread(fd, 1, last if whence == os.SEEK_END else 0)) == 1
        except OSError:
            return False
        finally:
            os.close(fd)

    def _walk(self, folder: str) -> Iterator[ObjectInfo]:
        root = self._open_root()
        try:
            fd = os.open(folder or ".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=root)
        except (FileNotFoundError, NotADirectoryError):
            return
        except OSError as err:
            raise BackendFailedError(f"list {folder}", self._path, err) from err
        try:
            with os.scandir(fd) as entries:
                found = [(entry.name, status) for entry in entries if (status := _status(entry)) is not None]
        except OSError as err:
            raise BackendFailedError(f"list {folder}", self._path, err) from err
        finally:
            os.close(fd)
        for name, status in found:
            path = f"{folder}/{name}" if folder else name
            if stat.S_ISDIR(status.st_mode):
                if path != _TEMPORARY:
                    yield from self._walk(path)
            elif stat.S_ISREG(status.st_mode) and is_name(path):
                yield ObjectInfo(path, status.st_size, _received(status))

    def _open_temporary(self) -> tuple[int, str | None]:
        root = self._open_root()
        flags = os.O_RDWR | os.O_CLOEXEC
        try:
            return os.open(".", flags | os.O_TMPFILE, 0o600, dir_fd=root), None
        except OSError as err:
            if err.errno not in _NO_TMPFILE:
                raise BackendFailedError("create an object", self._path, err) from err
        try:
            self._make_folder(_TEMPORARY)
            self._sweep_temporary()
            name = f"{_TEMPORARY}/{secrets.token_hex(16)}"
            fd = os.open(name, flags | os.O_CREAT | os.O_EXCL, 0o600, dir_fd=root)
            fcntl.flock(fd, fcntl.LOCK_EX)
        except OSError as err:
            raise BackendFailedError("create an object", self._path, err) from err
        return fd, name

    def _sweep_temporary(self) -> None:
        if self._swept:
            return
        self._swept = True
        root = self._open_root()
        folder = os.open(_TEMPORARY, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=root)
        try:
            for name in os.listdir(folder):
                # Another host may be publishing it, or removing it too: then it is not ours to sweep.
                with contextlib.suppress(OSError):
                    _remove_unlocked(name, folder)
        finally:
            os.close(folder)

    def _unlink_temporary(self, name: str) -> None:
        try:
            os.unlink(name, dir_fd=self._open_root())
        except FileNotFoundError:
            return
        except OSError as err:
            raise BackendFailedError(f"remove {name}", self._path, err) from err

    def _make_folder(self, folder: str) -> None:
        with self._lock:
            if not folder or folder in self._folders:
                return
            root = self._open_root()
            path = ""
            for part in folder.split("/"):
                above, path = path, f"{path}/{part}" if path else part
                with contextlib.suppress(FileExistsError):
                    os.mkdir(path, 0o700, dir_fd=root)
                self._sync_folder(above)
            self._folders.add(folder)

    def _sync_folder(self, folder: str) -> None:
        fd = os.open(folder or ".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=self._open_root())
        try:
            os.fsync(fd)
        finally:
            os.close(fd)

    def _link(self, fd: int, temporary: str | None, name: str) -> None:
        root = self._open_root()
        folder = name.rpartition("/")[0]
        source = temporary or f"/proc/self/fd/{fd}"
        try:
            os.fsync(fd)
            self._make_folder(folder)
            try:
                os.link(
                    source,
                    name,
                    src_dir_fd=root if temporary else None,
                    dst_dir_fd=root,
                    follow_symlinks=not temporary,
                )
            except FileExistsError:
                # NFS repeats a call whose answer was lost, and meets its own first try.
                if not os.path.samestat(os.stat(name, dir_fd=root, follow_symlinks=False), os.fstat(fd)):
                    raise
            self._sync_folder(folder)
        except FileExistsError as err:
            raise ObjectExistsError(name) from err
        except OSError as err:
            failed = BackendFailedError(f"create {name}", self._path, err)
            if err.errno in _NO_LINKS:
                failed.resolution = "use a filesystem with hard links, such as ext4, XFS, btrfs or NFS"
            raise failed from err


def _status(entry: os.DirEntry[str]) -> os.stat_result | None:
    """Look at an entry, or return None for one that somebody removed since the directory was read."""
    try:
        return entry.stat(follow_symlinks=False)
    except FileNotFoundError:
        return None


def _received(status: os.stat_result) -> datetime | None:
    """Return when a file arrived; None for what no clock says."""
    if not 0 <= status.st_mtime < _LAST_SECOND:
        return None
    return datetime.fromtimestamp(status.st_mtime, UTC)


def _remove_unlocked(name: str, folder: int) -> None:
    # NFS locks like fcntl does, which wants a descriptor that can write.
    fd = os.open(name, os.O_RDWR | os.O_CLOEXEC, dir_fd=folder)
    try:
        # An empty file may be younger than its creator's next statement, which locks it.
        if os.fstat(fd).st_size:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.unlink(name, dir_fd=folder)
    finally:
        os.close(fd)


def _sync_directory(path: str) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
