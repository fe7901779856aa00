"""Where a backup is written to: the contract of a target, and what can be wrong with one.

A target is never left looking whole when it is not: a file gets its name when it is complete, and of whatever
else is written the beginning comes last (``restore.record``).
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable
from typing import BinaryIO, Protocol

from blocksnap.errors import DamageError, TargetError


class TargetExistsError(TargetError):
    """A file stands where the restored one would go."""

    def __init__(self, path: str) -> None:
        self.path = path
        super().__init__(
            f"{path} exists already",
            resolution="name another file, remove this one first, or write over what differs with --in-place",
        )


class NameTakenError(TargetExistsError):
    """A file has appeared where the restored one was to go."""

    def __init__(self, path: str, complete: str) -> None:
        super().__init__(path)
        self.complete = complete
        self.resolution = f"the restored file is complete: it is {complete}; give it another name"


class NameFailedError(TargetError):
    """The restored file is complete and cannot be given its name."""

    def __init__(self, path: str, complete: str, err: OSError) -> None:
        self.path, self.complete = path, complete
        self.errno = err.errno
        super().__init__(
            f"cannot give the restored file the name {path}: {_reason(err)}",
            resolution=f"it is complete: rename {complete}",
        )


class TargetTooSmallError(TargetError):
    """The device has fewer bytes than the backup."""

    def __init__(self, path: str, size: int, needed: int) -> None:
        self.path, self.size, self.needed = path, size, needed
        super().__init__(
            f"{path} has {size} bytes and the backup needs {needed}",
            resolution="restore to a larger device, or to a new volume with --create",
        )


class TargetBusyError(TargetError):
    """Something else uses the file that is to be written."""

    def __init__(self, path: str, user: str) -> None:
        self.path, self.user = path, user
        super().__init__(f"{path} is in use by {user}", resolution="end that first, or name another target")


class TargetFailedError(TargetError):
    """Writing failed."""

    def __init__(self, path: str, err: OSError, *, is_device: bool = False) -> None:
        self.path = path
        self.errno = err.errno
        # A device has no room of its own to run out of.
        full = "its pool or store is full, or it was made smaller meanwhile: look with lvs and dmesg"
        room = full if is_device else "make room and restore again"
        super().__init__(
            f"cannot write {path}: {_reason(err)}",
            resolution=room if err.errno == errno.ENOSPC else None,
        )


class Progress(Protocol):
    """Told how many bytes of the volume are done."""

    def __call__(self, done_bytes: int, /) -> None:
        """Count ``done_bytes`` more."""
        ...


class Target(Protocol):
    """A place of fixed size that takes bytes in any order, and the beginning last."""

    @property
    def name(self) -> str:
        """How people call it."""
        ...

    def begin(self) -> int:
        """Make it recognisable as unfinished; return up to which byte an interrupted restore has come."""
        ...

    def expect(self, ranges: Iterable[tuple[int, int]]) -> None:
        """Make room for what will be written: (offset, length) pairs."""
        ...

    def write(self, offset: int, data: bytes | memoryview) -> None:
        """Write bytes; several threads at once."""
        ...

    def clear(self, offset: int, length: int, *, hole: bool, progress: Progress) -> None:
        """Make a range read as zeros, unallocated where it was a hole and the place can.

        It may take hours: ``progress`` is told of all of it, as it goes.
        """
        ...

    def reached(self, offset: int) -> None:
        """Note that all below ``offset`` is written, but for the beginning."""
        ...

    def flush(self) -> None:
        """Make what was written durable."""
        ...

    def finish(self) -> None:
        """Make everything durable and give a file its name."""
        ...

    def reader(self) -> int:
        """Flush, and return a descriptor that reads back what the storage holds."""
        ...

    def give_up(self) -> None:
        """Have no write wait any longer, from any thread: the restore ends, and is going to close this."""
        ...

    def close(self, *, keep: bool = False) -> bool:
        """Let go.

        A new file that is not finished is dropped, unless it is to be kept for another restore that goes on
        with it. Tell whether something unfinished stays.
        """
        ...


class LastingTarget(Target, Protocol):
    """A target that can be left for another restore to go on with."""

    @property
    def what_stays(self) -> str:
        """What is to be said of it when it is left, after its name."""
        ...


def may_go_on(err: BaseException) -> bool:
    """Tell whether a restore that ended so can be gone on with: what was written is not to blame."""
    return not isinstance(err, (TargetError, DamageError))


def write_stream(stream: BinaryIO, data: bytes | memoryview) -> None:
    """Write to a pipe or terminal; raises TargetFailedError."""
    try:
        stream.write(data)
    except OSError as err:
        raise TargetFailedError("standard output", err) from err


def _reason(err: OSError) -> str:
    return os.strerror(err.errno) if err.errno else str(err)
