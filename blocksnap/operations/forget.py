"""Give backups up: by name, or by a policy. They are hidden at once, and pruning gives their space back."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

from blocksnap.errors import UsageError
from blocksnap.operations.catalogue import find_backup, newest_of
from blocksnap.repository.documents import Forgotten
from blocksnap.repository.epochs import create_forgotten
from blocksnap.repository.repository import Repository, StoredBackup
from blocksnap.retention import CLOCK_TOLERANCE, Candidate, Decision, Policy, apply_policy, require_modest


class NewestBackupError(UsageError):
    """The newest backup of a volume was to be forgotten, which the next one builds on."""

    def __init__(self, id_: str, volume: str) -> None:
        self.id, self.volume = id_, volume
        super().__init__(
            f"{id_[:8]} is the newest backup of {volume}",
            resolution="if the volume is given up altogether, add --force",
        )


@dataclass(frozen=True, slots=True)
class ForgetPlan:
    """What is kept and what is not, each with its reasons."""

    decisions: tuple[Decision, ...]

    @property
    def forgotten(self) -> tuple[str, ...]:
        """Ids of what is given up."""
        return tuple(decision.candidate.id for decision in self.decisions if not decision.keep)


def plan_by_policy(
    repository: Repository, policy: Policy, now: datetime, *, host: str | None = None, force: bool
) -> ForgetPlan:
    """Apply a policy to all backups, or those of a host; raises TooMuchForgottenError unless forced."""
    backups = [each for each in repository.backups() if host is None or each.manifest.host == host]
    decisions = apply_policy(_candidates(backups), policy, now)
    if not force:
        require_modest(decisions)
    return ForgetPlan(decisions)


def plan_by_name(repository: Repository, names: Sequence[str], *, force: bool) -> ForgetPlan:
    """Give up the backups that were named; raises NoSuchBackupError, NewestBackupError unless forced."""
    chosen = {stored.backup.id: stored for stored in (find_backup(repository, name) for name in names)}
    backups = repository.backups()
    if not force:
        for stored in chosen.values():
            newest = newest_of(backups, stored.backup.volume.key)
            if newest is not None and newest.id == stored.backup.id:
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


def _candidates(backups: Sequence[StoredBackup]) -> list[Candidate]:
    """Describe backups; what is older than the first arrival was copied here with its repository."""
    arrivals = [stored.received for stored in backups if stored.received is not None]
    first = min(arrivals) - CLOCK_TOLERANCE if arrivals else None
    return [
        _candidate(stored, stored.received if first is not None and stored.backup.time >= first else None)
        for stored in backups
    ]


def _candidate(stored: StoredBackup, received: datetime | None = None) -> Candidate:
    backup = stored.backup
    return Candidate(
        id=backup.id,
        volume=backup.volume.key,
        name=backup.volume.name,
        time=backup.time,
        received=received,
        tags=stored.manifest.tags,
    )
