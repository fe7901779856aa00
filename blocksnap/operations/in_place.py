"""Write over a target only what differs from a backup, which mostly is known without reading it.

Of a volume whose changes are tracked, what differs is at most the difference of two maps, that of the wanted
backup and that of the newest one, and what has changed since the newest. It is asked of a snapshot, and a
second snapshot stays as the way back. Anything else is read and compared by the ids of its chunks.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from itertools import chain

from blocksnap.errors import BlocksnapError, UsageError
from blocksnap.extents.scan import data_of
from blocksnap.operations.backup import open_session
from blocksnap.operations.catalogue import map_root, newest_of
from blocksnap.operations.compare import find_differences
from blocksnap.operations.reporting import Reporter, phase
from blocksnap.operations.storing import plan_backup
from blocksnap.operations.targets import complete, read_runs, verify_target
from blocksnap.pipeline.flow import Geometry
from blocksnap.pipeline.selection import Ranges, select_either
from blocksnap.repository.blockmap import HOLE, ZERO, Entry, MapReader
from blocksnap.repository.documents import Backup
from blocksnap.repository.repository import Repository
from blocksnap.restore.device_target import DeviceTarget
from blocksnap.restore.engine import restore_to_target
from blocksnap.restore.file_target import ExistingFileTarget
from blocksnap.restore.pool_watch import RestoreLimits
from blocksnap.restore.record import RestoreRecord
from blocksnap.system import blockdev, devmapper, lvm
from blocksnap.volumes.base import Volume, as_image
from blocksnap.volumes.resolve import resolve_volume

_MOST_NAME = 100


@dataclass(frozen=True, slots=True)
class Differing:
    """The chunks in which a target may differ from the wanted backup, and how that is known."""

    ranges: Ranges
    method: str
    reason: str


@dataclass(frozen=True, slots=True)
class InPlaceResult:
    """What was found to differ, and the snapshot that leads back, unless somebody has removed it."""

    differing: Differing
    written_bytes: int
    way_back: str
    is_way_back_gone: bool


def restore_in_place(
    repository: Repository,
    backup: Backup,
    path: str,
    state_directory: str,
    report: Reporter,
    *,
    is_device: bool,
    limits: RestoreLimits,
    verify: bool,
) -> InPlaceResult:
    """Make a device or file hold a backup, writing what differs; raises TargetError, DamageError, BusyError.

    Until it is complete the target begins with a record instead of what it held.
    """
    geometry = Geometry(backup.size, backup.chunk_size)
    record = RestoreRecord(repository=repository.config.id, backup=backup.id, mode="in-place")
    with ExitStack() as stack:
        target: DeviceTarget | ExistingFileTarget
        if is_device:
            target = DeviceTarget(path, backup.size, record, limits)
        else:
            target = ExistingFileTarget(path, backup.size, record)
        stack.enter_context(complete(target, report))
        volume = _tracked_volume(path, target) if is_device else None
        before = target.head()
        way_back = before.way_back if before is not None else ""
        is_gone = bool(way_back) and _tell_if_gone(way_back, path, report)
        if volume is not None:
            differing = _find_tracked(repository, backup, target, volume, state_directory, report)
            # One of what is half written would lead nowhere.
            way_back = way_back or _make_way_back(volume)
            if not is_gone:
                report.event("way-back", volume=way_back)
        else:
            differing = _read_and_compare(repository, backup, target, report)
        target.wanted = record.model_copy(update={"way_back": way_back})
        total = differing.ranges.total_bytes(geometry)
        report.event(
            "in-place",
            target=path,
            method=differing.method,
            reason=differing.reason,
            volume_bytes=backup.size,
            differing_bytes=total,
        )
        with phase(report, f"restoring {backup.volume.name}", total):
            read_map = partial(_wanted_runs, MapReader(repository.load_node), backup, differing.ranges)
            restore_to_target(repository, geometry, read_map, target, report.advance)
        if verify:
            verify_target(repository, backup, target, report, Ranges())
    is_gone = is_gone or (bool(way_back) and _tell_if_gone(way_back, path, report))
    return InPlaceResult(differing, total, "" if is_gone else way_back, is_gone)


def differing_chunks(reader: MapReader, one: Backup, other: Backup) -> Iterator[tuple[int, int]]:
    """Yield the chunks of ``one`` that ``other`` does not hold so; equal subtrees are not read.

    Raises UsageError when the two are cut differently.
    """
    if one.chunk_size != other.chunk_size:
        raise UsageError("backups of different chunk sizes cannot be compared")
    count = Geometry(one.size, one.chunk_size).count
    yield from reader.differences(map_root(one.map), map_root(other.map), count)


def _tracked_volume(path: str, target: DeviceTarget | ExistingFileTarget) -> Volume | None:
    """Return the volume at a path, if its kind can tell what has changed, and it is the one that is held."""
    try:
        volume = resolve_volume(path)
    except BlocksnapError:
        # Not every target could be backed up.
        return None
    if volume.kind != "thin":
        return None
    # The name can have been given to another one since the device was opened.
    held = devmapper.lvm_identity(blockdev.device_number(target.comparable()))
    is_it = held is not None and volume.key.replace("-", "") == f"lvm:{held.vg_uuid}/{held.lv_uuid}"
    return volume if is_it else None


def _find_tracked(
    repository: Repository,
    backup: Backup,
    target: DeviceTarget | ExistingFileTarget,
    volume: Volume,
    state_directory: str,
    report: Reporter,
) -> Differing:
    """Ask the change tracking; where that is in doubt, read what is allocated."""
    newest = newest_of(repository.backups(), volume.key)
    with open_session([volume], secrets.token_hex(16), state_directory, report) as session:
        snapshot = session.snapshots[0]
        plan = plan_backup(repository, volume, as_image(snapshot), newest, session.remembers, full=False)
        if newest is None or not plan.changes.inherits or newest.chunk_size != backup.chunk_size:
            allocated = as_image(snapshot).find_changes(None).allocated.clip(backup.size)
            snapshot.check()
            reason = plan.changes.reason if newest else "there is no backup of it to start from"
            found = find_differences(repository, backup, target.comparable(), allocated.pairs(), report)
            return Differing(found, "compare", reason)
        since = select_either(plan.selection.read, plan.selection.holes)
        snapshot.check()
    count = Geometry(backup.size, backup.chunk_size).count
    between = differing_chunks(MapReader(repository.load_node), backup, newest)
    ranges = Ranges((begin, min(end, count)) for begin, end in select_either(since, between) if begin < count)
    return Differing(ranges, plan.changes.method, f"changes since backup {newest.id[:8]}, and its map")


def _read_and_compare(
    repository: Repository,
    backup: Backup,
    target: DeviceTarget | ExistingFileTarget,
    report: Reporter,
) -> Differing:
    fd, geometry = target.comparable(), Geometry(backup.size, backup.chunk_size)
    held = min(os.lseek(fd, 0, os.SEEK_END), backup.size)
    # A file may be shorter, and stays so until the first byte is written.
    whole = geometry.count if held == backup.size else held // backup.chunk_size
    behind = Ranges([(whole, geometry.count)] if whole < geometry.count else ())
    found = find_differences(repository, backup, fd, data_of(fd, held).pairs(), report, lost=behind)
    ended = [(whole, whole + 1)] if whole * backup.chunk_size < held < backup.size else []
    runs = MapReader(repository.load_node).runs(map_root(backup.map), whole, geometry.count)
    stored = ((number, number + count) for number, count, entry in runs if entry not in (HOLE, ZERO))
    found = select_either(found, chain(ended, stored))
    return Differing(found, "compare", "the changes of such a target are not tracked")


def _wanted_runs(
    reader: MapReader, backup: Backup, wanted: Ranges, begin: int, end: int
) -> Iterator[tuple[int, int, Entry]]:
    """Return the runs of what differs, and of the beginning, which is always written."""
    if not begin:
        return read_runs(reader, backup, None, 0, end)
    parts = ((max(first, begin), min(last, end)) for first, last in wanted)
    return chain.from_iterable(
        read_runs(reader, backup, None, first, last) for first, last in parts if first < last
    )


def _tell_if_gone(way_back: str, path: str, report: Reporter) -> bool:
    """Warn when somebody has removed the way back: the restore needs it for nothing."""
    group, _, name = way_back.partition("/")
    try:
        if lvm.report(group).find(group, name) is not None:
            return False
    except BlocksnapError as err:
        report.warn(f"whether there still is the snapshot {way_back} is not known: {err.brief}")
        return False
    report.warn(
        f"the snapshot {way_back} is gone: there is no way back to what {path} held before",
        resolution="the restore itself does not need it; earlier backups of the volume are as they were",
    )
    return True


def _make_way_back(volume: Volume) -> str:
    group, _, name = volume.name.partition("/")
    snapshot = f"{name[:_MOST_NAME]}-before-{secrets.token_hex(4)}"
    lvm.create_way_back(group, name, snapshot)
    return f"{group}/{snapshot}"
