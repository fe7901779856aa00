"""A folder beside those that are made of what is in it: ours alone, and gone when they have their names."""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

from blocksnap.restore.naming import give_name
from blocksnap.restore.tree_place import remove_tree

_NAME = re.compile(r"\.blocksnap-[a-z0-9_]{8}\.partial")
_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


@contextmanager
def private_folder(above: str) -> Iterator[tuple[str, int]]:
    """Make one in the directory ``above``; yield its path and descriptor; it goes at the end.

    What is in it nobody else can put anything in the way of, such as a link that would be followed. It is
    locked: one that is not was left behind by a process that was killed, and is removed. Raises OSError.
    """
    parent = os.open(above, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        _remove_leftovers(parent)
        private, fd = _make(above)
        try:
            yield private, fd
        finally:
            with contextlib.suppress(OSError):
                remove_tree(parent, os.path.basename(private))
            os.close(fd)
    finally:
        os.close(parent)


def take_out(private: str, name: str, folder: str) -> None:
    """Give what is complete in a private folder its name in another; raises FileExistsError, OSError.

    A directory that may not be written to is not moved for anybody but root, since its own ".." changes
    (rename(2)). So that is allowed for as long.
    """
    made, path = os.path.join(private, name), os.path.join(folder, name)
    try:
        give_name(made, path)
    except PermissionError:
        mode = os.stat(made, follow_symlinks=False).st_mode
        if not stat.S_ISDIR(mode) or mode & stat.S_IWUSR:
            raise
        os.chmod(made, stat.S_IMODE(mode) | stat.S_IRWXU)
        fd = os.open(made, _FOLDER)
        try:
            give_name(made, path)
        finally:
            os.fchmod(fd, stat.S_IMODE(mode))
            os.close(fd)


def _make(above: str) -> tuple[str, int]:
    while True:
        private = tempfile.mkdtemp(prefix=".blocksnap-", suffix=".partial", dir=above)
        fd = -1
        try:
            fd = os.open(private, _FOLDER)
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.stat(private, follow_symlinks=False), os.fstat(fd)):
                return private, fd
        except (FileNotFoundError, BlockingIOError):
            # Another process took it for one that was left behind, before it was locked.
            pass
        if fd >= 0:
            os.close(fd)


def _remove_leftovers(parent: int) -> None:
    with os.scandir(parent) as found:
        names = [entry.name for entry in found if _NAME.fullmatch(entry.name)]
    for name in names:
        with contextlib.suppress(OSError):
            fd = os.open(name, _FOLDER, dir_fd=parent)
            try:
                status = os.fstat(fd)
                if status.st_uid == os.geteuid() and stat.S_IMODE(status.st_mode) == stat.S_IRWXU:
                    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    remove_tree(parent, name)
            finally:
                os.close(fd)
