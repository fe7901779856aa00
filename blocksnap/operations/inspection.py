"""Show what an extent diff sees: for people who want to look at it, compare it, or measure it.

Nothing here needs a repository, takes a snapshot or changes anything.
"""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Protocol

from blocksnap.errors import UsageError
from blocksnap.extents.changes import JsonValue, Method
from blocksnap.extents.model import ExtentList


@dataclass(frozen=True, slots=True)
class Inspection:
    """What one engine answered.

    ``extents`` are all bytes that may differ, in the order of the volume; ``seconds`` is the time of the
    engine alone, without the start of the program; ``facts`` is whatever else it can tell.
    """

    engine: Method
    reason: str
    extents: ExtentList
    seconds: float
    facts: Mapping[str, JsonValue] = field(default_factory=dict)

    def document(self) -> dict[str, object]:
        """Return all of it for JSON; the extents one by one, since there can be millions."""
        return {
            "engine": self.engine,
            "reason": self.reason,
            "seconds": self.seconds,
            "changed_bytes": self.extents.total,
            "count": len(self.extents),
            **self.facts,
            "extents": (list(pair) for pair in self.extents.pairs()),
        }

    def lines(self) -> Iterator[bytes]:
        """Return a line ``begin length`` for each extent."""
        return (b"%d %d" % pair for pair in self.extents.pairs())


class Report(Protocol):
    """What a debug command shows: an Inspection, or one whose extents are not those of a single volume."""

    @property
    def engine(self) -> Method:
        """Which engine answered."""
        ...

    @property
    def reason(self) -> str:
        """Why it did, and not another."""
        ...

    @property
    def seconds(self) -> float:
        """Time of the engine alone."""
        ...

    def document(self) -> dict[str, object]:
        """Return all of it for JSON; a value may be an iterator, which is printed as a list."""
        ...

    def lines(self) -> Iterator[bytes]:
        """Return a line for each extent that may differ."""
        ...


class Stopwatch:
    """Measures the time of an engine."""

    def __init__(self) -> None:
        self._began = time.monotonic()

    @property
    def seconds(self) -> float:
        """Since it was made."""
        return time.monotonic() - self._began


@contextmanager
def open_to_read(path: str, *, direct: bool = False) -> Iterator[int]:
    """Open a file or device; with ``direct`` past the page cache, where the file system can.

    Raises UsageError when it cannot be opened.
    """
    try:
        fd = _open(path, direct=direct)
    except OSError as err:
        raise UsageError(f"cannot open {path}: {err.strerror}") from err
    try:
        yield fd
    finally:
        os.close(fd)


def _open(path: str, *, direct: bool) -> int:
    flags = os.O_RDONLY | os.O_CLOEXEC
    if direct:
        try:
            return os.open(path, flags | os.O_DIRECT)
        except OSError as err:
            # tmpfs and others have no O_DIRECT; their files are no live pool's metadata either.
            if err.errno != errno.EINVAL:
                raise
    return os.open(path, flags)
