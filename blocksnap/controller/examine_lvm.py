"""Examine what LVM reports: what dead runs left, pools, classic snapshots, volume groups. Changes nothing."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from blocksnap.controller.arriving import read_arrivals
from blocksnap.controller.findings import Finding
from blocksnap.controller.history import History
from blocksnap.controller.journal import Entry
from blocksnap.controller.recover import Leftover, find_leftovers, may_remove
from blocksnap.controller.settings import LimitSettings
from blocksnap.system import devmapper, lvm
from blocksnap.system.command import CommandError
from blocksnap.system.mounts import Mount, mounts_of
from blocksnap.volumes.thin_hold import HOLD

if TYPE_CHECKING:
    from blocksnap.system.lvm_report import LvRecord, LvReport

_MODES = {
    "ro": "is read-only",
    "fail": "has failed",
    "out_of_data_space": "is out of data space: writes to its volumes wait, and fail after a minute",
}


@dataclass(frozen=True, slots=True)
class Host:
    """What the examination of LVM is made of, all read at one time."""

    report: LvReport
    entries: Sequence[Entry]
    mounts: list[Mount]
    boot_time: float
    state_directory: str
    limits: LimitSettings


def examine_lvm(host: Host) -> Iterator[Finding]:
    """Tell everything that is found in LVM's report."""
    for leftover in find_leftovers(host.report, host.entries):
        if leftover.run_state != "alive":
            yield _leftover(leftover, host)
    arriving = {
        f"{arrival.group}/{name}"
        for arrival, _ in read_arrivals(host.state_directory)
        for name in (arrival.arriving, arrival.meanwhile, arrival.name)
    }
    for lv in host.report:
        if lvm.base_of(lv.lv_tags) is not None:
            yield from _base(lv, host)
        yield from _of_a_restore(lv, arriving)
        if lv.segtype == "thin-pool":
            yield from _pool(lv, host)
        if lv.is_classic_snapshot:
            yield from _classic_snapshot(lv, host.limits)
    partial = {lv.vg_name for lv in host.report if lv.vg_partial}
    for name in sorted(partial):
        yield Finding(
            "error",
            "group",
            name,
            "disks of the volume group are missing",
            f"bring them back, or: vgreduce --removemissing {name}",
        )


def _leftover(leftover: Leftover, host: Host) -> Finding:
    name = f"{leftover.vg}/{leftover.name}"
    lv = host.report.find(leftover.vg, leftover.name)
    use = _use_of(lv, host.mounts) if lv is not None else ""
    ours = may_remove(leftover, boot_time=host.boot_time)
    message = f"a snapshot of {leftover.origin} that run {leftover.run} left{use}"
    if ours:
        return Finding("warning", "leftover", name, message, "blocksnap doctor --fix removes it", ours=True)
    return Finding(
        "warning",
        "leftover",
        name,
        f"{message}, made on host {leftover.host}, of which this state directory knows nothing",
        f"if no other run is using it (in a container, on another host with these disks): lvremove {name}",
    )


def _base(lv: LvRecord, host: Host) -> Iterator[Finding]:
    mark, run = lvm.base_of(lv.lv_tags), lvm.run_of(lv.lv_tags)
    use = _use_of(lv, host.mounts)
    if use:
        yield Finding(
            "warning",
            "base",
            lv.full_name,
            f"a base snapshot that nobody should use{use}",
            f"stop what uses it, then: lvchange -an {lv.full_name}",
        )
    if mark is None or run is None or host.report.find_uuid(mark.lv_uuid) is not None:
        return
    ours = History(host.state_directory, f"lvm:{lv.vg_uuid}/{mark.lv_uuid}").knows(run)
    yield Finding(
        "warning",
        "base",
        lv.full_name,
        "the base snapshot of a volume that is gone",
        "blocksnap doctor --fix removes it" if ours else f"lvremove {lv.full_name}",
        ours=ours,
    )


def _of_a_restore(lv: LvRecord, arriving: set[str]) -> Iterator[Finding]:
    """Tell of a volume that a restore made or keeps; those of the instant restores that are known are not."""
    if lvm.RESTORING_TAG in lv.lv_tags and not lv.lv_device_open:
        yield Finding(
            "warning",
            "leftover",
            lv.full_name,
            "a restore makes this volume, or was interrupted while it did",
            f"if no restore is running: lvremove {lv.full_name}",
        )
    if lvm.INSTANT_TAG in lv.lv_tags and lv.full_name not in arriving:
        yield Finding(
            "warning",
            "leftover",
            lv.full_name,
            "a part of an instant restore of which this state directory knows nothing",
            f"if no other one does (of a container, say): lvremove {lv.full_name}",
        )
    if lvm.WAY_BACK_TAG in lv.lv_tags:
        yield _way_back(lv)


def _way_back(lv: LvRecord) -> Finding:
    """Tell of what a volume held before a restore in place; nobody but the administrator ever removes it."""
    of = f"{lv.vg_name}/{lv.origin}" if lv.origin else "a volume that is gone"
    return Finding(
        "warning",
        "snapshot",
        lv.full_name,
        f"what {of} held before a restore in place, at {lv.lv_time}; it takes space",
        f"when all is well: lvremove {lv.full_name}; to go back: lvchange -an {of}; "
        f"lvconvert --merge {lv.full_name}"
        if lv.origin
        else f"if nobody needs it: lvremove {lv.full_name}",
    )


def _use_of(lv: LvRecord, mounts: list[Mount]) -> str:
    if lv.number is None:
        return ""
    points = [mount.point for mount in mounts_of(lv.number, mounts)]
    if points:
        return f", mounted on {', '.join(points)}"
    if lv.lv_device_open:
        return ", active and open"
    # A classic snapshot records only while it is active.
    return "" if lv.is_classic_snapshot else ", active"


def _pool(pool: LvRecord, host: Host) -> Iterator[Finding]:
    name = pool.full_name
    if pool.lv_check_needed:
        yield Finding(
            "error",
            "pool",
            name,
            "its metadata needs a check",
            f"deactivate it, then: lvconvert --repair {name}",
        )
    elif pool.lv_health_status not in ("", "out_of_data"):
        yield Finding("error", "pool", name, f"is not healthy: {pool.lv_health_status}", "see: dmesg, lvs -a")
    metadata = host.report.find_uuid(pool.metadata_lv_uuid)
    number = devmapper.pool_above(metadata.number) if metadata and metadata.number is not None else None
    status = _pool_status(number) if number is not None else None
    if number is None or status is None:
        return
    if status.mode != "rw":
        yield Finding("error", "pool", name, _MODES[status.mode], _extend(name, "data"))
    limits = host.limits
    for part, used, limit in (
        ("data", status.data_percent, limits.pool_data_percent),
        ("metadata", status.metadata_percent, limits.pool_metadata_percent),
    ):
        if used > limit:
            message = f"its {part} is {used:.1f} % full; beyond {limit:g} % no snapshot is taken"
            yield Finding("warning", "pool", name, message, _extend(name, part))
    if status.held_root is not None:
        yield from _hold(pool, status.held_root, number, host.entries)


def _pool_status(number: int) -> devmapper.PoolStatus | None:
    """Return how a pool is; None where it was taken away since it was found. Raises CommandError."""
    before = devmapper.dm_uuid(number)
    try:
        return devmapper.pool_status(number)
    except (CommandError, ValueError):
        # What is told of a device that is being taken away is empty.
        if before is not None and devmapper.dm_uuid(number) == before:
            raise
        return None


def _hold(pool: LvRecord, block: int, number: int, entries: Collection[Entry]) -> Iterator[Finding]:
    """Tell of a metadata snapshot: a pool has one place for it, and grows its metadata while it is taken."""
    for entry in entries:
        for trace in entry.traces():
            if trace.get("kind") != HOLD or trace.get("pool_uuid") != pool.lv_uuid:
                continue
            if entry.alive:
                return
            if trace.get("block") == str(block):
                yield Finding(
                    "warning",
                    "pool",
                    pool.full_name,
                    f"run {entry.run} left it holding a metadata snapshot",
                    "blocksnap doctor --fix releases it",
                    ours=True,
                )
                return
    yield Finding(
        "warning",
        "pool",
        pool.full_name,
        f"holds a metadata snapshot (block {block}) that is not known to be ours",
        f"if whoever took it is gone: dmsetup message {devmapper.dm_name(number)} 0 release_metadata_snap",
    )


def _classic_snapshot(lv: LvRecord, limits: LimitSettings) -> Iterator[Finding]:
    is_base = lvm.base_of(lv.lv_tags) is not None
    if lv.lv_attr[4:5] in ("I", "S"):
        advice = (
            "the next backup reads everything and replaces it; raise limits.store_percent"
            if is_base
            else f"it holds nothing any more: lvremove {lv.full_name}"
        )
        yield Finding(
            "warning",
            "snapshot",
            lv.full_name,
            f"a classic snapshot of {lv.origin} that is invalid: its exception store overflowed",
            advice,
        )
    elif not is_base and lv.data_percent is not None and lv.data_percent > limits.cow_percent:
        yield Finding(
            "warning",
            "snapshot",
            lv.full_name,
            f"a classic snapshot of {lv.origin}, {lv.data_percent:.1f} % full; at 100 it becomes invalid",
            f"lvextend --size +SIZE {lv.full_name}, or lvremove it",
        )


def _extend(pool: str, part: str) -> str:
    option = "--poolmetadatasize" if part == "metadata" else "--size"
    return f"lvextend {option} +SIZE {pool}"
