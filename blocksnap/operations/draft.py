"""A backup that is stored and not committed yet, and how it was asked for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Literal

from blocksnap.controller.settings import LimitSettings, PaceSettings
from blocksnap.extents.changes import BaseDecision, BasePolicy, Method
from blocksnap.quiesce.settings import QuiesceSettings
from blocksnap.repository.documents import (
    ApplicationRecord,
    Backup,
    Inodes,
    Mapped,
    Quiesced,
    Root,
    Statistics,
    VolumeRecord,
)
from blocksnap.repository.writer import Stored
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


@dataclass(slots=True)
class Draft:
    """A backup whose chunks are stored but which is not committed yet."""

    volume: Volume
    snapshot: Snapshot
    parent: Backup | None
    method: Method
    reason: str
    size: int
    chunk_size: int
    map: Root
    mapped: Mapped | None
    inodes: Inodes | None
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
        snapshot, volume = self.snapshot, self.volume
        return Backup(
            id=id_,
            volume=VolumeRecord(name=volume.name, key=volume.key, kind=volume.kind),
            time=datetime.fromtimestamp(snapshot.timing.taken_at, UTC),
            kind="incremental" if self.parent else "full",
            parent=self.parent.id if self.parent else None,
            method=self.method,
            reason=self.reason,
            size=self.size,
            chunk_size=self.chunk_size,
            map=self.map,
            mapped=self.mapped,
            inodes=self.inodes,
            source={**snapshot.binding, **(base.to_binding() if base else {})},
            consistency=_consistency(volume, snapshot, quiesced),
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


def _consistency(
    volume: Volume, snapshot: Snapshot, quiesced: Outcome | None
) -> Literal["crash", "application", "cold"]:
    """Return what a backup is worth: of something that no running process could write to it is ``cold``."""
    if quiesced is not None and quiesced.state == "application":
        return "application"
    is_cold = volume.snapshot_device is None and snapshot.binding.get("writers") != "frozen"
    return "cold" if is_cold else "crash"


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
