"""Locks of whole files (flock(2)), which the kernel takes back when their holder dies."""

from __future__ import annotations

import fcntl
import time

_PAUSE_SECONDS = 0.02


def try_lock(fd: int, *, shared: bool = False) -> bool:
    """Lock an open file if nobody is in the way, and tell whether that was so."""
    try:
        fcntl.flock(fd, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def lock_within(fd: int, seconds: float) -> bool:
    """Lock an open file as soon as nobody is in the way, and tell whether that was within so many seconds.

    For files that others lock for an instant, to see whether somebody holds them.
    """
    until = time.monotonic() + seconds
    while not try_lock(fd):
        if time.monotonic() >= until:
            return False
        time.sleep(_PAUSE_SECONDS)
    return True
