"""What the kernel knows of who uses a file."""

from __future__ import annotations

import errno
import fcntl
import os


def is_being_written(path: str) -> bool:
    """Tell whether anybody has a file open, or mapped, for writing, a loop device too.

    A read lease is granted only where nobody has (fcntl(2), F_SETLEASE); it is given back at once. False also
    where the filesystem or our rights do not let us ask, and for what is not there.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError:
        return False
    try:
        fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_RDLCK)
        fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_UNLCK)
    except OSError as err:
        return err.errno == errno.EAGAIN
    else:
        return False
    finally:
        os.close(fd)
