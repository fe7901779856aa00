"""Store the backup of one volume: choose the chunks, read them, and build its map from the parent's."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Literal

from blocksnap.controller.pacing import Pace
from blocksnap.extents.changes import Changes, Parent
from blocksnap.extents.model import ExtentList
from blocksnap.operations.catalogue import map_root, root_document
from blocksnap.operations.draft import BackupOptions, Draft
from blocksnap.operations.losses import current_losses
from blocksnap.operations.mapped import load_mapped, store_mapped
from blocksnap.operations.reporting import Reporter, phase
from blocksnap.operations.sink import DataSink
from blocksnap.pipeline.flow import Flow, Geometry
from blocksnap.pipeline.selection import Selection, select_all, select_changed
from blocksnap.repository.blockmap import HOLE, ZERO, MapReader, MapWriter
from blocksnap.repository.documents import Backup
from blocksnap.repository.repository import Repository
from blocksnap.repository.writer import RepositoryWriter, Stored
from blocksnap.restore.record import RECORD_BYTES, decode_record
from blocksnap.system import blockdev
from blocksnap.volumes.base import ImageSnapshot, Volume
from blocksnap.volumes.errors import UnfinishedVolumeError


@dataclass(frozen=True, slots=True)
class BackupPlan:
    """What will be read of one volume, and why."""

    volume: Volume
    snapshot: ImageSnapshot
    parent: Backup | None
    changes: Changes
    selection: Selection
    geometry: Geometry

    @property
    def kind(self) -> Literal["full", "incremental"]:
        """Full when nothing is compared or inherited, else incremental."""
        return "incremental" if self.parent else "full"

    @property
    def read_bytes(self) -> int:
        """Bytes that will be read."""
        return self.selection.read.total_bytes(self.geometry)

    def facts(self) -> dict[str, object]:
        """Return the decision for the log."""
        return {
            "volume": self.volume.name,
            "kind": self.kind,
            "method": self.changes.method,
            "reason": self.changes.reason,
            "volume_bytes": self.snapshot.size,
            "read_bytes": self.read_bytes,
        }


def plan_backup(
    repository: Repository,
    volume: Volume,
    snapshot: ImageSnapshot,
    parent: Backup | None,
    knows: Callable[[Volume, str], bool],
    *,
    full: bool,
) -> BackupPlan:
    """Ask the source what has changed and choose the chunks to read.

    ``knows`` tells whether this host has a record of a run of a volume.
    """
    geometry = Geometry(snapshot.size, repository.chunk_size)
    if full or (parent is not None and (parent.inodes or parent.chunk_size != repository.chunk_size)):
        parent = None
    remembered = None
    if parent is not None:
        mapped = parent.mapped
        run = parent.source.get("run")
        known_here = isinstance(run, str) and knows(volume, run)
        remembered = Parent(parent.size, parent.source, known_here, lambda: load_mapped(repository, mapped))
    changes = snapshot.find_changes(remembered)
    if parent is not None and changes.inherits:
        lost = current_losses(repository, parent).covering()
        changes = _with_lost(changes, ExtentList.of(lost).clip(snapshot.size))
    if parent is None or not changes.inherits:
        selection = select_all(geometry, changes.allocated)
    else:
        selection = select_changed(
            geometry,
            allocated=changes.allocated,
            changed=changes.changed,
            discarded=changes.discarded,
            parent_size=parent.size,
        )
    # What the selection was made of can be large, and nobody asks for it again.
    nothing = ExtentList()
    changes = replace(changes, allocated=nothing, changed=nothing, discarded=nothing)
    return BackupPlan(volume, snapshot, parent, changes, selection, geometry)


def _with_lost(changes: Changes, lost: ExtentList) -> Changes:
    """What the repository has lost of the parent is read, so that the new backup is whole.

    Also where it was discarded since: then it is read as zeros, and is no hole beside.
    """
    if not lost:
        return changes
    reason = f"{changes.reason}; {lost.total} bytes of the parent are lost, and read again"
    allocated, changed = changes.allocated.union(lost), changes.changed.union(lost)
    return replace(changes, reason=reason, allocated=allocated, changed=changed)


def store_volume(
    repository: Repository,
    writer: RepositoryWriter,
    plan: BackupPlan,
    before: Stored,
    options: BackupOptions,
    report: Reporter,
) -> Draft:
    """Read and store what the plan says; nothing is committed, but the map is complete.

    What the writer has stored since ``before`` is counted for this volume.
    """
    reader = MapReader(repository.load_node)
    parent_map = map_root(plan.parent.map) if plan.parent else None
    builder = MapWriter(reader, parent_map, plan.geometry.count, writer.store_node)
    changed = read = 0
    holes = _HoleFiller(builder, plan.selection)
    pace = Pace(options.pace) if options.pace.policy != "off" else None
    with phase(report, plan.volume.name, plan.read_bytes):
        if plan.selection.read:
            sink = DataSink(writer, options.level)
            extents = plan.selection.extents(plan.geometry)
            with ExitStack() as stack:
                fd = stack.enter_context(plan.snapshot.open_reader())
                _require_whole(fd, plan.volume.name)
                flow = stack.enter_context(
                    Flow(fd, plan.geometry, extents, sink, workers=options.workers, pace=pace)
                )
                for result in flow.results():
                    holes.fill_before(result.number)
                    if builder.set(result.number, ZERO if result.id is None else result.id):
                        changed += result.length
                    read += result.length
                    report.advance(result.length)
        if pace is not None:
            report.event("paced", volume=plan.volume.name, held_back_seconds=round(pace.held_back_seconds, 3))
        holes.fill_before(plan.geometry.count)
        root = builder.finish()
        if plan.parent is not None and plan.changes.inherits:
            changed += plan.selection.holes.total_bytes(plan.geometry)
        mapped = None
        if plan.changes.mapped is not None:
            mapped = store_mapped(
                repository, writer, plan.changes.mapped, plan.parent.mapped if plan.parent else None
            )
    return Draft(
        volume=plan.volume,
        snapshot=plan.snapshot,
        parent=plan.parent,
        method=plan.changes.method,
        reason=plan.changes.reason,
        size=plan.snapshot.size,
        chunk_size=plan.geometry.chunk_size,
        map=root_document(root),
        mapped=mapped,
        inodes=None,
        changed_bytes=changed,
        read_bytes=read,
        before=before,
        stored=writer.stored.since(before),
    )


def _require_whole(fd: int, name: str) -> None:
    """Raise UnfinishedVolumeError for what a restore has not finished.

    Its backup would be the newest of the volume, and forgetting the oldest would give up the good ones.
    """
    with blockdev.aligned_buffer(RECORD_BYTES) as buffer:
        os.preadv(fd, [buffer], 0)
        if decode_record(buffer[:RECORD_BYTES]) is not None:
            raise UnfinishedVolumeError(name)


class _HoleFiller:
    """Sets the ranges that became holes, as far as the chunks that are read have come."""

    def __init__(self, builder: MapWriter, selection: Selection) -> None:
        self._builder = builder
        self._ranges = iter(selection.holes)
        self._next = next(self._ranges, None)

    def fill_before(self, number: int) -> None:
        """Set all ranges below a chunk number."""
        while self._next is not None and self._next[0] < number:
            self._builder.fill(*self._next, HOLE)
            self._next = next(self._ranges, None)
