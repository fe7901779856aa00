"""Store the backup of one volume: choose the chunks, read them, and build its map from the parent's."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Literal

from blocksnap.controller.pacing import Pace
from blocksnap.controller.settings import LimitSettings, PaceSettings
from blocksnap.extents.changes import BaseDecision, BasePolicy, Changes, Parent
from blocksnap.extents.model import ExtentList
from blocksnap.operations.catalogue import map_root, root_document
from blocksnap.operations.losses import current_losses
from blocksnap.operations.mapped import load_mapped, store_mapped
from blocksnap.operations.reporting import Reporter, phase
from blocksnap.operations.sink import DataSink
from blocksnap.pipeline.flow import Flow, Geometry
from blocksnap.pipeline.selection import Selection, select_all, select_changed
from blocksnap.quiesce.settings import QuiesceSettings
from blocksnap.repository.blockmap import HOLE, ZERO, MapReader, MapRoot, MapWriter
from blocksnap.repository.documents import (
    ApplicationRecord,
    Backup,
    Mapped,
    Quiesced,
    Statistics,
    VolumeRecord,
)
from blocksnap.repository.repository import Repository
from blocksnap.repository.writer import RepositoryWriter, Stored
from blocksnap.volumes.base import Snapshot, Volume

if TYPE_CHECKING:
    from blocksnap.quiesce.standstill import Outcome


@dataclass(frozen=True, slots=True)
class BackupOptions:
    """How a backup is to be taken."""

    full: bool = False
    tags: Mapping[str, str] | None = None
    base: BasePolicy = "none"
    quiesce: QuiesceSettings = field(default_factory=QuiesceSettings)
    job: str = ""
    limits: LimitSettings = field(default_factory=LimitSettings)
    volume_limits: Mapping[str, LimitSettings] = field(default_factory=dict)
    """Of volumes that have others than the job, by their keys."""
    pace: PaceSettings = field(default_factory=PaceSettings)
    wait_seconds: float = 0.0
    """How long to wait for another run that has a volume."""
    level: int = 1
    workers: int = 2


@dataclass(frozen=True, slots=True)
class BackupPlan:
    """What will be read of one volume, and why."""

    volume: Volume
    snapshot: Snapshot
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


@dataclass(slots=True)
class Draft:
    """A backup whose chunks are stored but which is not committed yet."""

    plan: BackupPlan
    map: MapRoot
    mapped: Mapped | None
    changed_bytes: int
    read_bytes: int
    before: Stored
    stored: Stored

    def finish(
        self,
        id_: str,
        base: BaseDecision | None,
        *,
        quiesced: Outcome | None,
        skew_seconds: float,
        seconds: float,
    ) -> Backup:
        """Return the record for the manifest; ``base`` is None for what has no use for one."""
        plan, snapshot, volume = self.plan, self.plan.snapshot, self.plan.volume
        return Backup(
            id=id_,
            volume=VolumeRecord(name=volume.name, key=volume.key, kind=volume.kind),
            time=datetime.fromtimestamp(snapshot.timing.taken_at, UTC),
            kind=plan.kind,
            parent=plan.parent.id if plan.parent else None,
            method=plan.changes.method,
            reason=plan.changes.reason,
            size=snapshot.size,
            chunk_size=plan.geometry.chunk_size,
            map=root_document(self.map),
            mapped=self.mapped,
            source={**snapshot.binding, **(base.to_binding() if base else {})},
            consistency=_consistency(volume, quiesced),
            quiesced=_quiesced_document(quiesced),
            statistics=Statistics(
                changed_bytes=self.changed_bytes,
                read_bytes=self.read_bytes,
                new_bytes=self.stored.new_bytes,
                stored_bytes=self.stored.total_bytes,
                metadata_bytes=self.stored.metadata_bytes,
                new_chunks=self.stored.new_chunks,
                freeze_ms=_milliseconds(
                    max(snapshot.timing.freeze_seconds, quiesced.seconds if quiesced else 0.0)
                ),
                skew_ms=round(skew_seconds * 1000, 3),
                seconds=round(seconds, 3),
            ),
        )


def plan_backup(
    repository: Repository,
    volume: Volume,
    snapshot: Snapshot,
    parent: Backup | None,
    knows: Callable[[Volume, str], bool],
    *,
    full: bool,
) -> BackupPlan:
    """Ask the source what has changed and choose the chunks to read.

    ``knows`` tells whether this host has a record of a run of a volume.
    """
    geometry = Geometry(snapshot.size, repository.chunk_size)
    if full or (parent is not None and parent.chunk_size != repository.chunk_size):
        parent = None
    remembered = None
    if parent is not None:
        mapped = parent.mapped
        run = parent.source.get("run")
        known_here = isinstance(run, str) and knows(volume, run)
        remembered = Parent(parent.size, parent.source, known_here, lambda: load_mapped(repository, mapped))
    changes = snapshot.find_changes(remembered)
    if parent is not None and changes.inherits:
        changes = _with_lost(changes, ExtentList.of(current_losses(repository, parent)).clip(snapshot.size))
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
    """What the repository has lost of the parent is read, so that the new backup is whole."""
    if not lost:
        return changes
    reason = f"{changes.reason}; {lost.total} bytes of the parent are lost, and read again"
    return replace(changes, reason=reason, changed=changes.changed.union(lost))


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
            with (
                plan.snapshot.open_reader() as fd,
                Flow(fd, plan.geometry, extents, sink, workers=options.workers, pace=pace) as flow,
            ):
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
    return Draft(plan, root, mapped, changed, read, before, writer.stored.since(before))


def _consistency(volume: Volume, quiesced: Outcome | None) -> Literal["crash", "application", "cold"]:
    if volume.snapshot_device is None:
        return "cold"
    return "application" if quiesced is not None and quiesced.state == "application" else "crash"


def _quiesced_document(outcome: Outcome | None) -> Quiesced | None:
    if outcome is None:
        return None
    return Quiesced(
        state=outcome.state,
        by=outcome.by,
        reason=outcome.reason,
        ms=_milliseconds(outcome.seconds),
        records=tuple(
            ApplicationRecord(kind=each.kind, name=each.name, facts=dict(each.facts))
            for each in outcome.records
        ),
    )


def _milliseconds(seconds: float) -> float:
    return round(seconds * 1000, 3)


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
