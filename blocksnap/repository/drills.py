"""What came of drills, kept in the repository for whoever asks how much its backups can be relied on.

Names begin with the time, so that the newest are found without reading the others. Like what checks have read
they are not signed: nobody decides by them what to keep.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from blocksnap.backends.errors import ObjectMissingError
from blocksnap.errors import DamageError
from blocksnap.repository.documents import Drilled
from blocksnap.repository.errors import DamagedObjectError, NewerFormatError
from blocksnap.repository.frame import FrameType, Sealer
from blocksnap.repository.repository import Repository

DRILLS = "drills/"
_KEPT = 100
"""Of each volume."""


def read_drilled(repository: Repository, name: str) -> Drilled:
    """Return one object; raises DamageError, NewerFormatError."""
    document = repository.read_document(name, FrameType.COLLECTION, Drilled)
    if name != _name(document):
        raise DamagedObjectError(name, "it is another drill's")
    return document


def store_drilled(repository: Repository, document: Drilled) -> None:
    """Keep what came of a drill; raises StorageError."""
    sealed = Sealer(repository.keys).seal(FrameType.COLLECTION, document.model_dump_json().encode())
    repository.backend.put(_name(document), sealed)


def drills(repository: Repository) -> Iterator[Drilled]:
    """Yield what came of the drills, the newest first; what cannot be read is passed over."""
    for name in _names(repository):
        with contextlib.suppress(DamageError, NewerFormatError, ObjectMissingError):
            yield read_drilled(repository, name)


def superseded_drills(repository: Repository) -> list[str]:
    """Return the names of all but the newest hundred of each volume."""
    names = _names(repository)
    if len(names) <= _KEPT:
        return []
    seen: dict[str, int] = {}
    found: list[str] = []
    for name in names:
        with contextlib.suppress(DamageError, NewerFormatError, ObjectMissingError):
            key = read_drilled(repository, name).volume.key
            seen[key] = seen.get(key, 0) + 1
            if seen[key] > _KEPT:
                found.append(name)
    return found


def _names(repository: Repository) -> list[str]:
    return sorted((info.name for info in repository.backend.list(DRILLS)), reverse=True)


def _name(document: Drilled) -> str:
    return f"{DRILLS}{document.time:%Y%m%d%H%M%S}-{document.run}"
