"""A process that sees to it that a server whose images are gone says nothing any more.

When the process that serves images over FUSE dies, the kernel answers all reads of them with an error, and
nbdkit would pass that on to a filesystem that is in use. So this one holds the FUSE connection open as well:
reads then wait. When its parent is gone it kills nbdkit first, and then lets go. What nbdkit had not answered
waits in the kernel's nbd client for the next server.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
from types import TracebackType
from typing import Self

from blocksnap.system.children import fork_child, wait_for_child

_FUSE_NODE = "/dev/fuse"
_FUSE, _SERVER = b"f", b"s"


class Keeper:
    """A context manager; fork it while there is one thread."""

    def __init__(self) -> None:
        self._ours, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)

        def work() -> bool:
            self._ours.close()
            return _keep(its)

        self._pid = fork_child(work)
        its.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ours.close()
        wait_for_child(self._pid)

    def hold_images(self) -> None:
        """Have it hold the FUSE connections of this process."""
        for entry in os.scandir("/proc/self/fd"):
            with contextlib.suppress(OSError):
                if os.readlink(entry.path) == _FUSE_NODE:
                    socket.send_fds(self._ours, [_FUSE], [int(entry.name)])

    def watch(self, pid: int) -> None:
        """Have it kill this child of ours, instead of the one before, when we are gone."""
        fd = os.pidfd_open(pid)
        try:
            socket.send_fds(self._ours, [_SERVER], [fd])
        finally:
            os.close(fd)


def _keep(control: socket.socket) -> bool:
    held: dict[bytes, int] = {}
    while True:
        word, fds, _, _ = socket.recv_fds(control, 1, 1)
        if not word:
            break
        if word in held:
            os.close(held[word])
        held[word] = fds[0]
    if _SERVER in held:
        with contextlib.suppress(OSError):
            signal.pidfd_send_signal(held[_SERVER], signal.SIGKILL)
    return True
