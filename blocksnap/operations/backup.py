"""Take a backup of one or several volumes: one run, one instant, one commit."""

from __future__ import annotations

import time
from collections.abc import Sequence
from datetime import UTC, datetime

from blake3 import blake3

import blocksnap
from blocksnap.controller.session import SnapshotSession
from blocksnap.operations.catalogue import newest_of
from blocksnap.operations.reporting import Reporter
from blocksnap.operations.storing import BackupOptions, BackupPlan, Draft, plan_backup, store_volume
from blocksnap.repository.documents import Manifest
from blocksnap.repository.repository import Repository, StoredBackup
from blocksnap.repository.writer import RepositoryWriter, Stored
from blocksnap.system.host import host_id, host_name
from blocksnap.volumes.base import Volume


def back_up(
    repository: Repository,
    volumes: Sequence[Volume],
    state_directory: str,
    options: BackupOptions,
    report: Reporter,
) -> list[StoredBackup]:
    """Back up ``volumes`` at one instant; nothing is stored under a name until everything is.

    Raises BusyError, VolumeError, StorageError; the snapshots are gone whatever happens.
    """
    known = repository.backups()
    # The run announces itself first: a repository that cannot be written to costs no snapshot.
    with RepositoryWriter(repository, host=host_id(), hostname=host_name()) as writer:
        run = writer.id.hex()
        with SnapshotSession(volumes, run, state_directory) as session:
            for message in session.recovered:
                report.event("recovered", message=message)
            began = time.monotonic()
            try:
                results = _store(repository, writer, session, known, options, report, began)
            except BaseException:
                # Removing snapshots starts programs, and that goes before no thread of ours.
                writer.stop()
                raise
        for warning in session.warnings:
            report.warn(warning, resolution="run: blocksnap doctor --fix, or back up the volume again")
    return results


def plan_backups(
    repository: Repository,
    volumes: Sequence[Volume],
    state_directory: str,
    options: BackupOptions,
    report: Reporter,
) -> list[BackupPlan]:
    """Take the snapshots, say what a backup would read and why, remove them, and store nothing."""
    known = repository.backups()
    with SnapshotSession(
        volumes, blake3(str(time.time_ns()).encode()).hexdigest()[:32], state_directory
    ) as session:
        plans = [
            plan_backup(repository, volume, snapshot, newest_of(known, volume.key), full=options.full)
            for volume, snapshot in zip(volumes, session.snapshots, strict=True)
        ]
    for plan in plans:
        report.event("plan", **plan.facts())
    return plans


def _store(
    repository: Repository,
    writer: RepositoryWriter,
    session: SnapshotSession,
    known: list[StoredBackup],
    options: BackupOptions,
    report: Reporter,
    began: float,
) -> list[StoredBackup]:
    drafts: list[Draft] = []
    for volume, snapshot in zip(session.volumes, session.snapshots, strict=True):
        plan = plan_backup(repository, volume, snapshot, newest_of(known, volume.key), full=options.full)
        report.event("plan", **plan.facts())
        before = writer.stored.since(Stored()) if drafts else Stored()
        drafts.append(store_volume(repository, writer, plan, before, options, report))
    for snapshot in session.snapshots:
        snapshot.check()
    session.committing()

    def compose(_: RepositoryWriter) -> Manifest:
        # What the run stored last, pack footers and the index, is counted for its last volume.
        last = drafts[-1]
        last.stored = writer.stored.since(last.before)
        seconds = time.monotonic() - began
        return Manifest(
            writer=writer.id.hex(),
            time=datetime.now(UTC),
            host=host_id(),
            hostname=host_name(),
            program=f"blocksnap {blocksnap.__version__}",
            tags=dict(options.tags or {}),
            backups=tuple(
                draft.finish(_backup_id(writer.id, number), session.skew_seconds, seconds)
                for number, draft in enumerate(drafts)
            ),
        )

    manifest, size = writer.commit(compose)
    writer.stop()
    return [StoredBackup(backup, manifest, size) for backup in manifest.backups]


def _backup_id(writer: bytes, number: int) -> str:
    return blake3(writer + number.to_bytes(4, "little")).hexdigest()[:32]
