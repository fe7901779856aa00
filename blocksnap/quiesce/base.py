"""The protocol that every way of standing still meets.

A ``Quiescer`` brings one application, or the filesystems below it, to a stop. It is made and attended
while everything still runs, so that nothing but the stopping itself happens between ``begin`` and ``end``:
what it needs is open, started or looked up by then. Its ``safeguards`` are what the watchdog does when the
controller cannot; ``begin`` arms them before it does anything. Its ``trace`` is written to the journal
before ``begin``, for the run after one that died together with its watchdog.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from blocksnap.system.watchdog import Safeguard, Watchdog

Trace = dict[str, object]
"""What may be left standing, enough to let it go after a crash."""
Strength = Literal["application", "frozen"]
"""``application``: it knows that it is backed up, and its data is whole. ``frozen``: it just does not run."""


@dataclass(frozen=True, slots=True)
class Record:
    """What an application said of itself that has to be kept with its snapshots."""

    kind: Literal["postgresql", "mariadb"]
    name: str
    facts: Mapping[str, str]


class Guard:
    """The watchdog as one quiescer sees it: its own safeguards, counted from 0."""

    def __init__(self, watchdog: Watchdog, first: int) -> None:
        self.watchdog = watchdog
        self._first = first

    def arm(self, number: int) -> None:
        """Say that a safeguard is about to be needed; raises WatchdogError."""
        self.watchdog.arm(self._first + number)

    def disarm(self, number: int) -> None:
        """Say that it is not needed any more."""
        self.watchdog.disarm(self._first + number)

    def start(self, number: int) -> None:
        """Have its command started; raises WatchdogError."""
        self.watchdog.start(self._first + number)

    def kill(self, number: int) -> None:
        """Have its command ended, with all processes of its session."""
        self.watchdog.kill(self._first + number)

    def ended(self, number: int) -> int | None:
        """Return how its command ended, None when it did not."""
        return self.watchdog.ended(self._first + number)

    def ended_by_now(self, number: int, deadline: float) -> int | None:
        """Return the same, also of an end that nobody has noticed yet; waits for the watchdog's word."""
        return self.watchdog.ended_by_now(self._first + number, deadline)

    def wait_ended(self, number: int, deadline: float) -> int | None:
        """Wait for its command until ``deadline``; None when it still runs then."""
        return self.watchdog.wait_ended(self._first + number, deadline)


class Quiescer(Protocol):
    """Something that can be made to stand still."""

    @property
    def name(self) -> str:
        """How people call it: ``unit shop.service``, ``filesystem on /srv``."""
        ...

    @property
    def strength(self) -> Strength:
        """What it is worth."""
        ...

    def safeguards(self) -> Sequence[Safeguard]:
        """Return what the watchdog may have to do, in the order of ``begin``."""
        ...

    def trace(self) -> Trace | None:
        """Return what to do about it after a crash; None when nothing outlives the processes."""
        ...

    def attend(self, guard: Guard) -> None:
        """Do what can be done while everything still runs; raises QuiesceError."""
        ...

    def begin(self, deadline: float) -> None:
        """Make it stand still before ``deadline``, in seconds of CLOCK_MONOTONIC.

        Raises QuiesceError when it refuses, fails or takes too long; ``end`` is called nevertheless.
        """
        ...

    def end(self, deadline: float) -> None:
        """Let it go on; does nothing where nothing was begun, or a second time.

        Raises QuiesceError when it did not stand still to the last, or was not told that it may go on.
        """
        ...

    def close(self) -> None:
        """Give back what was opened, after ``end`` and after the watchdog."""
        ...


class Agent(Quiescer, Protocol):
    """A quiescer that talks with its application, and may have a say in the order of the snapshots."""

    @property
    def late(self) -> frozenset[str]:
        """The keys of the volumes whose snapshots come after ``advance``; none where all are one stage."""
        ...

    @property
    def early(self) -> frozenset[str]:
        """The volumes whose snapshots have to be taken before it."""
        ...

    @property
    def last(self) -> frozenset[str]:
        """Those of the early ones that have to come after the others."""
        ...

    def advance(self, deadline: float) -> None:
        """Do what is between the early snapshots and the late ones; raises QuiesceError.

        No filesystem is frozen by us meanwhile.
        """
        ...

    def record(self) -> Record | None:
        """Return what is to be kept, after ``end``; None when there is nothing."""
        ...
