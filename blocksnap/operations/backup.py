"""Take a backup of one or several volumes: one run, one instant, one commit."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime

import blocksnap
from blocksnap.controller.guard import Guard
from blocksnap.controller.lock import VolumeLocks
from blocksnap.controller.quiescing import QuiesceRequest
from blocksnap.controller.session import SnapshotSession, locks_of
from blocksnap.errors import DamageError
from blocksnap.operations.catalogue import newest_of
from blocksnap.operations.draft import BackupOptions, Draft
from blocksnap.operations.grouping import tell_of_parts, tell_of_skew
from blocksnap.operations.guarding import guarded, require_room
from blocksnap.operations.recording import record_host
from blocksnap.operations.reporting import Reporter
from blocksnap.operations.runs import is_gone, this_author
from blocksnap.operations.storing import plan_backup, store_volume
from blocksnap.repository.documents import Backup, Manifest
from blocksnap.repository.errors import FencedError
from blocksnap.repository.repository import Repository
from blocksnap.repository.stored import StoredBackup
from blocksnap.repository.writer import RepositoryWriter, Stored
from blocksnap.system.host import host_id, host_name
from blocksnap.volumes.base import Snapshot, Volume, as_image, is_tree

_OWNER_DIGITS = 16
"""Of a repository's id, in the tag of a base: enough to tell the repositories of one host apart."""


@dataclass(frozen=True, slots=True)
class _Run:
    """What the volumes of a run are stored with."""

    repository: Repository
    writer: RepositoryWriter
    session: SnapshotSession
    options: BackupOptions
    report: Reporter

    def store(self, volume: Volume, snapshot: Snapshot, parent: Backup | None, before: Stored) -> Draft:
        """Store one volume; a parent that turns out to be damaged is done without."""
        try:
            return self._store_plan(volume, snapshot, parent, before, full=self.options.full)
        except DamageError as err:
            if parent is None:
                raise
            self.report.warn(
                f"backup {parent.id[:8]}, the parent, is damaged: {err.brief}",
                resolution="everything is read instead; run: blocksnap check --read-data",
            )
        self.writer.start_over()
        return self._store_plan(
            volume, snapshot, None, before, full=True, reason="the parent backup is damaged"
        )

    def _store_plan(
        self,
        volume: Volume,
        snapshot: Snapshot,
        parent: Backup | None,
        before: Stored,
        *,
        full: bool,
        reason: str = "",
    ) -> Draft:
        """Plan and store one volume; ``reason`` is why, where that is not the source's."""
        repository, writer, knows = self.repository, self.writer, self.session.remembers
        if is_tree(snapshot):
            from blocksnap.operations.tree_storing import plan_tree, store_tree

            tree = plan_tree(repository, volume, snapshot, parent, knows, full=full)
            if reason:
                tree = replace(tree, changes=replace(tree.changes, reason=reason))
            self.report.event("plan", **tree.facts())
            return store_tree(repository, writer, tree, before, self.options, self.report)
        plan = plan_backup(repository, volume, as_image(snapshot), parent, knows, full=full)
        if reason:
            plan = replace(plan, changes=replace(plan.changes, reason=reason))
        self.report.event("plan", **plan.facts())
        return store_volume(repository, writer, plan, before, self.options, self.report)


def back_up(
    repository: Repository,
    volumes: Sequence[Volume],
    state_directory: str,
    options: BackupOptions,
    report: Reporter,
) -> list[StoredBackup]:
    """Back up ``volumes`` at one instant; nothing is stored under a name until everything is.

    Raises BusyError, VolumeError, QuiesceError, StorageError; the snapshots are gone whatever happens.
    """
    request = QuiesceRequest(options.quiesce, (repository.backend.place,), options.job)
    request.check(volumes)
    require_room(repository.backend, options.limits)
    tell_of_parts(volumes, report)
    # Another run is waited for before anything is known of the repository: what it stores is the parent, and
    # whoever collects garbage does not wait for one that waits itself. Then the run announces itself: a
    # repository that cannot be written to costs no snapshot, and collectors know of the run before it relies
    # on what is stored.
    with (
        locks_of(volumes, state_directory, wait_seconds=options.wait_seconds) as locks,
        RepositoryWriter(repository, this_author(), is_gone) as writer,
    ):
        known = repository.backups()
        with (
            open_session(volumes, writer.id.hex(), state_directory, report, request, locks=locks) as session,
            guarded(
                session,
                options.limits,
                report,
                of_volumes=options.volume_limits,
                backend=repository.backend,
            ) as guard,
        ):
            began = time.monotonic()
            tell_of_skew(session, report)
            run = _Run(repository, writer, session, options, report)
            try:
                return _store(run, guard, known, began)
            except FencedError as err:
                if session.is_released:
                    # Applications go on, and what has no snapshots cannot be read once more.
                    raise
                writer.stop()
                report.warn(err.brief, resolution="it goes on as another run, with what it has stored")
                return _store_again(run, guard, began)
            finally:
                # Nothing of ours runs beside the programs that remove the snapshots.
                writer.stop()


def _store_again(run: _Run, guard: Guard, began: float) -> list[StoredBackup]:
    """Store the snapshots once more, as a run that nobody has shut out; raises FencedError if somebody does.

    What the first run relied on may be gone, so all that changed is read again; what it stored itself is
    taken over as that of any run that was shut out, and not stored twice.
    """
    with RepositoryWriter(run.repository, this_author(), is_gone) as writer:
        writer.stored = writer.stored.plus(run.writer.stored)
        return _store(replace(run, writer=writer), guard, run.repository.backups(), began)


@contextmanager
def open_session(
    volumes: Sequence[Volume],
    run: str,
    state_directory: str,
    report: Reporter,
    quiesce: QuiesceRequest | None = None,
    *,
    locks: VolumeLocks | None = None,
) -> Iterator[SnapshotSession]:
    """Hold snapshots of volumes, and tell what was cleaned up and what could not be, however it ends."""
    session = SnapshotSession(volumes, run, state_directory, quiesce, locks=locks)
    try:
        with session:
            for message in session.recovered:
                report.event("recovered", message=message)
            if session.gone:
                report.event(
                    "left-out",
                    reason="deleted before there was a snapshot",
                    subvolumes=", ".join(session.gone),
                )
            yield session
    finally:
        for warning in session.warnings:
            report.warn(warning, resolution="the next backup of the volume tries again")


def plan_backups(
    repository: Repository,
    volumes: Sequence[Volume],
    state_directory: str,
    options: BackupOptions,
    report: Reporter,
) -> list[dict[str, object]]:
    """Take the snapshots, return what a backup would read and why, remove them, and store nothing.

    Nobody stands still for that; a job whose applications could not is refused all the same.
    """
    QuiesceRequest(options.quiesce, job=options.job).check(volumes)
    tell_of_parts(volumes, report)
    run = secrets.token_hex(16)
    with locks_of(volumes, state_directory, wait_seconds=options.wait_seconds) as locks:
        known = repository.backups()
        with (
            open_session(volumes, run, state_directory, report, locks=locks) as session,
            guarded(session, options.limits, report, of_volumes=options.volume_limits),
        ):
            plans = [
                _plan_one(
                    repository,
                    volume,
                    snapshot,
                    newest_of(known, volume.key),
                    session.remembers,
                    full=options.full,
                )
                for volume, snapshot in zip(session.volumes, session.snapshots, strict=True)
            ]
    for plan in plans:
        report.event("plan", **plan)
    return plans


def _plan_one(
    repository: Repository,
    volume: Volume,
    snapshot: Snapshot,
    parent: Backup | None,
    knows: Callable[[Volume, str], bool],
    *,
    full: bool,
) -> dict[str, object]:
    if is_tree(snapshot):
        from blocksnap.operations.tree_storing import measure, plan_tree

        return measure(plan_tree(repository, volume, snapshot, parent, knows, full=full))
    image = as_image(snapshot)
    return plan_backup(repository, volume, image, parent, knows, full=full).facts()


def _store(run: _Run, guard: Guard, known: list[StoredBackup], began: float) -> list[StoredBackup]:
    writer, session, options = run.writer, run.session, run.options
    guard.claim()
    drafts: list[Draft] = []
    for volume, snapshot in zip(session.volumes, session.snapshots, strict=True):
        parent = newest_of(known, volume.key)
        before = writer.stored.since(Stored()) if drafts else Stored()
        drafts.append(run.store(volume, snapshot, parent, before))
    session.check()
    session.release()
    guard.release()
    session.committing()
    bases = session.decide_bases(options.base)
    recovery = record_host(session.volumes, run.report)

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
            recovery=recovery,
            backups=tuple(
                draft.finish(
                    writer.backup_id(number),
                    base,
                    quiesced=session.quiesced,
                    skew_seconds=session.skew_seconds,
                    seconds=seconds,
                )
                for number, (draft, base) in enumerate(zip(drafts, bases, strict=True))
            ),
        )

    manifest, size = writer.commit(compose)
    writer.stop()
    session.settle(run.repository.config.id[:_OWNER_DIGITS], bases)
    return [StoredBackup(backup, manifest, size) for backup in manifest.backups]
