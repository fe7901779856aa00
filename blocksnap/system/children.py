"""Processes forked from this one: they do their work and end, whatever happens, and never return here."""

from __future__ import annotations

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


def wait_for_child(pid: int) -> int:
    """Wait for the end of a child; return its exit status, or minus the signal that killed it."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
