"""Examine the host, and clean up what dead runs left: what every start does for its own volumes, for all.

Nothing is touched but what carries our tags and is in our journal. A volume that a live run holds is left to
that run. What cannot be looked at or cleaned up is told, and does not keep the rest from it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from contextlib import ExitStack, suppress

from blocksnap.controller.examine_host import (
    examine_archive,
    examine_arrivals,
    examine_block_devices,
    examine_journals,
    examine_standing,
    examine_state_directory,
    examine_suspended,
    examine_tools,
)
from blocksnap.controller.examine_lvm import Host, examine_lvm
from blocksnap.controller.findings import Area, Finding
from blocksnap.controller.journal import Entry, read_entries
from blocksnap.controller.lock import VolumeBusyError, VolumeLocks
from blocksnap.controller.quiescing import let_go_leftovers
from blocksnap.controller.recover import Recovery, clean_up, find_leftovers, read_report
from blocksnap.controller.settings import LimitSettings
from blocksnap.controller.subvolume_leftovers import examine_subvolumes
from blocksnap.errors import BlocksnapError
from blocksnap.system import devmapper, host
from blocksnap.system.mounts import read_mounts


def examine(state_directory: str, limits: LimitSettings | None = None) -> list[Finding]:
    """Return all findings, errors first."""
    found: list[Finding] = []
    entries = read_entries(state_directory)

    def lvm_findings() -> Iterable[Finding]:
        report = read_report()
        if report is None:
            return ()
        # Journals are read after the report: what made a snapshot that is in it is then known.
        now = read_entries(state_directory)
        return examine_lvm(
            Host(report, now, read_mounts(), host.boot_time(), state_directory, limits or LimitSettings())
        )

    examinations: tuple[tuple[Area, str, Callable[[], Iterable[Finding]]], ...] = (
        ("tool", "programs", lambda: examine_tools(lvm_in_use=devmapper.has_lvm_devices())),
        ("journal", state_directory, lambda: examine_state_directory(state_directory)),
        ("journal", state_directory, lambda: examine_journals(entries, time.time())),
        ("leftover", state_directory, lambda: examine_standing(entries)),
        ("leftover", state_directory, lambda: examine_arrivals(state_directory)),
        ("device", "device-mapper", lambda: examine_suspended(entries)),
        ("leftover", "LVM", lvm_findings),
        ("leftover", "btrfs", lambda: examine_subvolumes(read_entries(state_directory), read_mounts())),
        ("device", "block devices", examine_block_devices),
        ("archive", "LVM", examine_archive),
    )
    for area, name, look in examinations:
        try:
            found += look()
        except (BlocksnapError, OSError, ValueError) as err:
            found.append(Finding("error", area, name, f"cannot be looked at: {err}"))
    return sorted(found, key=lambda finding: finding.severity != "error")


def fix(state_directory: str) -> Recovery:
    """Remove, release and resume what dead runs left; return what was done, and what could not be."""
    # First of all, before LVM is asked, which may wait for just that.
    let_go, warnings = let_go_leftovers(state_directory)
    try:
        report = read_report()
    except BlocksnapError as err:
        return Recovery(tuple(let_go), (*warnings, f"cannot look at LVM: {err}"))
    entries = read_entries(state_directory)
    names = _volumes_of(entries)
    names |= {leftover.volume_key: leftover.origin for leftover in find_leftovers(report, entries)}
    with ExitStack() as stack:
        held: list[str] = []
        for key, name in names.items():
            # Whoever has the volume now has cleaned up after it already, or is about to.
            with suppress(VolumeBusyError):
                stack.enter_context(VolumeLocks(state_directory, [(key, name)]))
                held.append(key)
        found = clean_up(state_directory, held, lvm_involved=report is not None)
    return Recovery((*let_go, *found.removed), (*warnings, *found.warnings), found.puzzles)


def _volumes_of(entries: Iterable[Entry]) -> dict[str, str]:
    """Return keys and names of the volumes that dead runs announced."""
    return {
        str(step["volume"]): str(step.get("name", step["volume"]))
        for entry in entries
        if not entry.alive
        for step in entry.steps
        if "volume" in step
    }
