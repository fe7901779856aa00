"""A folder beside those that are made of what is in it: ours alone, and gone when they have their names."""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from blocksnap.restore.naming import give_name
from blocksnap.restore.tree_place import remove_open_tree

_NAME = re.compile(r"\.blocksnap-[a-z0-9_]{8}\.partial")
_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


@dataclass(frozen=True, slots=True)
class PrivateFolder:
    """One that was made, by descriptor, as is the directory that it is in.

    Whoever owns that may give the folder another name, and put a link in its place: no path is used.
    """

    path: str
    """What it was called, for messages."""
    fd: int
    parent: int

    @property
    def path_for_programs(self) -> str:
        """The path by which programs that we start find it, whatever it is called by then."""
        return f"/proc/{os.getpid()}/fd/{self.fd}"

    def names(self) -> list[str]:
        """Return what is in it by now, which btrfs tells only to who opens it anew (6.5, btrfs_opendir)."""
        fd = os.open(".", _FOLDER, dir_fd=self.fd)
        try:
            return os.listdir(fd)
        finally:
            os.close(fd)

    def take_out(self, name: str) -> None:
        """Give what is complete its name in the directory above; raises FileExistsError, OSError.

        A directory that may not be written to is not moved for anybody but root, since its own ".." changes
        (rename(2)). So that is allowed for as long.
        """
        made, path = f"/proc/self/fd/{self.fd}/{name}", f"/proc/self/fd/{self.parent}/{name}"
        try:
            give_name(made, path)
        except PermissionError:
            mode = os.stat(name, dir_fd=self.fd, follow_symlinks=False).st_mode
            if not stat.S_ISDIR(mode) or mode & stat.S_IWUSR:
                raise
            os.chmod(name, stat.S_IMODE(mode) | stat.S_IRWXU, dir_fd=self.fd)
            fd = os.open(name, _FOLDER, dir_fd=self.fd)
            try:
                give_name(made, path)
            finally:
                os.fchmod(fd, stat.S_IMODE(mode))
                os.close(fd)


@contextmanager
def private_folder(above: str) -> Iterator[PrivateFolder]:
    """Make one in the directory ``above``; it goes at the end.

    What is in it nobody else can put anything in the way of, such as a link that would be followed. It is
    locked: one that is not was left behind by a process that was killed, and is removed. Raises OSError.
    """
    parent = os.open(above, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        _remove_leftovers(parent)
        name, fd = _make(parent)
        try:
            yield PrivateFolder(os.path.join(above, name), fd, parent)
        finally:
            with contextlib.suppress(OSError):
                remove_open_tree(fd, parent, name)
            os.close(fd)
    finally:
        os.close(parent)


def _make(parent: int) -> tuple[str, int]:
    while True:
        name = f".blocksnap-{secrets.token_hex(4)}.partial"
        fd = -1
        try:
            os.mkdir(name, 0o700, dir_fd=parent)
            fd = os.open(name, _FOLDER, dir_fd=parent)
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            status = os.fstat(fd)
            found = os.stat(name, dir_fd=parent, follow_symlinks=False)
            if _is_private(status) and os.path.samestat(found, status) and not os.listdir(fd):
                return name, fd
        except (FileExistsError, FileNotFoundError, BlockingIOError):
            # Another process took it for one that was left behind, before it was locked.
            pass
        if fd >= 0:
            os.close(fd)


def _is_private(status: os.stat_result) -> bool:
    return status.st_uid == os.geteuid() and stat.S_IMODE(status.st_mode) == stat.S_IRWXU


def _remove_leftovers(parent: int) -> None:
    """Leave them where somebody else could have given that name to another directory of ours."""
    status = os.fstat(parent)
    is_shared = status.st_mode & (stat.S_IWGRP | stat.S_IWOTH) and not status.st_mode & stat.S_ISVTX
    if is_shared or status.st_uid not in (0, os.geteuid()):
        return
    with os.scandir(parent) as found:
        names = [entry.name for entry in found if _NAME.fullmatch(entry.name)]
    for name in names:
        with contextlib.suppress(OSError):
            fd = os.open(name, _FOLDER, dir_fd=parent)
            try:
                if _is_private(os.fstat(fd)):
                    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    remove_open_tree(fd, parent, name)
            finally:
                os.close(fd)
