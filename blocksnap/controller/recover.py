"""Find and remove what dead runs left on the host.

Two witnesses are heard: the journal, which knows what a run was about to do, and the tags of the
logical volumes, which know what it did. Nothing is touched that does not carry both our tags; LVM
itself checks that again under its lock when it removes.

A snapshot whose run no journal here knows is a puzzle: the state directory was lost, or a run with
another state directory made it, in a container for example, and may still be reading it; or
another host did that sees the same disks without LVM knowing that they are shared, as the two of a
cluster do. It is removed only if this host made it and it is older than this boot, since then no process
that made it can be alive; else it is reported, and removed only where the caller says so (``force``).

A run that died between its journal and ``lvcreate`` left nothing, and its journal is closed. One that
died within ``lvcreate`` left the volume with its tags, or nothing: LVM commits both at once.

What a dead run left standing still, and its watchdog with it, is let go before anything else.

Bases are left on purpose and are no leftovers. A run that died after it had announced what becomes of
them, which it does when it is committed, has that finished here. A base whose volume is gone can be the base
of nothing, and what it holds is in the repository, so it is removed, if this host has a record of its run.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from blocksnap.controller.history import History
from blocksnap.controller.journal import Entry, Rotation, close_entry, read_entries
from blocksnap.controller.quiescing import let_go_leftovers
from blocksnap.controller.subvolume_leftovers import KIND, remove_subvolume_snapshots
from blocksnap.errors import BlocksnapError
from blocksnap.system import host
from blocksnap.volumes import image

if TYPE_CHECKING:
    from blocksnap.system.lvm_report import LvReport

_SECOND_LOOK_SECONDS = 1.0
_SUSPENDING = frozenset(
    {"lvcreate", "lvremove", "lvchange", "lvconvert", "lvextend", "lvresize", "lvreduce", "pvmove", "dmsetup"}
)
_CREATING = frozenset({"lvcreate"})
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
    host: str


@dataclass(frozen=True, slots=True)
class Recovery:
    """What was removed, what could not be, and what may be somebody else's."""

    removed: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    puzzles: tuple[str, ...] = ()


def find_leftovers(report: LvReport | None, entries: Collection[Entry]) -> list[Leftover]:
    """Return all snapshots with our tags but the bases, those of live runs too.

    ``entries`` have to be read after the report was made: a run writes its journal first, so what made a
    snapshot that is in the report is then known.
    """
    from blocksnap.system import lvm

    by_run = {entry.run: entry for entry in entries}
    found = []
    for lv in report or ():
        run = lvm.run_of(lv.lv_tags)
        if run is None or lvm.base_of(lv.lv_tags) is not None:
            continue
        entry = by_run.get(run)
        # LVM forgets the origin when that is removed or another snapshot is merged into it.
        origin = lv.origin_uuid or (entry.origin_of(lv.vg_name, lv.name) if entry else None)
        if not origin:
            continue
        found.append(
            Leftover(
                vg=lv.vg_name,
                name=lv.name,
                origin=f"{lv.vg_name}/{lv.origin.strip('[]')}" if lv.origin else "a volume",
                volume_key=f"lvm:{lv.vg_uuid}/{origin}",
                run=run,
                created=parse_lvm_time(lv.lv_time),
                run_state="unknown" if entry is None else "alive" if entry.alive else "dead",
                host=lv.lv_host,
            )
        )
    return found


def read_report(vg: str | None = None) -> LvReport | None:
    """Return what LVM knows; None where it is not installed."""
    from blocksnap.system import lvm
    from blocksnap.system.command import has_program

    return lvm.report(vg) if has_program("lvs") else None


def may_remove(leftover: Leftover, *, boot_time: float, force: bool = False) -> bool:
    """Decide whether nobody can be using a snapshot any more."""
    if leftover.run_state == "unknown":
        made_here = leftover.host == host.host_name()
        return force or (made_here and leftover.created is not None and leftover.created < boot_time)
    return leftover.run_state == "dead"


@dataclass(slots=True)
class _Findings:
    """What a recovery did so far: messages, the runs something is left of, and the bases it made."""

    removed: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    puzzles: list[str] = field(default_factory=list)
    kept: set[str] = field(default_factory=set)
    bases: set[tuple[str, str]] = field(default_factory=set)


def recover(
    state_directory: str | Path,
    volumes: Collection[str] | None = None,
    *,
    lvm_involved: bool = True,
    force: bool = False,
) -> Recovery:
    """Let go what dead runs left standing still, then ``clean_up``; goes on past errors."""
    # What stands still comes first, whoever's it is: somebody waits for it.
    let_go, warnings = let_go_leftovers(state_directory)
    found = clean_up(state_directory, volumes, lvm_involved=lvm_involved, force=force)
    return Recovery((*let_go, *found.removed), (*warnings, *found.warnings), found.puzzles)


def clean_up(
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
    found = _Findings()
    dead = [entry for entry in read_entries(state_directory) if not entry.alive and _concerns(entry, volumes)]
    of_btrfs = remove_subvolume_snapshots(dead)
    found.removed += of_btrfs.removed
    found.warnings += of_btrfs.warnings
    found.puzzles += of_btrfs.puzzles
    found.kept |= of_btrfs.kept
    _clean_up_clones(dead, found)
    looks_at_lvm = lvm_involved or any(
        trace.get("kind") not in (KIND, image.TRACE) for entry in dead for trace in entry.traces()
    )
    report = read_report() if looks_at_lvm else None
    entries = read_entries(state_directory)
    if report is not None:
        _resume_origins(dead, report, found)
        for entry in dead:
            _release_holds(entry, report, found)
        for entry in entries:
            _finish_rotations(entry, volumes, report, found)
    for leftover in find_leftovers(report, entries):
        if (leftover.vg, leftover.name) in found.bases:
            continue
        if leftover.run_state == "alive" or (volumes is not None and leftover.volume_key not in volumes):
            found.kept.add(leftover.run)
            continue
        _remove(leftover, force=force, found=found)
    for entry in dead:
        if entry.run not in found.kept and entry.standstill() is None and not _may_grow(entry, found):
            close_entry(entry)
    if report is not None:
        _remove_bases_of_nothing(report, state_directory, found)
    return Recovery(tuple(found.removed), tuple(found.warnings), tuple(found.puzzles))


def may_come_yet(trace: Mapping[str, str] | None) -> bool:
    """Tell whether what ``Volume.trace`` announced may still come to be: by a program that was left running.

    An ``lvcreate`` that waits for somebody else's lock of its group is never killed, and makes its snapshot
    after all when it gets that.
    """
    return trace is not None and trace.get("kind") == "lvm" and bool(host.processes(_CREATING))


def remove_trace(trace: Mapping[str, str] | None) -> None:
    """Remove what ``Volume.trace`` announced, if it came to be."""
    if trace is None:
        return
    if trace.get("kind") == KIND:
        from blocksnap.volumes import subvolume

        subvolume.remove_trace(trace)
        return
    if trace.get("kind") == image.TRACE:
        image.remove_trace(trace)
        return
    from blocksnap.system import lvm

    lvm.remove_snapshot(trace["vg"], trace["lv"], trace["run"])


def _remove(leftover: Leftover, *, force: bool, found: _Findings) -> None:
    from blocksnap.system import lvm

    name = f"{leftover.vg}/{leftover.name}"
    if not may_remove(leftover, boot_time=host.boot_time(), force=force):
        found.kept.add(leftover.run)
        found.puzzles.append(
            f"{name}, a snapshot of {leftover.origin} made on {leftover.host}, is of run {leftover.run}, "
            "which this state directory does not know; if no other run is using it, remove it with lvremove"
        )
        return
    try:
        lvm.remove_snapshot(leftover.vg, leftover.name, leftover.run)
    except BlocksnapError as err:
        found.kept.add(leftover.run)
        found.warnings.append(f"cannot remove {name}, which run {leftover.run} left: {err}")
    else:
        found.removed.append(f"removed {name}, a snapshot of {leftover.origin} that run {leftover.run} left")


def _clean_up_clones(dead: Collection[Entry], found: _Findings) -> None:
    """Do with the clones of dead runs what these would have: make them bases, or remove them."""
    for entry in dead:
        try:
            for rotation in entry.clone_rotations():
                if rotation.stays and image.finish_rotation(
                    rotation.path, rotation.name, entry.run, rotation.owner
                ):
                    kept = f"kept the clone of {rotation.path} that run {entry.run} left"
                    found.removed.append(f"{kept} as the base it was to be")
            for trace in entry.traces():
                if trace.get("kind") == image.TRACE and image.remove_trace(trace) == "removed":
                    found.removed.append(f"removed the clone of {trace['path']} that run {entry.run} left")
        except BlocksnapError as err:
            found.kept.add(entry.run)
            found.warnings.append(f"cannot clean up the clones that run {entry.run} left: {err}")


def _finish_rotations(
    entry: Entry, volumes: Collection[str] | None, report: LvReport, found: _Findings
) -> None:
    """Finish those of a dead run that are of these volumes."""
    for rotation in entry.rotations() if not entry.alive else ():
        if volumes is None or rotation.volume in volumes:
            _finish_rotation(entry, rotation, report, found)


def _finish_rotation(entry: Entry, rotation: Rotation, report: LvReport, found: _Findings) -> None:
    """Make the snapshot of a committed run the base that it was to become, and remove the bases before.

    The journal of a group stays until all its volumes had a run, so one may be met again: once a later run
    has put another base in its place, the snapshot is not there any more, and nothing is done. A run that
    was to keep none leaves the bases before to the next.
    """
    from blocksnap.system import lvm
    from blocksnap.volumes.lvm_base import remove_bases

    name = f"{rotation.vg}/{rotation.snapshot}"
    snapshot = report.find(rotation.vg, rotation.snapshot)
    if not rotation.stays or snapshot is None or lvm.run_of(snapshot.lv_tags) != entry.run:
        return
    try:
        mark = lvm.BaseMark(rotation.owner, rotation.lv_uuid)
        if lvm.base_of(snapshot.lv_tags) is None and lvm.mark_base(
            rotation.vg, snapshot.name, entry.run, mark
        ):
            found.bases.add((rotation.vg, snapshot.name))
            found.removed.append(f"kept {name}, which run {entry.run} left, as the base it was to be")
        for each in remove_bases(report, rotation.owner, rotation.lv_uuid, but=snapshot.name):
            found.removed.append(f"removed {each}, a base before that of run {entry.run}")
    except BlocksnapError as err:
        found.kept.add(entry.run)
        found.bases.add((rotation.vg, rotation.snapshot))
        found.warnings.append(f"cannot finish what run {entry.run} began with the bases of {name}: {err}")


def _resume_origins(dead: Collection[Entry], report: LvReport, found: _Findings) -> None:
    """Resume what an ``lvcreate`` that died left suspended: whoever writes to it waits for ever."""
    from blocksnap.system import devmapper

    runs = {
        trace["origin_uuid"]: entry.run
        for entry in dead
        if entry.is_of_this_boot
        for trace in entry.traces()
        if "origin_uuid" in trace
    }
    for uuid, run in runs.items():
        lv = report.find_uuid(uuid)
        if lv is None or lv.number is None:
            continue
        try:
            if not devmapper.is_suspended(lv.number):
                continue
            # An LVM command that is at work suspends for some milliseconds, and resumes itself.
            time.sleep(_SECOND_LOOK_SECONDS)
            at_work = host.processes(_SUSPENDING)
            if not devmapper.is_suspended(lv.number):
                continue
            if at_work:
                found.puzzles.append(f"{lv.full_name} is suspended, and process {at_work[0]} may be why")
            else:
                for number in devmapper.suspended_with(lv.number):
                    devmapper.resume(number)
                found.removed.append(f"resumed {lv.full_name}, which run {run} left suspended")
        except (BlocksnapError, OSError) as err:
            found.kept.add(run)
            found.warnings.append(f"cannot resume {lv.full_name}, which may be suspended: {err}")


def _release_holds(entry: Entry, report: LvReport, found: _Findings) -> None:
    """Let go of a metadata snapshot that the run made a pool hold."""
    from blocksnap.volumes import thin_hold

    for trace in entry.traces():
        if trace.get("kind") != thin_hold.HOLD:
            continue
        pool = trace.get("pool", "a thin pool")
        try:
            left = thin_hold.release_leftover(trace, report)
        except BlocksnapError as err:
            found.kept.add(entry.run)
            found.warnings.append(f"cannot release the metadata snapshot of {pool}: {err}")
            continue
        if left == "released":
            found.removed.append(f"released the metadata snapshot of {pool} that run {entry.run} left")
        elif left == "unclear":
            found.kept.add(entry.run)
            found.puzzles.append(
                f"{pool} holds a metadata snapshot, perhaps of run {entry.run}; if nobody else took it, "
                "release it: dmsetup message VG-POOL-tpool 0 release_metadata_snap"
            )
        elif left == "inactive":
            found.kept.add(entry.run)


def _remove_bases_of_nothing(report: LvReport, state_directory: str | Path, found: _Findings) -> None:
    """Remove the bases of volumes that are gone, for which no run will ever do it."""
    from blocksnap.system import lvm

    for lv in report:
        mark, run = lvm.base_of(lv.lv_tags), lvm.run_of(lv.lv_tags)
        if mark is None or run is None or report.find_uuid(mark.lv_uuid) is not None:
            continue
        if not History(state_directory, f"lvm:{lv.vg_uuid}/{mark.lv_uuid}").knows(run):
            continue
        try:
            lvm.remove_snapshot(lv.vg_name, lv.name, run)
        except BlocksnapError as err:
            found.warnings.append(f"cannot remove {lv.full_name}, the base of a volume that is gone: {err}")
        else:
            found.removed.append(f"removed {lv.full_name}, the base of a volume that is gone")


def parse_lvm_time(text: str) -> float | None:
    """Return LVM's creation time as seconds of CLOCK_REALTIME; None when it is in another format."""
    try:
        return datetime.strptime(text, "%Y-%m-%d %H:%M:%S %z").timestamp()
    except ValueError:
        return None


def _may_grow(entry: Entry, found: _Findings) -> bool:
    """Whether a run that died, or gave up, while it took its snapshots may get one yet."""
    taken = any(step.get("step") == "taken" for step in entry.steps)
    try:
        return not taken and any(may_come_yet(trace) for trace in entry.traces())
    except OSError as err:
        found.warnings.append(f"run {entry.run} is looked for again: it cannot be told what runs here: {err}")
        return True


def _concerns(entry: Entry, volumes: Collection[str] | None) -> bool:
    """Whether a journal says nothing of other volumes than these."""
    return volumes is None or entry.volumes() <= set(volumes)
