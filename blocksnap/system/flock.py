"""Locks of whole files (flock(2)), which the kernel takes back when their holder dies."""

from __future__ import annotations

import fcntl


def try_lock(fd: int, *, shared: bool = False) -> bool:
    """Lock an open file if nobody is in the way, and tell whether that was so."""
    try:
        fcntl.flock(fd, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
