"""How much the backups of each volume can be relied on: their age, drills, checks, and known losses."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime

from blocksnap.errors import UsageError
from blocksnap.operations.catalogue import is_luks_header
from blocksnap.operations.describing import name_hosts
from blocksnap.operations.losses import current_losses
from blocksnap.repository.checked import load_states, newest
from blocksnap.repository.documents import Drilled
from blocksnap.repository.drills import drills
from blocksnap.repository.repository import Repository
from blocksnap.repository.scrubbing import HASHES
from blocksnap.repository.stored import StoredBackup
from blocksnap.retention import PolicyError, Span


@dataclass(frozen=True, slots=True)
class Ages:
    """From which age on something is to be told; None for never."""

    backup: Span | None = None
    drill: Span | None = None
    check: Span | None = None

    @classmethod
    def parse(cls, backup: str | None, drill: str | None, check: str | None) -> Ages:
        """Return the ages that somebody typed; raises UsageError."""
        try:
            return cls(*(Span.parse(text) if text else None for text in (backup, drill, check)))
        except (PolicyError, ValueError) as err:
            raise UsageError(f"not an age: {err}", resolution="write it like 26h, 8d, 2w or 6m") from err


@dataclass(frozen=True, slots=True)
class VolumeReport:
    """One volume of one host: its newest backup and drill."""

    key: str
    name: str
    host: str
    called: str
    """What tells the host from all others: its name, and more where several have it."""
    backups: int
    backup: str
    time: datetime
    drill: Drilled | None
    warnings: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Report:
    """All volumes, and when packs were last read by a check."""

    volumes: tuple[VolumeReport, ...]
    checked: datetime | None
    warnings: tuple[str, ...]
    now: datetime

    def document(self) -> dict[str, object]:
        """Return its JSON form; ages are in seconds."""
        return {
            "volumes": [self._volume(volume) for volume in self.volumes],
            "last_check": self.checked.isoformat() if self.checked else None,
            "warnings": list(self.warnings),
        }

    def _volume(self, volume: VolumeReport) -> dict[str, object]:
        drill = volume.drill
        return {
            "volume": volume.name,
            "host": volume.host,
            "backups": volume.backups,
            "last_backup": volume.backup,
            "last_backup_time": volume.time.isoformat(),
            "last_backup_age_seconds": _age(volume.time, self.now),
            "last_drill": describe_drill(drill),
            "last_drill_age_seconds": _age(drill.time, self.now) if drill else None,
            "warnings": list(volume.warnings),
        }


def describe_drill(drill: Drilled | None) -> dict[str, object] | None:
    """Return what ``list --json`` and ``report --json`` say of a drill."""
    if drill is None:
        return None
    failed = next((step.step for step in drill.steps if not step.ok), None)
    return {"backup": drill.backup, "time": drill.time.isoformat(), "good": drill.good, "failed_at": failed}


def make_report(repository: Repository, ages: Ages, now: datetime) -> Report:
    """Look at everything that is recorded; the packs themselves are not read."""
    lineages: dict[tuple[str, str, str], list[StoredBackup]] = {}
    for stored in repository.backups():
        lineages.setdefault(stored.lineage, []).append(stored)
    last_drills = _last_drills(repository, lineages)
    hosts = name_hosts((id_, name) for _, id_, name in lineages)
    volumes = tuple(
        _report(repository, backups, hosts[lineage[1:]], last_drills.get(lineage), ages, now)
        for lineage, backups in lineages.items()
    )
    checked = newest(load_states(repository), HASHES)
    names = Counter(volume.name for volume in volumes)
    warnings = [
        f"{volume.name}{f' on {volume.called}' if names[volume.name] > 1 else ''}: {text}"
        for volume in volumes
        for text in volume.warnings
    ]
    if not volumes:
        warnings.append("there are no backups")
    if ages.check and (checked is None or checked < ages.check.before(now)):
        warnings.append("packs were not read by a check for longer than that: blocksnap check --scrub")
    warnings += [err.brief for err in repository.damage]
    return Report(volumes, checked, tuple(warnings), now)


def _last_drills(
    repository: Repository, lineages: Mapping[tuple[str, str, str], Sequence[StoredBackup]]
) -> dict[tuple[str, str, str], Drilled]:
    """Return the newest drill of each lineage.

    One of a backup that is gone counts where one host only has the volume: whose it was cannot be told.
    """
    of_backup = {stored.backup.id: lineage for lineage, of in lineages.items() for stored in of}
    of_volume: dict[str, list[tuple[str, str, str]]] = {}
    for lineage in lineages:
        of_volume.setdefault(lineage[0], []).append(lineage)
    found: dict[tuple[str, str, str], Drilled] = {}
    for drill in drills(repository):
        hosts = of_volume.get(drill.volume.key, [])
        whose = of_backup.get(drill.backup) or (hosts[0] if len(hosts) == 1 else None)
        if whose is not None:
            found.setdefault(whose, drill)
    return found


def last_drills_of_backups(repository: Repository) -> dict[str, Drilled]:
    """Return the newest drill of each backup that was drilled."""
    found: dict[str, Drilled] = {}
    for drill in drills(repository):
        found.setdefault(drill.backup, drill)
    return found


def _report(
    repository: Repository,
    backups: list[StoredBackup],
    host: str,
    drill: Drilled | None,
    ages: Ages,
    now: datetime,
) -> VolumeReport:
    last = backups[-1]
    return VolumeReport(
        key=last.backup.volume.key,
        name=last.backup.volume.name,
        host=last.manifest.hostname,
        called=host,
        backups=len(backups),
        backup=last.backup.id,
        time=last.oldest,
        drill=drill,
        warnings=tuple(_warnings(repository, last, drill, ages, now)),
    )


def _warnings(
    repository: Repository, last: StoredBackup, drill: Drilled | None, ages: Ages, now: datetime
) -> Iterator[str]:
    if ages.backup and last.oldest < ages.backup.before(now):
        yield f"the last backup is {_hours(last.oldest, now)} old"
    if drill is not None and not drill.good:
        step = next((step for step in drill.steps if not step.ok), None)
        yield f"the last drill, of backup {drill.backup[:8]}, failed{f' at {step.step}' if step else ''}"
    if is_luks_header(last.backup):
        # There is nothing in it to mount.
        ages = replace(ages, drill=None)
    if ages.drill and drill is None:
        yield "it was never drilled"
    elif ages.drill and drill is not None and drill.time < ages.drill.before(now):
        yield f"the last drill was {_hours(drill.time, now)} ago"
    if total := current_losses(repository, last.backup).total_bytes:
        yield f"{total} bytes of the last backup are lost: blocksnap show {last.backup.id[:8]}"


def _age(moment: datetime, now: datetime) -> int:
    return max(int((now - moment.astimezone(UTC)).total_seconds()), 0)


def _hours(moment: datetime, now: datetime) -> str:
    hours = _age(moment, now) / 3600
    return f"{hours / 24:.0f} days" if hours >= 72 else f"{hours:.0f} hours"
