"""Reporters: what operations say, as text with a progress bar on a terminal, or as JSON lines."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import click

from blocksnap.cli.output import format_size, print_json_line, printable
from blocksnap.operations.reporting import Quiet

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

_JSON_PROGRESS_SECONDS = 1.0


_Facts = Mapping[str, object]


def _say_plan(facts: _Facts) -> str:
    # What there is to read of a subvolume is known when it was read.
    read, size = facts.get("read_bytes"), facts.get("volume_bytes")
    what = f"{facts['kind']}, {facts['method']}"
    if isinstance(read, int) and isinstance(size, int):
        what += f": {format_size(read)} of {format_size(size)} to read"
    return f"{facts['volume']}: {what} ({facts['reason']})"


def _say_left_out(facts: _Facts) -> str:
    return f"left out: {facts['subvolumes']}: {facts['reason']}"


def _say_in_place(facts: _Facts) -> str | None:
    how, why, much = facts["method"], facts["reason"], facts["differing_bytes"]
    if not isinstance(much, int):
        return None
    return f"{facts['target']}: {how}: {format_size(much)} may differ ({why})"


def _say_label(facts: _Facts) -> str:
    backup = str(facts["backup"])[:8]
    return (
        f"before {facts['server']} is started on what was restored: blocksnap label {backup} DATA-DIRECTORY"
    )


_SENTENCES: dict[str, Callable[[_Facts], str | None]] = {
    "plan": _say_plan,
    "left-out": _say_left_out,
    "in-place": _say_in_place,
    "usable": lambda facts: f"{facts['device']} can be used: mount it; what is missing arrives meanwhile",
    "needs_label": _say_label,
    "arrived": lambda facts: f"all of {facts['volume']} is there; what was written meanwhile is merged",
    "recovered": lambda facts: f"cleaned up: {facts['message']}",
    "finding": lambda facts: f"{facts['severity']}: {facts['object']}: {facts['message']}",
}
"""What matters enough to be said without being asked; other events are for --verbose."""


class TextReporter(Quiet):
    """Talks on standard error; draws progress only where it is a terminal."""

    def __init__(self, *, verbosity: int, warnings: list[str] | None = None) -> None:
        super().__init__(warnings)
        self._verbosity = verbosity
        self._bar: Progress | None = None
        self._task: TaskID | None = None

    def event(self, name: str, **facts: object) -> None:
        """Say what matters."""
        if self._verbosity < 0:
            return
        sentence = _SENTENCES[name](facts) if name in _SENTENCES else None
        if name not in _SENTENCES and self._verbosity > 0:
            sentence = f"{name}: " + ", ".join(f"{key}={value}" for key, value in facts.items())
        if sentence:
            click.echo(printable(sentence), err=True)

    def warn(self, message: str, *, resolution: str | None = None) -> None:
        """Say it, whatever the verbosity."""
        super().warn(message)
        click.echo(printable(f"warning: {message}"), err=True)
        if resolution:
            click.echo(printable(f"fix:     {resolution}"), err=True)

    def begin(self, phase: str, total_bytes: int) -> None:
        """Draw a bar."""
        if self._verbosity < 0 or not total_bytes or not sys.stderr.isatty():
            return
        from rich import progress
        from rich.console import Console

        self._bar = progress.Progress(
            progress.TextColumn("{task.description}"),
            progress.BarColumn(),
            progress.DownloadColumn(binary_units=True),
            progress.TransferSpeedColumn(),
            progress.TimeRemainingColumn(),
            console=Console(stderr=True),
            transient=True,
        )
        self._bar.start()
        self._task = self._bar.add_task(phase, total=total_bytes)

    def advance(self, done_bytes: int) -> None:
        """Move the bar."""
        if self._bar is not None and self._task is not None:
            self._bar.advance(self._task, done_bytes)

    def end(self) -> None:
        """Remove the bar."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


class JsonReporter(Quiet):
    """One JSON event a line on standard output; progress at most once a second."""

    def __init__(self, warnings: list[str] | None = None) -> None:
        super().__init__(warnings)
        self._phase = ""
        self._done = self._total = 0
        self._told = 0.0

    def event(self, name: str, **facts: object) -> None:
        """Print the event."""
        print_json_line({"event": name, **facts})

    def warn(self, message: str, *, resolution: str | None = None) -> None:
        """Print it as an event."""
        super().warn(message)
        print_json_line({"event": "warning", "message": message, "resolution": resolution})

    def begin(self, phase: str, total_bytes: int) -> None:
        """Begin to count."""
        self._phase, self._total, self._done = phase, total_bytes, 0
        self._told = time.monotonic()

    def advance(self, done_bytes: int) -> None:
        """Count, and tell now and then."""
        self._done += done_bytes
        now = time.monotonic()
        if now - self._told >= _JSON_PROGRESS_SECONDS:
            self._told = now
            print_json_line(
                {
                    "event": "progress",
                    "phase": self._phase,
                    "done_bytes": self._done,
                    "total_bytes": self._total,
                }
            )
