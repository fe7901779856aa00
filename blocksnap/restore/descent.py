"""A way down a tree of directories and up again by descriptors, of which few are open however deep it is."""

from __future__ import annotations

import errno
import os
from collections import deque

_HELD = 32
_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


class Descent:
    """Where a walk is: in the directory that was entered last. Takes the descriptors that it is given over.

    A directory that was closed meanwhile is opened again as ``..`` of the one below it, which no link can be,
    and has to be the one that was left (device and inode, which the kernel holds while something below is
    open). That is done when the walk comes back to that one below, which may forbid it once it is complete.
    """

    def __init__(self, fd: int) -> None:
        self._open = deque([fd])
        self._closed: list[tuple[int, int]] = []

    @property
    def fd(self) -> int:
        """The directory in which the walk is."""
        return self._open[-1]

    def enter(self, fd: int) -> None:
        """Go on in a directory of the one in which the walk is."""
        self._open.append(fd)
        if len(self._open) > _HELD:
            self._closed.append(identity_of(self._open[0]))
            os.close(self._open.popleft())

    def leave(self) -> None:
        """Go back to the one above; raises OSError, ESTALE when it is not above any more."""
        os.close(self._open.pop())
        if len(self._open) == 1 and self._closed:
            above = os.open("..", _FOLDER, dir_fd=self._open[0])
            self._open.appendleft(above)
            if identity_of(above) != self._closed.pop():
                raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))

    def close(self) -> None:
        """Let go of all; a second call does nothing."""
        while self._open:
            os.close(self._open.pop())


def identity_of(fd: int) -> tuple[int, int]:
    """Return device and inode of what is open."""
    status = os.fstat(fd)
    return status.st_dev, status.st_ino
