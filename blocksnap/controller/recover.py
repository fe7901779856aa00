"""Find and remove what dead runs left on the host.

Two witnesses are heard: the journal, which knows what a run was about to do, and the tags of the
logical volumes, which know what it did. Nothing is touched that does not carry both our tags; LVM
itself checks that again under its lock when it removes.

A snapshot whose run no journal here knows is a puzzle: the state directory was lost, or a run with
another state directory made it, in a container for example, and may still be reading it. Other
hosts cannot be meant, because volume groups that are shared are refused. It is removed only if it is
older than this boot, since then no process that made it can be alive; else it is reported, and removed
only where the caller says so (``force``).

A run that died between its journal and ``lvcreate`` left nothing, and its journal is closed. One that
died within ``lvcreate`` left the volume with its tags, or nothing: LVM commits both at once.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Literal

from blocksnap.controller.journal import Entry, close_entry, read_entries
from blocksnap.errors import BlocksnapError
from blocksnap.system import host

RunState = Literal["alive", "dead", "unknown"]


@dataclass(frozen=True, slots=True)
class Leftover:
    """A snapshot of ours on this host."""

    vg: str
    name: str
    origin: str
    volume_key: str
    run: str
    created: float | None
    run_state: RunState


@dataclass(frozen=True, slots=True)
class Recovery:
    """What was removed, and what could or should not be."""

    removed: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()


def find_leftovers(state_directory: str | Path, vg: str | None = None) -> list[Leftover]:
    """Return all snapshots with our tags, those of live runs too; empty where LVM is not installed."""
    from blocksnap.system import lvm
    from blocksnap.system.command import has_program

    if not has_program("lvs"):
        return []
    report = lvm.report(vg)
    # Read after the snapshots were: a run writes its journal first, so what made one of them is known.
    entries = {entry.run: entry for entry in read_entries(state_directory)}
    found = []
    for lv in report:
        run = lvm.run_of(lv.lv_tags)
        # A base was left on purpose; the next run of its volume removes it.
        if run is None or not lv.origin_uuid or lvm.BASE_TAG in lv.lv_tags:
            continue
        entry = entries.get(run)
        found.append(
            Leftover(
                vg=lv.vg_name,
                name=lv.name,
                origin=f"{lv.vg_name}/{lv.origin.strip('[]')}",
                volume_key=f"lvm:{lv.vg_uuid}/{lv.origin_uuid}",
                run=run,
                created=parse_lvm_time(lv.lv_time),
                run_state="unknown" if entry is None else "alive" if entry.alive else "dead",
            )
        )
    return found


def may_remove(leftover: Leftover, *, boot_time: float, force: bool = False) -> bool:
    """Decide whether nobody can be using a snapshot any more."""
    if leftover.run_state == "unknown":
        return force or (leftover.created is not None and leftover.created < boot_time)
    return leftover.run_state == "dead"


def recover(
    state_directory: str | Path,
    volumes: Collection[str] | None = None,
    *,
    lvm_involved: bool = True,
    force: bool = False,
) -> Recovery:
    """Remove what dead runs left of some volumes, given by keys, or of all; goes on past errors.

    The caller holds the locks of these volumes. Journals of dead runs are closed when nothing is left
    of them.
    """
    dead = [entry for entry in read_entries(state_directory) if not entry.alive and _concerns(entry, volumes)]
    looks_at_lvm = lvm_involved or any(entry.traces() for entry in dead)
    removed: list[str] = []
    warnings: list[str] = []
    kept: set[str] = set()
    for leftover in find_leftovers(state_directory) if looks_at_lvm else []:
        if leftover.run_state == "alive" or (volumes is not None and leftover.volume_key not in volumes):
            kept.add(leftover.run)
            continue
        _remove(leftover, force=force, removed=removed, warnings=warnings, kept=kept)
    for entry in dead:
        if entry.run not in kept:
            close_entry(entry)
    return Recovery(tuple(removed), tuple(warnings))


def remove_trace(trace: Mapping[str, str] | None) -> None:
    """Remove what ``Volume.trace`` announced, if it came to be."""
    if trace is None:
        return
    from blocksnap.system import lvm

    lvm.remove_snapshot(trace["vg"], trace["lv"], trace["run"])


def _remove(
    leftover: Leftover, *, force: bool, removed: list[str], warnings: list[str], kept: set[str]
) -> None:
    from blocksnap.system import lvm

    name = f"{leftover.vg}/{leftover.name}"
    if not may_remove(leftover, boot_time=host.boot_time(), force=force):
        kept.add(leftover.run)
        warnings.append(
            f"{name}, a snapshot of {leftover.origin}, is of run {leftover.run}, which this state directory "
            "does not know; if no other run is using it, remove it with lvremove"
        )
        return
    try:
        lvm.remove_snapshot(leftover.vg, leftover.name, leftover.run)
    except BlocksnapError as err:
        kept.add(leftover.run)
        warnings.append(f"cannot remove {name}, which run {leftover.run} left: {err}")
    else:
        removed.append(f"removed {name}, a snapshot of {leftover.origin} that run {leftover.run} left")


def parse_lvm_time(text: str) -> float | None:
    """Return LVM's creation time as seconds of CLOCK_REALTIME; None when it is in another format."""
    try:
        return datetime.strptime(text, "%Y-%m-%d %H:%M:%S %z").timestamp()
    except ValueError:
        return None


def _concerns(entry: Entry, volumes: Collection[str] | None) -> bool:
    """Whether a journal says nothing of other volumes than these."""
    return volumes is None or entry.volumes() <= set(volumes)
