"""What a run asks to stand still, and what the runs after it do when it could not let that go again."""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, cast

from blocksnap.controller.journal import Entry, Step, read_entries, read_entry, take_over
from blocksnap.errors import BlocksnapError, UsageError

if TYPE_CHECKING:
    from blocksnap.quiesce.settings import QuiesceSettings
    from blocksnap.quiesce.standstill import Standstill
    from blocksnap.volumes.base import Volume

# Beyond the deadline: what the watchdog gives hooks to end, and a margin.
_WATCHDOG_SECONDS = 3.0


@dataclass(frozen=True, slots=True)
class QuiesceRequest:
    """What the job says, the paths we write to ourselves, and the name of the job."""

    settings: QuiesceSettings
    protected_paths: tuple[str, ...] = ()
    job: str = ""

    def check(self, volumes: Sequence[Volume]) -> None:
        """Refuse what makes no sense; raises UsageError."""
        cold = [volume.name for volume in _cold(volumes)]
        if not cold or self.settings.asks_for_nothing:
            return
        if any(volume.snapshot_device is not None for volume in volumes):
            raise UsageError(
                f"there is no snapshot of {', '.join(cold)}: applications would have to stand still until it "
                "is read, and for the other volumes only for an instant",
                resolution="back them up in two jobs",
            )
        if self.settings.asks_for_an_instant:
            raise UsageError(
                f"there is no snapshot of {', '.join(cold)}: databases and guests stand still only for one",
                resolution="have a hook stop what writes there: hooks = [...] in the job's quiesce",
            )

    def is_for_reading(self, volumes: Sequence[Volume]) -> bool:
        """Tell whether applications stand still until the volumes are read, since they have no snapshots."""
        return bool(_cold(volumes)) and not self.settings.asks_for_nothing

    def assemble(self, volumes: Sequence[Volume], state_directory: str | Path) -> Standstill | None:
        """Look up what is to stand still; None where nothing was asked for and nothing needs to."""
        targets = [
            (volume.key, volume.snapshot_device, volume.name if volume.kind == "image" else None)
            for volume in volumes
            if volume.snapshot_device is not None
        ]
        reading = self.is_for_reading(volumes)
        if not targets and not reading:
            return None
        from blocksnap.quiesce.assemble import assemble
        from blocksnap.quiesce.places import Target

        # A snapshot of what lies in a filesystem is made by writing to it.
        inside = [volume.name for volume in volumes if volume.kind in ("image", "subvolume")]
        protected = [*self.protected_paths, str(state_directory), *inside]
        standstill = assemble(self.settings, [Target(*each) for each in targets], protected, reading=reading)
        return None if standstill.is_empty else standstill

    def environment(self, volumes: Sequence[Volume], run: str) -> dict[str, str]:
        """Return what a hook finds in its environment beside the usual."""
        return {
            "BLOCKSNAP_RUN": run,
            "BLOCKSNAP_JOB": self.job,
            "BLOCKSNAP_VOLUMES": "\n".join(volume.name for volume in volumes),
        }


def _cold(volumes: Sequence[Volume]) -> list[Volume]:
    """Return the volumes that are read as they are; but a header, to which no application writes."""
    return [each for each in volumes if each.snapshot_device is None and each.kind != "luks-header"]


def announce(standstill: Standstill, environment: Mapping[str, str]) -> list[tuple[Step, dict[str, object]]]:
    """Return the step that says what may be left standing; none when nothing outlives the processes."""
    traces = standstill.traces()
    if not traces:
        return []
    return [
        (
            "quiesce",
            {
                "standing": traces,
                "deadline_seconds": standstill.deadline_seconds,
                "environment": dict(environment),
            },
        )
    ]


def let_go_leftovers(state_directory: str | Path) -> tuple[list[str], list[str]]:
    """Let go what dead runs left standing still, of whatever volume; return what was done, and warnings.

    Waits for watchdogs that are still at it.
    """
    done: list[str] = []
    warnings: list[str] = []
    for entry in read_entries(state_directory):
        # Even where nothing was announced yet: while it lives, the run does not count as dead.
        settled = _await_watchdog(entry)
        if settled is None or settled.alive or settled.standstill() is None:
            continue
        with take_over(settled) as fd:
            current = read_entry(settled.path) if fd is not None else None
            step = current.standstill() if current is not None else None
            if fd is not None and step is not None:
                _let_go(settled, step, fd, done, warnings)
    return done, warnings


def _await_watchdog(entry: Entry) -> Entry | None:
    step = entry.standstill() or {}
    deadline = step.get("deadline_seconds")
    patience = (deadline if isinstance(deadline, int | float) else 10.0) * 2 + _WATCHDOG_SECONDS
    until = time.monotonic() + patience
    found: Entry | None = entry
    while found is not None and found.ending and time.monotonic() < until:
        time.sleep(0.02)
        found = read_entry(entry.path)
    return found


def _let_go(
    entry: Entry, step: Mapping[str, object], journal: int, done: list[str], warnings: list[str]
) -> None:
    standing = step.get("standing")
    left: list[object] = []
    environment = step.get("environment")
    for trace in reversed(standing) if isinstance(standing, list) else ():
        try:
            said = _let_one_go(
                trace, environment if isinstance(environment, dict) else {}, same_boot=entry.is_of_this_boot
            )
        except BlocksnapError as err:
            if _is_left(trace, err, same_boot=entry.is_of_this_boot):
                left.append(trace)
            warnings.append(f"run {entry.run} left something standing still: {err}")
        else:
            if said:
                done.append(f"{said}, which run {entry.run} left standing still")
    # The next run finds what is left, and does not run again what was run.
    after = {**step, "standing": left[::-1]} if left else {"step": "released", "by": "recovery", "failed": 0}
    line = json.dumps(after)
    with contextlib.suppress(OSError):
        # The line before may be torn.
        os.write(journal, f"\n{line}\n".encode())
        os.fdatasync(journal)


def _is_left(trace: Mapping[str, object], err: BlocksnapError, *, same_boot: bool) -> bool:
    """Tell whether the next run is to try again what could not be let go.

    An ``after`` is the administrator's, and told once. Guests went down with the host.
    """
    from blocksnap.quiesce.errors import GuestThawError

    if isinstance(err, GuestThawError):
        return same_boot and not err.was_run
    return trace.get("kind") != "after"


def _let_one_go(
    trace: Mapping[str, object], environment: Mapping[str, str], *, same_boot: bool
) -> str | None:
    """Let one thing go; None when there was nothing to be done. Raises BlocksnapError."""
    from blocksnap.quiesce import filesystem, freezer, libvirt
    from blocksnap.quiesce.hook import run_after

    kind, facts = trace.get("kind"), dict(trace)
    if kind == "after" and "name" in facts:
        libvirt.thaw_leftover(facts, environment)
        return f"thawed {facts['name']}"
    if kind == "after":
        argv = tuple(str(word) for word in cast("list[object]", trace.get("argv")))
        run_after(argv, environment)
        return f"ran {argv[0]}"
    # The kernel forgets the others when it goes down.
    if kind == "filesystem" and same_boot and filesystem.thaw_leftover(facts):
        return f"thawed the filesystem on {trace.get('point')}"
    if kind == "cgroup" and same_boot and freezer.thaw_leftover(facts):
        return f"thawed {trace.get('name')}"
    return None
