"""Whether somebody may write to a file that is open here, and how what was written becomes durable."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
from typing import Literal

from blocksnap.system import cgroup
from blocksnap.system.host import process_start
from blocksnap.system.openers import file_writers

Writers = Literal["none", "frozen", "running"]
"""Who has a file open, or mapped, for writing: nobody, processes that are frozen, or anybody else."""
_LOOKS = 3


def is_being_written(path: str) -> bool:
    """Tell whether anybody has a file open, or mapped, for writing, a loop device too.

    False also for what is not there, or not ours to open, and where ``is_open_for_writing`` cannot ask.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError:
        return False
    try:
        return is_open_for_writing(fd)
    finally:
        os.close(fd)


def flush_filesystem_of(fd: int) -> None:
    """Write out all that is dirty in the filesystem of an open file (syncfs); raises OSError.

    Also for what was lost since it was opened: the kernel tells that once to each open file, and to one that
    is opened later only if nobody has been told yet (errseq_t).
    """
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    if libc.syncfs(fd):
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))


def is_open_for_writing(fd: int) -> bool:
    """Tell the same of a file that is open here, for reading only.

    A read lease is granted only where nobody has (fcntl(2), F_SETLEASE); it is given back at once. False also
    where the filesystem or our rights do not let us ask.
    """
    try:
        # Who opens it in this very moment makes the kernel send us a signal; SIGIO would end the process.
        fcntl.fcntl(fd, fcntl.F_SETSIG, signal.SIGURG)
        fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_RDLCK)
        fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_UNLCK)
    except OSError as err:
        return err.errno == errno.EAGAIN
    return False


def who_writes(fd: int) -> Writers:
    """Say who has a file that is open here for reading open for writing.

    ``frozen`` if all processes of which /proc tells that are in control groups that stand still; that the
    kernel itself (a loop device, a file server) does not write besides is not known then.
    """
    for _ in range(_LOOKS):
        if not is_open_for_writing(fd):
            return "none"
        pids = set(file_writers(fd))
        running = [pid for pid in pids if not cgroup.stands_still(pid)]
        if pids and not running:
            return "frozen"
        # Who has ended does not write any more, but may have left the file open to a child.
        if all(process_start(pid) is not None for pid in running):
            break
    return "running" if is_open_for_writing(fd) else "none"
