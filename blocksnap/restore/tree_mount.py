"""The process that mounts a tree where everybody sees it, for another one that serves it.

That one has mounts of its own, and may be killed at any time. So this one mounts, hands over the connection,
and waits: when the other is gone it unmounts. What it is told is one byte: the user has unmounted it already.
"""

from __future__ import annotations

import os
import signal
import socket
from contextlib import suppress

from blocksnap.errors import BlocksnapError
from blocksnap.system import namespace

MOUNTED = b"mounted"
GONE = b"g"
_MESSAGE_BYTES = 4096


class NoTreeError(BlocksnapError):
    """The tree of backups cannot be shown."""

    def __init__(self, folder: str, reason: str) -> None:
        self.folder = folder
        super().__init__(f"cannot mount on {folder}: {reason}", resolution="name an empty directory")


def hold_tree(folder: str, control: socket.socket) -> bool:
    """Mount and wait; tell whether it could be mounted."""
    signal.set_wakeup_fd(-1)
    try:
        connection = namespace.mount_fuse(folder)
    except namespace.NotMountedError as err:
        control.sendall(b"failed " + os.strerror(err.errno or 0).encode())
        return False
    try:
        socket.send_fds(control, [MOUNTED], [connection])
    except OSError:
        namespace.unmount(folder)
        return True
    finally:
        os.close(connection)
    said = b""
    # It is an error when the other one has ended before it took the connection.
    with suppress(OSError):
        said = control.recv(1)
    if said != GONE:
        namespace.unmount(folder)
    return True


def take_connection(control: socket.socket, folder: str) -> int:
    """Return the connection of what the other process has mounted; raises NoTreeError."""
    answer, fds, _, _ = socket.recv_fds(control, _MESSAGE_BYTES, 1)
    if answer != MOUNTED or not fds:
        raise NoTreeError(folder, answer.partition(b" ")[2].decode() or "its process has died")
    os.set_inheritable(fds[0], False)
    return fds[0]
