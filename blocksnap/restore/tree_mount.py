"""The process that mounts a tree where everybody sees it, for another one that serves it.

That one has mounts of its own, and may be killed at any time. So this one mounts, hands over the connection,
and waits: when the other is gone it unmounts. What it is told is one byte: the connection has ended. It sees
whether the user has unmounted the tree, or somebody has aborted the connection, and answers that.
"""

from __future__ import annotations

import os
import signal
import socket
from contextlib import suppress
from pathlib import Path

from blocksnap.errors import BlocksnapError
from blocksnap.system import namespace, own_mount, sysfs
from blocksnap.system.mounts import parse_mountinfo

MOUNTED = b"mounted"
GONE = b"g"
UNMOUNTED, ABORTED = b"unmounted", b"aborted"
"""What the process that mounts says at its end; or it has failed, with a reason."""
_FAILED = b"failed "
_MESSAGE_BYTES = 4096
_READ_AHEAD_KIB = 4096
_DIED = "the process that mounts it has died"
SEVERED = "its FUSE connection was aborted"


class NoTreeError(BlocksnapError):
    """The tree of backups cannot be shown."""

    def __init__(self, folder: str, reason: str) -> None:
        self.folder = folder
        super().__init__(f"cannot mount on {folder}: {reason}", resolution="name an empty directory")


class TreeLostError(BlocksnapError):
    """The tree of backups was shown, and ended without being unmounted by its user (exit code 1)."""

    def __init__(self, folder: str, reason: str) -> None:
        self.folder, self.reason = folder, reason
        super().__init__(
            f"nothing is shown in {folder} any more: {reason}", resolution="run the same command again"
        )


class TreeEnd:
    """How the process that serves learns of the end, and why it came: the first reason that is told holds."""

    def __init__(self, control: socket.socket, folder: str) -> None:
        self._control, self._folder = control, folder
        self._reason = ""

    def severed(self) -> None:
        """The connection of the tree has ended: the other process knows why."""
        with suppress(OSError):
            self._control.sendall(GONE)

    def because(self, reason: str) -> None:
        """End it: what it is made of cannot be served any more."""
        self._reason = self._reason or reason
        with suppress(OSError):
            self._control.shutdown(socket.SHUT_RDWR)

    def wait(self) -> None:
        """Wait for the user to unmount the tree; raises TreeLostError when it ends in another way."""
        try:
            said = self._control.recv(_MESSAGE_BYTES)
        except OSError:
            # It is one for the other process to have died with something that it was told unread.
            said = b""
        if self._reason or said != UNMOUNTED:
            raise TreeLostError(self._folder, self._reason or _reason(said, SEVERED))


def read_further_ahead(mounts: str, source: str) -> None:
    """Have the kernel ask for more at a time; without it everything works, only slower.

    ``mounts`` is the table of mounts to find it in. A file that was opened before keeps what it had.
    """
    with suppress(OSError):
        for mount in parse_mountinfo(sysfs.exact_text(Path(mounts))):
            if mount.source == source:
                bdi = f"/sys/class/bdi/{os.major(mount.device)}:{os.minor(mount.device)}/read_ahead_kb"
                Path(bdi).write_text(f"{_READ_AHEAD_KIB}\n")


def tell_end(control: socket.socket, source: str, failure: str = "") -> None:
    """Unmount the tree if it is still mounted, and say why it ended: that, or ``failure``."""
    is_there = own_mount.is_there(source)
    own_mount.unmount(source)
    # It is an error when the other one has ended.
    with suppress(OSError):
        if failure:
            control.sendall(_FAILED + failure.encode())
        else:
            control.sendall(ABORTED if is_there else UNMOUNTED)


def tell_failure(control: socket.socket, reason: str) -> None:
    """Say why it could not be mounted."""
    with suppress(OSError):
        control.sendall(_FAILED + reason.encode())


def hold_tree(folder: str, source: str, control: socket.socket) -> bool:
    """Mount and wait; tell whether it could be mounted."""
    signal.set_wakeup_fd(-1)
    try:
        connection = namespace.mount_fuse(folder, source)
    except namespace.NotMountedError as err:
        tell_failure(control, os.strerror(err.errno or 0))
        return False
    said = b""
    try:
        # It is an error when the other one has ended before it took the connection.
        with suppress(OSError):
            socket.send_fds(control, [MOUNTED], [connection])
            os.close(connection)
            connection = -1
            said = control.recv(1)
    finally:
        if connection >= 0:
            os.close(connection)
    if said == GONE:
        tell_end(control, source)
    else:
        own_mount.unmount(source)
    return True


def take_connection(control: socket.socket, folder: str) -> int:
    """Return the connection of what the other process has mounted; raises NoTreeError."""
    answer, fds, _, _ = socket.recv_fds(control, _MESSAGE_BYTES, 1)
    if answer != MOUNTED or not fds:
        raise NoTreeError(folder, _reason(answer, _DIED))
    os.set_inheritable(fds[0], False)
    return fds[0]


def require_mounted(answer: bytes, folder: str) -> None:
    """Raise NoTreeError unless the other process has said that it has mounted the tree."""
    if answer != MOUNTED:
        raise NoTreeError(folder, _reason(answer, _DIED))


def _reason(said: bytes, severed: str) -> str:
    """Return what the process that mounts meant, or that it cannot say anything any more."""
    if said.startswith(_FAILED):
        return said.removeprefix(_FAILED).decode(errors="replace")
    return severed if said == ABORTED else _DIED
