# SPDX-License-Identifier: Apache-2.0
"""Runs that are killed at every step they take, one after the other, and what the next run finds.

A point is anything after which something is different: a journal entry about to be written or just written,
something begun or ended, a snapshot taken or removed. ``count_points`` lets a run go to its end and counts
them; ``die_at`` forks a run that kills itself, and its watchdog if asked to, at one of them.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from blocksnap.controller import journal
from blocksnap.quiesce.filesystem import FilesystemFreeze
from blocksnap.quiesce.freezer import CgroupFreezer
from blocksnap.quiesce.hook import PairHook, SessionHook
from blocksnap.system import lvm

Naming = Callable[..., str | None]
_TAKEN = "snapshot taken"


@dataclass
class Points:
    """How far a run came, and where it is to die."""

    die_at: int | None = None
    also_watchdog: bool = False
    reached: list[str] = field(default_factory=list)

    def reach(self, name: str) -> None:
        """Be at a point; does not return if it is the one."""
        self.reached.append(name)
        if len(self.reached) - 1 == self.die_at:
            for pid in watchdogs_of(os.getpid()) if self.also_watchdog else ():
                os.kill(pid, signal.SIGKILL)
            os.kill(os.getpid(), signal.SIGKILL)


def watchdogs_of(parent: int | None = None, run: str | None = None) -> list[int]:
    """The watchdogs that a process has started, or that belong to a run."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            words = (folder / "stat").read_text().rpartition(")")[2].split()
            if (folder / "comm").read_text() != "blocksnap-watch\n" or words[0] == "Z":
                continue
            environment = (folder / "environ").read_bytes().split(b"\0")
            if (parent is None or int(words[1]) == parent) and (
                run is None or f"BLOCKSNAP_RUN={run}".encode() in environment
            ):
                found.append(int(folder.name))
    return found


@contextlib.contextmanager
def observed(points: Points) -> Iterator[None]:
    """Let every step of a run be a point."""
    changed: list[tuple[Any, str, Any]] = []

    def wrap(
        owner: Any, name: str, before: Callable[..., str | None], after: Callable[..., str | None]
    ) -> None:
        real = getattr(owner, name)
        changed.append((owner, name, real))

        def wrapped(*words: Any, **named: Any) -> Any:
            if (point := before(*words)) is not None:
                points.reach(point)
            result = real(*words, **named)
            if (point := after(*words)) is not None:
                points.reach(point)
            return result

        setattr(owner, name, wrapped)

    def steps(_: Any, entries: list[tuple[str, Any]]) -> str:
        return "+".join(dict.fromkeys(step for step, _ in entries))

    wrap(journal.Journal, "append_all", lambda *w: f"before {steps(*w)}", lambda *w: f"after {steps(*w)}")
    wrap(journal.Journal, "finish", lambda *_: "before finish", lambda *_: "after finish")
    for kind in (SessionHook, PairHook, CgroupFreezer, FilesystemFreeze):
        for verb in ("begin", "end"):
            name = f"{kind.__name__} {verb}"
            wrap(kind, verb, lambda *_: None, lambda *_, name=name: name)
    wrap(lvm, "create_thin_snapshot", lambda *_: None, lambda *_: _TAKEN)
    wrap(lvm, "remove_snapshot", lambda *_: None, lambda *_: "snapshot removed")
    try:
        yield
    finally:
        for owner, name, real in reversed(changed):
            setattr(owner, name, real)


def count_points(run: Callable[[], None]) -> list[str]:
    """Let a run go to its end, and return the points it came by."""
    points = Points()
    with observed(points):
        run()
    return points.reached


def die_at(number: int, run: Callable[[], None], *, also_watchdog: bool) -> None:
    """Let a run in a process of its own die at a point."""
    pid = os.fork()
    if pid == 0:
        try:
            with observed(Points(number, also_watchdog)):
                run()
        except BaseException:  # noqa: BLE001 - the parent only sees how we ended
            traceback.print_exc(file=sys.stderr)
        os._exit(1)
    _, status = os.waitpid(pid, 0)
    assert os.waitstatus_to_exitcode(status) == -signal.SIGKILL, f"it lived on beyond point {number}"
