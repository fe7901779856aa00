"""Survey the host: what can be protected, by which job it is, and when it was last."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime

from blocksnap.config import Configuration
from blocksnap.errors import BlocksnapError, VolumeError
from blocksnap.operations.catalogue import of_volume, this_origin
from blocksnap.repository.repository import Repository
from blocksnap.repository.stored import StoredBackup
from blocksnap.volumes.discover import Candidate, describe_image, discover
from blocksnap.volumes.errors import NameNotTextError
from blocksnap.volumes.resolve import resolve_volumes


@dataclass(frozen=True, slots=True)
class SurveyedVolume:
    """One line of ``volumes``; ``age_seconds`` is that of the last backup."""

    name: str
    kind: str
    size: int
    filesystem: str | None
    mountpoints: tuple[str, ...]
    stacked: tuple[str, ...]
    tracking: str | None
    supported: bool
    obstacle: str | None
    advice: str | None
    bases: tuple[str, ...]
    jobs: tuple[str, ...]
    last_backup: str | None
    age_seconds: float | None

    @property
    def used_by(self) -> tuple[str, ...]:
        """Where it is mounted, and what lies on it."""
        return self.mountpoints + self.stacked

    def document(self) -> dict[str, object]:
        """Return its JSON form."""
        return {**asdict(self), "used_by": self.used_by}


def survey(repository: Repository | None, configuration: Configuration | None) -> list[SurveyedVolume]:
    """Return everything on the host that is a volume or could be one, and the files that jobs name."""
    found = discover()
    jobs: dict[str, list[str]] = {}
    if configuration is not None:
        found += _match_jobs(configuration, found, jobs)
    here = this_origin()
    backups = [stored for stored in repository.backups() if stored.origin == here] if repository else []
    now = datetime.now(UTC)
    return [_surveyed(each, tuple(jobs.get(each.name, ())), backups, now) for each in found]


def _match_jobs(
    configuration: Configuration, found: list[Candidate], jobs: dict[str, list[str]]
) -> list[Candidate]:
    """Note which jobs name what was found; return what they name besides: files, and what is missing."""
    names = {alias: each.name for each in found for alias in (each.name, *each.aliases, *each.mountpoints)}
    by_key = {each.key: each for each in found if each.key}
    more: dict[str, Candidate] = {}
    for job_name, job in configuration.jobs.items():
        for text in job.volumes:
            path, _ = configuration.volume(text, job)
            if path in names:
                jobs.setdefault(names[path], []).append(job_name)
                continue
            for candidate in _named(path, by_key):
                if candidate not in found:
                    more.setdefault(candidate.name, candidate)
                jobs.setdefault(candidate.name, []).append(job_name)
    return list(more.values())


def _named(path: str, by_key: Mapping[str, Candidate]) -> list[Candidate]:
    """Return what a job names in another way than it is called: mostly files; or why there is none."""
    left_out: list[NameNotTextError] = []
    try:
        found = resolve_volumes(path, left_out=left_out.append)
    except BlocksnapError as err:
        return [_missing(path, err)]
    volumes = [by_key.get(volume.key) or _described(volume.name) for volume in found]
    return volumes + [_missing(err.name, err) for err in left_out]


def _described(path: str) -> Candidate:
    try:
        return describe_image(path)
    except VolumeError as err:
        # It has gone since it was found.
        return _missing(path, err)


def _missing(name: str, err: BlocksnapError) -> Candidate:
    nothing = Candidate(name, "missing", 0, "", (), (), None, supported=False)
    return replace(nothing, obstacle=err.brief, advice=err.resolution)


def _surveyed(
    found: Candidate, jobs: tuple[str, ...], backups: list[StoredBackup], now: datetime
) -> SurveyedVolume:
    mine = [stored for stored in backups if found.key and stored.backup.volume.key == found.key]
    mine = mine or of_volume(backups, found.name)
    last = mine[-1].backup.time if mine else None
    return SurveyedVolume(
        name=found.name,
        kind=found.kind,
        size=found.size,
        filesystem=found.filesystem,
        mountpoints=found.mountpoints,
        stacked=found.stacked,
        tracking=found.tracking,
        supported=found.supported,
        obstacle=found.obstacle,
        advice=found.advice,
        bases=found.bases,
        jobs=jobs,
        last_backup=last.isoformat(timespec="seconds") if last else None,
        age_seconds=round((now - last).total_seconds(), 3) if last else None,
    )
