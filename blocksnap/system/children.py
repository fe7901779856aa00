"""Processes forked from this one, which do their work and end, never to return; and what children inherit."""

from __future__ import annotations

import contextlib
import os
import signal
import traceback
from collections.abc import Callable

_ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def fork_child(work: Callable[[], bool]) -> int:
    """Fork while there is one thread; the child does ``work``, which tells whether it went well.

    The child ignores what ends the parent, which ends it in its own way. None of the parent's handlers,
    buffers and contexts are run down in it.
    """
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        for number in _ENDING:
            signal.signal(number, signal.SIG_IGN)
        status = 0 if work() else 1
    except BaseException:  # noqa: BLE001 - a bug, and this is the last place that can tell of it
        os.write(2, traceback.format_exc().encode(errors="replace"))
    finally:
        os._exit(status)


def inheritable() -> list[int]:
    """Return the descriptors beyond the standard three that a program would get; ours are none of them."""
    found = []
    for name in os.listdir("/proc/self/fd"):
        # The one that the listing itself used is gone.
        with contextlib.suppress(OSError):
            if int(name) > 2 and os.get_inheritable(int(name)):
                found.append(int(name))
    return found


def wait_for_child(pid: int) -> int:
    """Wait for the end of a child; return its exit status, or minus the signal that killed it."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
