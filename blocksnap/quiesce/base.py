"""The protocol that every way of standing still meets.

A ``Quiescer`` brings one application, or the filesystems below it, to a stop. It is made and prepared
while everything still runs, so that nothing but the stopping itself happens between ``begin`` and ``end``:
what it needs is open, started or looked up by then, and it names its ``safeguards`` to the watchdog,
which uses them when the controller cannot. Its ``trace`` is written to the journal before ``begin``, for the
run after one that died together with its watchdog.
"""

from __future__ import annotations

from typing import Protocol

Trace = dict[str, object]
"""What may be left standing, enough to let it go after a crash."""


class Quiescer(Protocol):
    """Something that can be made to stand still."""

    @property
    def name(self) -> str:
        """How people call it: ``unit shop.service``, ``filesystem on /srv``."""
        ...

    def trace(self) -> Trace | None:
        """Return what to do about it after a crash; None when nothing outlives the processes."""
        ...

    def begin(self, deadline: float) -> None:
        """Make it stand still before ``deadline``, in seconds of CLOCK_MONOTONIC.

        Raises QuiesceError when it refuses, fails or takes too long; ``end`` is called nevertheless.
        """
        ...

    def end(self, deadline: float) -> None:
        """Let it go on; a second call does nothing.

        Raises QuiesceError when it did not stand still to the last, or was not told that it may go on.
        """
        ...

    def close(self) -> None:
        """Give back what was opened; after ``end``, or when nothing was begun."""
        ...
