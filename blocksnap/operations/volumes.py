"""Survey the host: what can be protected, and when it was last."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from blocksnap.operations.catalogue import of_volume
from blocksnap.repository.repository import Repository
from blocksnap.system.host import host_id
from blocksnap.volumes.discover import discover


@dataclass(frozen=True, slots=True)
class SurveyedVolume:
    """One line of ``volumes``."""

    name: str
    kind: str
    size: int
    filesystem: str | None
    used_by: tuple[str, ...]
    tracking: str | None
    supported: bool
    obstacle: str | None
    bases: tuple[str, ...]
    last_backup: str | None

    def document(self) -> dict[str, object]:
        """Return its JSON form."""
        return asdict(self)


def survey(repository: Repository | None) -> list[SurveyedVolume]:
    """Return everything on the host that is a volume or could be one."""
    here = host_id()
    backups = (
        [stored for stored in repository.backups() if stored.manifest.host == here] if repository else []
    )
    surveyed = []
    for found in discover():
        mine = of_volume(backups, found.name)
        surveyed.append(
            SurveyedVolume(
                name=found.name,
                kind=found.kind,
                size=found.size,
                filesystem=found.filesystem,
                used_by=tuple(found.used_by),
                tracking=found.tracking,
                supported=found.supported,
                obstacle=found.obstacle,
                bases=found.bases,
                last_backup=mine[-1].backup.time.isoformat(timespec="seconds") if mine else None,
            )
        )
    return surveyed
