"""Run a command so that nothing of it is left when it ends, is killed, or its caller dies.

It is the first process of a PID namespace of its own (unshare(1)), with which all others end, daemons too.
For commands that may be killed at any point: never those of LVM.
"""

from __future__ import annotations

import os
import signal
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from blocksnap.errors import BlocksnapError
from blocksnap.system.command import path_of

_CONTAINED = (
    "setpriv",
    "--pdeathsig",
    "KILL",
    "unshare",
    "--pid",
    "--fork",
    "--kill-child",
    "--mount-proc",
    "--",
)
_SHOWN_BYTES = 4000
_ENVIRONMENT = {
    "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
    "LC_ALL": "C",
    "HOME": "/root",
}
TIMED_OUT = -1


@dataclass(frozen=True, slots=True)
class Contained:
    """How it ended, TIMED_OUT if it was killed for its time; and the last that it said."""

    status: int
    said: str


def run_contained(
    argv: Sequence[str], *, timeout_seconds: float, environment: Mapping[str, str] | None = None
) -> Contained:
    """Run it to its end; raises MissingProgramError, BlocksnapError when it cannot be started."""
    path_of(argv[0])
    words = [*_CONTAINED, *argv]
    with tempfile.TemporaryFile() as said:
        actions = [
            (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
            (os.POSIX_SPAWN_DUP2, said.fileno(), 1),
            (os.POSIX_SPAWN_DUP2, said.fileno(), 2),
        ]
        try:
            pid = os.posix_spawn(
                path_of(words[0]),
                words,
                {**_ENVIRONMENT, **(environment or {})},
                file_actions=actions,
                setsid=True,
                setsigmask=(),
                setsigdef=(signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGPIPE),
            )
        except OSError as err:
            raise BlocksnapError(f"{argv[0]} cannot be started: {os.strerror(err.errno or 0)}") from err
        try:
            status = _await(pid, timeout_seconds)
        except BaseException:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            raise
        size = said.seek(0, os.SEEK_END)
        said.seek(max(size - _SHOWN_BYTES, 0))
        return Contained(status, said.read().decode(errors="replace").strip())


def _await(pid: int, seconds: float) -> int:
    deadline, pause = time.monotonic() + seconds, 0.005
    while True:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            code = os.waitstatus_to_exitcode(status)
            return code if code >= 0 else 128 - code
        if time.monotonic() > deadline:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            return TIMED_OUT
        time.sleep(pause)
        pause = min(pause * 2, 0.2)
