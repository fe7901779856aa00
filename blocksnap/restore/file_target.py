"""A new file, which appears under its name when it is complete; and a file that is written over."""

from __future__ import annotations

import contextlib
import fcntl
import os
import stat
from collections.abc import Iterable

from blocksnap.restore.naming import flush_open_folder, give_name, hidden_name
from blocksnap.restore.place import Place
from blocksnap.restore.record import HEAD_BYTES, RestoreRecord
from blocksnap.restore.targets import (
    NameFailedError,
    NameTakenError,
    Progress,
    TargetBusyError,
    TargetExistsError,
    TargetFailedError,
)
from blocksnap.system import blockdev
from blocksnap.system.files import is_being_written

_TOKEN_DIGITS = 8
_PATIENT_FILESYSTEMS = frozenset({"ext4", "xfs"})
"""Where writing past the page cache to allocated room was measured to pay; others go through it."""


class _FilePlace(Place):
    """A file, with its room allocated before it is written."""

    def expect(self, ranges: Iterable[tuple[int, int]]) -> None:
        """Allocate: a disk that is too full is found here, and not in the middle of a window."""
        if self._direct < 0:
            return
        try:
            for offset, length in ranges:
                if not blockdev.allocate(self._fd, offset, min(length, self._size - offset)):
                    os.close(self._direct)
                    self._direct = -1
                    return
        except OSError as err:
            raise self.failed(err) from err

    def open_direct(self) -> None:
        """Only where it pays."""
        from blocksnap.system.mounts import mount_under

        mount = mount_under(os.path.dirname(self._name))
        if mount is not None and mount.filesystem in _PATIENT_FILESYSTEMS:
            super().open_direct()

    def punch(self, offset: int, length: int) -> None:
        """Make a range read as zeros, unallocated where the filesystem can."""
        try:
            if not blockdev.punch_hole(self._fd, offset, length):
                blockdev.write_zeros(self._fd, offset, offset + length)
        except OSError as err:
            raise self.failed(err) from err


class FileTarget(_FilePlace):
    """A file that does not exist yet; sparse where the backup is.

    It is written under a hidden name, which an interrupted restore of the same backup to the same
    place finds again and goes on with. The directory that it is in may be renamed meanwhile.
    """

    def __init__(self, path: str, size: int, record: RestoreRecord) -> None:
        path = os.path.abspath(path)
        folder, self._final = os.path.split(path)
        self._temporary: str | None = hidden_name(self._final, record.backup[:_TOKEN_DIGITS])
        self.wanted = record
        try:
            self._folder = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError as err:
            raise TargetFailedError(path, err) from err
        try:
            self._require_free(path, self._temporary)
            fd = self._open()
            try:
                os.ftruncate(fd, size)
            except BaseException:
                os.close(fd)
                os.unlink(self.reach(self._temporary))
                raise
        except BaseException as err:
            os.close(self._folder)
            if isinstance(err, OSError):
                raise TargetFailedError(path, err) from err
            raise
        super().__init__(fd, path, size)
        self.open_direct()

    def reach(self, name: str) -> str:
        """Return a path by which a name in the directory is reached, whatever that is called by now."""
        return f"/proc/self/fd/{self._folder}/{name}"

    def show(self, name: str) -> str:
        """Return the path that a name in the directory has by now."""
        return os.path.join(os.readlink(f"/proc/self/fd/{self._folder}"), name)

    def begin(self) -> int:
        """Write the record, unless it is there; what else is found under the hidden name is thrown away."""
        try:
            before = self.head()
            if before is None or not before.continues(self.wanted):
                os.ftruncate(self._fd, 0)
                os.ftruncate(self._fd, self._size)
        except OSError as err:
            raise self.failed(err) from err
        return self.begin_with(self.wanted)

    def clear(self, offset: int, length: int, *, hole: bool, progress: Progress) -> None:  # noqa: ARG002
        """Leave it: what was never written of a new file reads as zeros, but for where the record was."""
        if offset < HEAD_BYTES:
            self.punch(offset, min(length, HEAD_BYTES - offset))
        progress(length)

    def finish(self) -> None:
        """Flush and give the file its name.

        When only the naming fails, as when the name was taken meanwhile, the complete file stays under the
        hidden name that the error tells.
        """
        if self._temporary is None:
            return
        self.finish_writing()
        complete = self._temporary = self.convert(self._temporary)
        try:
            give_name(self.reach(complete), self.reach(self._final))
        except FileExistsError as err:
            self._temporary = None
            raise NameTakenError(self._name, self.show(complete)) from err
        except OSError as err:
            self._temporary = None
            raise NameFailedError(self._name, self.show(complete), err) from err
        self._temporary = None
        try:
            flush_open_folder(self._folder)
        except OSError as err:
            raise self.failed(err) from err

    def convert(self, hidden: str) -> str:
        """Return the hidden name of what gets the file's name: the complete file itself."""
        return hidden

    def reader(self) -> int:
        """Flush, and drop the page cache of the file so that it is really read."""
        return self.forget_cache()

    def close(self, *, keep: bool = False) -> bool:
        """Close; remove a file that was not finished, unless it is to be kept and worth it."""
        if self._fd < 0:
            return False
        try:
            self.kept = keep and self._temporary is not None and self.keep_record()
        finally:
            if self._temporary is not None and not self.kept:
                # While it is locked: after that it can be another's. A failure must not hide what led to it.
                with contextlib.suppress(OSError):
                    os.unlink(self.reach(self._temporary))
            self._temporary = None
            self.release()
            os.close(self._folder)
        return self.kept

    def _open(self) -> int:
        """Open the hidden file that an earlier restore left, or make it; raises OSError, TargetBusyError."""
        return self._take(os.O_CREAT)

    def _take(self, create: int) -> int:
        if self._temporary is None:
            raise ValueError("the file is complete")
        flags = os.O_RDWR | create | os.O_CLOEXEC | os.O_NOFOLLOW
        fd = os.open(self.reach(self._temporary), flags, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as err:
            os.close(fd)
            raise TargetBusyError(self.show(self._temporary), "another restore of this backup") from err
        status = os.fstat(fd)
        if not is_called(status, self.reach(self._temporary)):
            # Whoever had it has just finished it, and it is complete, under its own name.
            os.close(fd)
            raise TargetBusyError(
                self.show(self._temporary), "another restore of this backup, which has just ended"
            )
        mine = stat.S_ISREG(status.st_mode) and status.st_uid == os.geteuid() and status.st_nlink == 1
        if mine and not status.st_mode & 0o077:
            return fd
        # Somebody else put it there, and may be reading along.
        os.close(fd)
        self._temporary = hidden_name(self._name_of(self._temporary))
        return os.open(self.reach(self._temporary), flags | os.O_EXCL, 0o600)

    @staticmethod
    def _name_of(hidden: str) -> str:
        return hidden[1:].rsplit(".", 2)[0]

    def _require_free(self, path: str, hidden: str) -> None:
        """Raise TargetExistsError, OSError unless a file can have the name.

        A name too long has to show now, not at the end.
        """
        try:
            status = os.lstat(self.reach(self._final))
        except FileNotFoundError:
            return
        # A restore that was killed right after it had named its file leaves the hidden name too.
        with contextlib.suppress(OSError):
            if os.path.samestat(status, os.lstat(self.reach(hidden))):
                os.unlink(self.reach(hidden))
        raise TargetExistsError(path)


class ExistingFileTarget(_FilePlace):
    """A file that is there, of which only parts are written; in the end it is as long as the backup."""

    def __init__(self, path: str, size: int, record: RestoreRecord) -> None:
        from blocksnap.system.mounts import loop_devices_of

        path = os.path.realpath(path)
        if is_being_written(path):
            loops = loop_devices_of(path)
            raise TargetBusyError(path, ", ".join(loops) or "a process that has it open for writing")
        try:
            fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
        except OSError as err:
            raise TargetFailedError(path, err) from err
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            loops = loop_devices_of(path)
            if loops:
                raise TargetBusyError(path, ", ".join(loops))
        except BlockingIOError as err:
            os.close(fd)
            raise TargetBusyError(path, "another program, which has locked it") from err
        except OSError as err:
            os.close(fd)
            raise TargetFailedError(path, err) from err
        except BaseException:
            os.close(fd)
            raise
        super().__init__(fd, path, size)
        self.wanted = record

    def begin(self) -> int:
        """Give a file that is shorter the backup's length, and write the record over the beginning."""
        try:
            if os.fstat(self._fd).st_size < self._size:
                os.ftruncate(self._fd, self._size)
        except OSError as err:
            raise self.failed(err) from err
        return self.begin_with(self.wanted)

    def clear(self, offset: int, length: int, *, hole: bool, progress: Progress) -> None:  # noqa: ARG002
        """Punch holes."""
        for at in range(offset, offset + length, blockdev.PIECE_BYTES):
            part = min(blockdev.PIECE_BYTES, offset + length - at)
            self.punch(at, part)
            progress(part)

    def flush(self) -> None:
        """Cut the file to the backup's length, and make what was written durable."""
        try:
            os.ftruncate(self._fd, self._size)
        except OSError as err:
            raise self.failed(err) from err
        super().flush()

    def finish(self) -> None:
        """Flush."""
        self.finish_writing()

    def reader(self) -> int:
        """Flush, and drop the page cache of the file so that it is really read."""
        return self.forget_cache()

    def close(self, *, keep: bool = False) -> bool:  # noqa: ARG002
        """Close; the record stays at the beginning of what is not finished."""
        begun = self._record is not None and self._fd >= 0
        try:
            if begun:
                self.take_back()
        finally:
            self.release()
        return begun


def is_called(status: os.stat_result, path: str) -> bool:
    """Tell whether a file that is open still has a name; follows no link."""
    try:
        return os.path.samestat(status, os.lstat(path))
    except OSError:
        return False
