"""Where a tree is restored: a hidden directory that gets its name when it is complete.

On btrfs it is a subvolume of its own. It is ours alone until then, and locked; what an interrupted restore
of the same backup left there is removed by the next. The directory that it is in may be renamed meanwhile.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import stat
from types import TracebackType
from typing import Self

from blocksnap.errors import TargetError
from blocksnap.restore.descent import Descent
from blocksnap.restore.naming import flush_open_folder, give_name, hidden_name
from blocksnap.restore.targets import NameFailedError, NameTakenError, TargetBusyError, TargetFailedError
from blocksnap.system import btrfs
from blocksnap.system.btrfs_places import create_subvolume
from blocksnap.system.file_attributes import APPEND, IMMUTABLE, clear_flags
from blocksnap.system.files import flush_filesystem_of

_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


class TreeExistsError(TargetError):
    """Something stands where the restored tree would go."""

    def __init__(self, path: str) -> None:
        self.path = path
        super().__init__(
            f"{path} exists already", resolution="name a directory that does not exist; it will be made"
        )


class NewTree:
    """A context with a new, empty directory; leaving it without ``finish`` removes it."""

    def __init__(self, path: str, token: str) -> None:
        self._path = os.path.abspath(path)
        self._hidden = hidden_name(self._path, token)
        self._parent = self._fd = -1
        self._finished = False
        self.is_subvolume = False

    def __enter__(self) -> Self:
        """Make it; raises TreeExistsError, TargetBusyError, TargetFailedError."""
        folder, name = os.path.split(self._hidden)
        try:
            self._parent = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError as err:
            raise TargetFailedError(self._path, err) from err
        try:
            if os.path.lexists(self._in_parent(self._path)):
                raise TreeExistsError(self._path)
            self._remove_leftover(self._parent, name)
            self.is_subvolume = _make(self._parent, name)
            self._fd = os.open(name, _FOLDER, dir_fd=self._parent)
            os.fchmod(self._fd, 0o700)
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BaseException as err:
            self._close()
            if isinstance(err, OSError):
                raise TargetFailedError(self._hidden, err) from err
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, err: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._finished:
            with contextlib.suppress(OSError, TargetError):
                remove_open_tree(self._fd, self._parent, os.path.basename(self._hidden))
        self._close()

    @property
    def fd(self) -> int:
        """The directory."""
        return self._fd

    @property
    def hidden(self) -> str:
        """Its path as long as it is not complete."""
        return self._hidden

    def flush(self) -> None:
        """Make everything durable; raises OSError, also for what was lost since the tree was begun."""
        flush_filesystem_of(self._fd)

    def finish(self) -> None:
        """Give it its name, durably; raises NameTakenError, NameFailedError: then it stays, complete."""
        self._finished = True
        try:
            give_name(self._in_parent(self._hidden), self._in_parent(self._path))
        except FileExistsError as err:
            raise NameTakenError(self._path, self._hidden) from err
        except OSError as err:
            raise NameFailedError(self._path, self._hidden, err) from err
        flush_open_folder(self._parent)

    def _in_parent(self, path: str) -> str:
        return f"/proc/self/fd/{self._parent}/{os.path.basename(path)}"

    def _close(self) -> None:
        for fd in (self._fd, self._parent):
            if fd >= 0:
                os.close(fd)
        self._fd = self._parent = -1

    def _remove_leftover(self, parent: int, name: str) -> None:
        try:
            fd = os.open(name, _FOLDER, dir_fd=parent)
        except FileNotFoundError:
            return
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.fstat(fd).st_uid != os.geteuid():
                raise TreeExistsError(self._hidden)
            remove_open_tree(fd, parent, name)
        except BlockingIOError as err:
            raise TargetBusyError(self._hidden, "another restore") from err
        finally:
            os.close(fd)


def _make(parent: int, name: str) -> bool:
    """Make a subvolume where that is possible, else a directory; tell which."""
    try:
        btrfs.filesystem_info(parent)
        create_subvolume(parent, name)
    except (btrfs.NoSubvolumeError, btrfs.BtrfsError):
        os.mkdir(name, 0o700, dir_fd=parent)
        return False
    return True


def remove_tree(parent: int, name: str) -> None:
    """Remove a subvolume whole, or a directory with all that is in it; raises OSError."""
    fd = os.open(name, _FOLDER, dir_fd=parent)
    try:
        remove_open_tree(fd, parent, name)
    finally:
        os.close(fd)


def remove_open_tree(fd: int, parent: int, name: str) -> None:
    """Remove the same when it is open, and nothing else, whatever has its name by now; raises OSError.

    One that has another name is emptied and stays.
    """
    clear_flags_of(fd)
    if os.fstat(fd).st_ino == btrfs.TOP_DIRECTORY:
        try:
            btrfs.filesystem_info(fd)
            btrfs.delete_subvolume(parent, fd)
        except (btrfs.NoSubvolumeError, btrfs.BtrfsError):
            pass
        else:
            return
    _empty(fd)
    if os.path.samestat(os.stat(name, dir_fd=parent, follow_symlinks=False), os.fstat(fd)):
        os.rmdir(name, dir_fd=parent)


def _empty(top_fd: int) -> None:
    """Remove all that is in a directory, however deep that is, and follow no link."""
    # Opened anew: btrfs tells what came since only then (6.5, btrfs_opendir).
    descent, entered = Descent(os.open(".", _FOLDER, dir_fd=top_fd)), list[str]()
    left = [_remove_files(descent.fd)]
    try:
        while True:
            if left[-1]:
                entered.append(left[-1].pop())
                descent.enter(os.open(entered[-1], _FOLDER, dir_fd=descent.fd))
                left.append(_remove_files(descent.fd))
                continue
            left.pop()
            if not left:
                return
            descent.leave()
            os.rmdir(entered.pop(), dir_fd=descent.fd)
    finally:
        descent.close()


def _remove_files(folder: int) -> list[str]:
    """Remove what is in a directory but other directories; return their names, ready to be entered."""
    clear_flags_of(folder)
    folders = []
    for name in os.listdir(folder):
        mode = os.stat(name, dir_fd=folder, follow_symlinks=False).st_mode
        if stat.S_ISREG(mode) or stat.S_ISDIR(mode):
            _allow_removal(folder, name, mode)
        if stat.S_ISDIR(mode):
            folders.append(name)
        else:
            os.unlink(name, dir_fd=folder)
    return folders


def _allow_removal(folder: int, name: str, mode: int) -> None:
    """Take from a file or directory what forbids its removal."""
    try:
        fd = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=folder)
    except PermissionError:
        # Who is not root cannot have set such flags.
        pass
    else:
        try:
            clear_flags_of(fd)
        finally:
            os.close(fd)
    if stat.S_ISDIR(mode) and mode & stat.S_IRWXU != stat.S_IRWXU:
        os.chmod(name, stat.S_IRWXU, dir_fd=folder)


def clear_flags_of(fd: int) -> None:
    """Take from an inode what forbids its removal, where its filesystem knows of such things."""
    try:
        clear_flags(fd, IMMUTABLE | APPEND)
    except OSError as err:
        if err.errno not in (errno.ENOTTY, errno.EOPNOTSUPP, errno.EPERM, errno.EINVAL):
            raise
