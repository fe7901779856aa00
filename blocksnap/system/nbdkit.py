"""nbdkit(1), which serves a file as a network block device: a child that dies with this process.

It serves either whoever connects to a socket, or one connection that it inherits.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import tempfile
import time
from pathlib import Path
from types import TracebackType
from typing import Self

from blocksnap.errors import BlocksnapError
from blocksnap.system.children import inheritable
from blocksnap.system.command import path_of

_START_SECONDS = 20.0
_END_SECONDS = 10.0
_SHOWN_LINES = 3
LOOPBACK = "127.0.0.1"


class NbdkitError(BlocksnapError):
    """nbdkit does not serve (exit code 1)."""

    def __init__(self, reason: str) -> None:
        super().__init__(f"nbdkit does not serve: {reason}", resolution="see nbdkit(1)")


class Nbdkit:
    """A running server; a context manager that ends it."""

    def __init__(self, words: list[str], connection: socket.socket | None = None) -> None:
        """Start it with these words; raises MissingProgramError, NbdkitError."""
        path = path_of("nbdkit")
        self._said = tempfile.TemporaryFile()  # noqa: SIM115 - closed by close()
        fd = connection.fileno() if connection is not None else -1
        plain = (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDWR, 0)
        actions: list[tuple[int, int, str, int, int] | tuple[int, int, int] | tuple[int, int]] = [
            plain if fd < 0 else (os.POSIX_SPAWN_DUP2, fd, 0),
            (os.POSIX_SPAWN_DUP2, 0, 1),
            (os.POSIX_SPAWN_DUP2, self._said.fileno(), 2),
            *((os.POSIX_SPAWN_CLOSE, each) for each in inheritable()),
        ]
        argv = ["nbdkit", "--foreground", "--exit-with-parent", *words]
        environment = {"PATH": os.environ.get("PATH", os.defpath), "LC_ALL": "C", "TMPDIR": _roomy_folder()}
        try:
            self.pid = os.posix_spawn(
                path, argv, environment, file_actions=actions, setsid=True, setsigmask=(), setsigdef=()
            )
        except OSError as err:
            self._said.close()
            raise NbdkitError(os.strerror(err.errno or 0)) from err
        self._status: int | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def is_running(self) -> bool:
        """Tell whether it still runs."""
        if self._status is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self._status = os.waitstatus_to_exitcode(status)
        return self._status is None

    def wait(self, seconds: float) -> bool:
        """Wait so long for its end; tell whether it has ended."""
        deadline = time.monotonic() + seconds
        while self.is_running():
            if time.monotonic() >= deadline:
                return False
            time.sleep(0.02)
        return True

    def said(self) -> str:
        """Return the last lines of what it said."""
        self._said.seek(0)
        lines = self._said.read().decode(errors="replace").splitlines()
        return "; ".join(line.removeprefix("nbdkit: ") for line in lines[-_SHOWN_LINES:]) or "it has ended"

    def kill(self) -> None:
        """End it at once, so that it answers nothing any more."""
        if self.is_running():
            os.kill(self.pid, signal.SIGKILL)

    def close(self) -> None:
        """End it, at first by asking; a second call does nothing."""
        if self.is_running():
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGTERM)
            if not self.wait(_END_SECONDS):
                self.kill()
                self.wait(_END_SECONDS)
        self._said.close()


def serve_connection(path: str) -> tuple[Nbdkit, socket.socket, socket.socket]:
    """Serve a file, read-only, on one connection; return the server, the client's end of it, and its own.

    While its own is open here the client does not see that the server has ended.
    """
    ours, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        return Nbdkit(["--single", "--readonly", "file", path], its), ours, its
    except BaseException:
        ours.close()
        its.close()
        raise


def serve_socket(path: str, where: list[str], mark: Path, *, writable: bool) -> Nbdkit:
    """Serve a file to whoever connects; ``where`` are the words that name the socket.

    With ``writable`` what is written goes into an overlay that is gone with the server. ``mark`` is a path
    that it may use. Raises NbdkitError unless it serves.
    """
    overlay = ["--filter=cow"] if writable else ["--readonly"]
    server = Nbdkit(["--newstyle", "--pidfile", str(mark), *where, *overlay, "file", path])
    deadline = time.monotonic() + _START_SECONDS
    try:
        while not (mark.exists() and mark.stat().st_size):
            if server.wait(0.02):
                raise NbdkitError(server.said())
            if time.monotonic() > deadline:
                raise NbdkitError(f"it was not ready after {_START_SECONDS:g} s")
    except BaseException:
        server.close()
        raise
    return server


def _roomy_folder() -> str:
    """Return where the overlay goes: not into memory."""
    return os.environ.get("TMPDIR") or "/var/tmp"  # noqa: S108 - nbdkit's file has no name there
