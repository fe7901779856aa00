"""The process at the other end of a Unix socket: who it takes us for, and where its files are.

A server may run in a mount namespace or a root directory of its own (a container, a unit of systemd with
PrivateTmp), so a path that it tells is looked up in its view, through /proc/PID/root (proc(5)), not in ours.
"""

from __future__ import annotations

import errno
import os
import pwd
import socket
import stat
import struct
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from blocksnap.errors import UsageError
from blocksnap.system import mounts, sysfs

_CREDENTIALS = struct.Struct("=iII")
_MOST_LINKS = 40


class NoAccountError(UsageError):
    """There is no such user on this host (exit code 2)."""

    def __init__(self, account: str) -> None:
        self.account = account
        super().__init__(f"there is no user {account!r} on this host")


@contextmanager
def acting_as(account: str | None) -> Iterator[None]:
    """Connect as another user: the effective user of this thread, for as long as the block takes.

    Who is not root stays who they are. Raises NoAccountError, OSError.
    """
    if account is None or os.geteuid():
        yield
        return
    try:
        uid = pwd.getpwnam(account).pw_uid
    except KeyError as err:
        raise NoAccountError(account) from err
    from blocksnap import _native

    try:
        _native.act_as(uid)
        yield
    finally:
        _native.act_as(0)


def process_behind(fd: int) -> int:
    """Return the process that listens on the Unix socket that ``fd`` is connected to; raises OSError.

    0 when it is in a PID namespace that is not below ours.
    """
    with socket.socket(fileno=os.dup(fd)) as connection:
        said = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    pid: int = _CREDENTIALS.unpack(said)[0]
    return pid


def real_path(pid: int, path: str) -> str:
    """Follow the links in an absolute path as process ``pid`` would; return what it calls the place.

    Raises OSError.
    """
    root, here, links = f"/proc/{pid}/root", "", 0
    words = path.split("/")
    while words:
        word = words.pop(0)
        if word in ("", "."):
            continue
        if word == "..":
            here = os.path.dirname(here)
            continue
        place = f"{here}/{word}"
        if not os.path.islink(root + place):
            os.lstat(root + place)
            here = place
            continue
        links += 1
        if links > _MOST_LINKS:
            raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), path)
        target = os.readlink(root + place)
        here = "" if target.startswith("/") else here
        words = [*target.split("/"), *words]
    return here or "/"


def filesystem_at(pid: int, path: str) -> frozenset[int]:
    """Return by which numbers the filesystem is known that process ``pid`` sees at a path; raises OSError.

    They are that of mountinfo and that of stat, which is another one in each subvolume of a btrfs. A block
    device is not on the filesystem that has its node: it is its own.
    """
    place = real_path(pid, path)
    status = os.stat(f"/proc/{pid}/root{place}")
    if stat.S_ISBLK(status.st_mode):
        return frozenset({status.st_rdev})
    text = sysfs.exact_text(Path(f"/proc/{pid}/mountinfo"))
    mount = mounts.mount_at(place, mounts.parse_mountinfo(text))
    return frozenset({status.st_dev} if mount is None else {status.st_dev, mount.device})


def is_in_group(pid: int, folders: Iterable[str]) -> bool:
    """Tell whether a process is in one of these control groups (version 2), or in one below."""
    from blocksnap.system import cgroup

    return any(pid in cgroup.processes(Path(folder)) for folder in folders)
