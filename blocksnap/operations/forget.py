"""Give backups up: by name, or by a policy. They are hidden at once, and pruning gives their space back."""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta

from blocksnap.controller.arriving import read_arrivals
from blocksnap.errors import BusyError, UsageError
from blocksnap.operations.catalogue import find_backup
from blocksnap.operations.describing import name_hosts
from blocksnap.operations.reporting import Reporter
from blocksnap.repository.documents import Forgotten
from blocksnap.repository.epochs import create_forgotten
from blocksnap.repository.repository import Repository
from blocksnap.repository.stored import StoredBackup, copied_without_times
from blocksnap.retention import Candidate, Decision, Policy, apply_policy, require_modest

_TOLD_OF_COPY = timedelta(days=30)
"""So long after a copy without times the original may still be there, and nothing is told later."""


class NewestBackupError(UsageError):
    """The newest backup of a volume was to be forgotten, which the next one builds on."""

    def __init__(self, id_: str, volume: str) -> None:
        self.id, self.volume = id_, volume
        super().__init__(
            f"{id_[:8]} is the newest backup of {volume}",
            resolution="if the volume is given up altogether, add --force",
        )


class BackupArrivingError(BusyError):
    """A backup was to be forgotten whose data is still on its way to a volume (exit code 11)."""

    def __init__(self, id_: str, volume: str) -> None:
        self.id, self.volume = id_, volume
        super().__init__(
            f"{id_[:8]} is being restored to {volume}, which is in use and has not all of it yet",
            resolution="wait until it is there, see: blocksnap doctor",
        )


@dataclass(frozen=True, slots=True)
class ForgetPlan:
    """What is kept and what is not, each with its reasons."""

    decisions: tuple[Decision, ...]

    @property
    def forgotten(self) -> tuple[str, ...]:
        """Ids of what is given up."""
        return tuple(decision.candidate.id for decision in self.decisions if not decision.keep)

    def hosts(self) -> dict[tuple[str, str], str]:
        """Return what to call the hosts, by id and name."""
        return name_hosts(decision.candidate.origin for decision in self.decisions)


def backups_arriving(state_directory: str) -> dict[str, str]:
    """Return the volume of each backup that an instant restore on this host has still to read."""
    return {
        arrival.backup: arrival.volume
        for arrival, _held in read_arrivals(state_directory)
        if not arrival.has_all
    }


def plan_by_policy(
    repository: Repository,
    policy: Policy,
    now: datetime,
    *,
    origin: tuple[str, str] | None = None,
    arriving: Mapping[str, str],
    force: bool,
    report: Reporter,
) -> ForgetPlan:
    """Apply a policy to all backups, or those of a host by its id and name.

    Raises TooMuchForgottenError unless forced. Warns where a copy without times changes dates.

    What is still on its way to a volume (``backups_arriving``) stays, whatever the policy says.
    """
    backups = [each for each in repository.backups() if origin is None or each.origin == origin]
    _warn_of_copy(backups, now, report)
    decisions = tuple(
        replace(decision, keep=True, reasons=(f"being restored to {volume}",), by_date=True, by_clock=True)
        if not decision.keep and (volume := arriving.get(decision.candidate.id)) is not None
        else decision
        for decision in apply_policy(map(_candidate, backups), policy, now)
    )
    if not force:
        require_modest(decisions)
    return ForgetPlan(decisions)


def plan_by_name(
    repository: Repository, names: Sequence[str], *, arriving: Mapping[str, str], force: bool
) -> ForgetPlan:
    """Give up the backups that were named.

    Raises NoSuchBackupError, BackupArrivingError; NewestBackupError unless forced.
    """
    chosen = {stored.backup.id: stored for stored in (find_backup(repository, name) for name in names)}
    for id_ in chosen:
        if (volume := arriving.get(id_)) is not None:
            raise BackupArrivingError(id_, volume)
    newest = {stored.lineage: stored.backup.id for stored in repository.backups()}
    if not force:
        for stored in chosen.values():
            if newest.get(stored.lineage) == stored.backup.id:
                raise NewestBackupError(stored.backup.id, stored.backup.volume.name)
    return ForgetPlan(
        tuple(Decision(_candidate(stored), keep=False, reasons=("named",)) for stored in chosen.values())
    )


def execute_forget(repository: Repository, plan: ForgetPlan) -> None:
    """Hide what the plan gives up; raises NewerFormatError where this version must not collect garbage."""
    repository.require("gc")
    if plan.forgotten:
        create_forgotten(
            repository,
            Forgotten(
                run=secrets.token_hex(16), time=datetime.now(UTC), backups=tuple(sorted(plan.forgotten))
            ),
        )


def _warn_of_copy(backups: Sequence[StoredBackup], now: datetime, report: Reporter) -> None:
    recent = [each for each in backups if each.received and each.received > now - _TOLD_OF_COPY]
    copied = copied_without_times(recent)
    # What is older than the first arrival keeps its own dates: then nothing counts otherwise than it should.
    if any(stored.dated for stored in copied):
        times = [stored.backup.time for stored in copied]
        report.warn(
            f"{len(copied)} backups made over {(max(times) - min(times)).days} days arrived together: the "
            "repository was copied without the times of its files",
            resolution='bring them after it: see "Moving or copying a repository" in docs/operations.md',
        )


def _candidate(stored: StoredBackup) -> Candidate:
    backup = stored.backup
    return Candidate(
        id=backup.id,
        volume=backup.volume.key,
        name=backup.volume.name,
        time=backup.time,
        received=stored.dated,
        tags=stored.manifest.tags,
        host=stored.manifest.host,
        hostname=stored.manifest.hostname,
    )
