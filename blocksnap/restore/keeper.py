"""A process that outlives this one by a moment, in which it puts right what must not stay as it is.

A server whose images are gone must say nothing any more.

When the process that serves images over FUSE dies, the kernel answers all reads of them with an error, and
nbdkit would pass that on to a filesystem that is in use. So this one holds the FUSE connection open as well:
reads then wait. When its parent is gone it kills nbdkit first, and then lets go. What nbdkit had not answered
waits in the kernel's nbd client for the next server.

A device that stands still while its table is exchanged must not be left so: it goes on by the one it has.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Self

from blocksnap.errors import BlocksnapError
from blocksnap.system import dm_tables
from blocksnap.system.children import fork_child, wait_for_child

_FUSE_NODE = "/dev/fuse"
_FUSE, _SERVER, _DEVICE = b"f", b"s", b"d"
_WORD_BYTES = 256
"""Names in device-mapper have 127 bytes."""


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

    @contextmanager
    def letting_go_on(self, device: str) -> Iterator[None]:
        """Have it let a device of device-mapper go on, if that stands still when we are gone in the block."""
        self._ours.send(_DEVICE + device.encode())
        yield
        self._ours.send(_DEVICE)


def _keep(control: socket.socket) -> bool:
    held: dict[bytes, int] = {}
    device = ""
    while True:
        word, fds, _, _ = socket.recv_fds(control, _WORD_BYTES, 1)
        if not word:
            break
        if word.startswith(_DEVICE):
            device = word.removeprefix(_DEVICE).decode()
            continue
        if word in held:
            os.close(held[word])
        held[word] = fds[0]
    if _SERVER in held:
        with contextlib.suppress(OSError):
            signal.pidfd_send_signal(held[_SERVER], signal.SIGKILL)
    if device:
        with contextlib.suppress(BlocksnapError):
            dm_tables.go_on(device)
    return True
