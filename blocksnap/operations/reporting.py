"""What operations say while they run; the command line decides how it is shown."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol

from blocksnap.errors import BlocksnapError


class Reporter(Protocol):
    """Takes events and progress. Nothing below the command line prints."""

    def event(self, name: str, **facts: object) -> None:
        """Tell that something happened; facts are JSON values, sizes in bytes."""
        ...

    def warn(self, message: str, *, resolution: str | None = None) -> None:
        """Tell about something that went wrong without ending the run (exit code 3 at the end)."""
        ...

    def begin(self, phase: str, total_bytes: int) -> None:
        """Tell that a phase begins and how much there is to do."""
        ...

    def advance(self, done_bytes: int) -> None:
        """Tell that so much more of the phase is done."""
        ...

    def end(self) -> None:
        """Tell that the phase is over."""
        ...


def each_once(report: Reporter) -> Callable[[BlocksnapError], None]:
    """Return what warns of errors, of each once however often it comes, from any thread."""
    told: set[str] = set()

    def warn(err: BlocksnapError) -> None:
        if err.brief not in told:
            told.add(err.brief)
            report.warn(err.brief, resolution=err.resolution)

    return warn


@contextmanager
def phase(report: Reporter, name: str, total_bytes: int) -> Iterator[None]:
    """Begin a phase and end it whatever happens: a bar left on a terminal would swallow the error."""
    try:
        report.begin(name, total_bytes)
        yield
    finally:
        report.end()


class Quiet:
    """A reporter that remembers warnings, in a list that others may have too, and says nothing."""

    def __init__(self, warnings: list[str] | None = None) -> None:
        self.warnings = [] if warnings is None else warnings

    def event(self, name: str, **facts: object) -> None:
        """Ignore it."""

    def warn(self, message: str, *, resolution: str | None = None) -> None:  # noqa: ARG002 - protocol
        """Remember it."""
        self.warnings.append(message)

    def begin(self, phase: str, total_bytes: int) -> None:
        """Ignore it."""

    def advance(self, done_bytes: int) -> None:
        """Ignore it."""

    def end(self) -> None:
        """Ignore it."""
