"""What checks have read, kept in the repository for whoever checks next, on whichever host.

It only says what is worth reading again: nobody relies on it for anything else, so it is not signed.
"""

from __future__ import annotations

import contextlib
from collections.abc import Container, Iterable, Mapping
from datetime import datetime

from blocksnap.backends.errors import ObjectMissingError
from blocksnap.errors import DamageError
from blocksnap.repository.documents import Checked
from blocksnap.repository.errors import DamagedObjectError, NewerFormatError
from blocksnap.repository.frame import FrameType, Sealer
from blocksnap.repository.repository import Repository
from blocksnap.repository.scrubbing import CONTENTS, HASHES, PackState

CHECKS = "checks/"


def read_checked(repository: Repository, name: str) -> Checked:
    """Return one object; raises DamageError, NewerFormatError."""
    document = repository.read_document(name, FrameType.COLLECTION, Checked)
    if name != CHECKS + document.run:
        raise DamagedObjectError(name, "it is another check's")
    return document


def store_checked(repository: Repository, document: Checked) -> None:
    """Keep what a check, or a part of one, has read; raises StorageError."""
    sealed = Sealer(repository.keys).seal(FrameType.COLLECTION, document.model_dump_json().encode())
    repository.backend.put(CHECKS + document.run, sealed)


def load_states(repository: Repository) -> dict[str, PackState]:
    """Return what is known of every pack that was ever read."""
    return merge_states({}, (document for _, document in _all(repository)))


def merge_states(known: Mapping[str, PackState], documents: Iterable[Checked]) -> dict[str, PackState]:
    """Return what is known with what checks have found since, in order of time."""
    states = dict(known)
    for document in sorted(documents, key=lambda document: document.time):
        for name in document.good:
            before = states.get(name, PackState())
            opened = document.time if document.level >= CONTENTS else before.opened
            states[name] = PackState(document.time, opened)
        for name in document.bad:
            before = states.get(name, PackState())
            states[name] = PackState(before.hashed, before.opened, is_bad=True)
    return states


def superseded(repository: Repository, packs: Container[str]) -> list[str]:
    """Return the names of what says nothing that later checks do not say, of packs that are there."""
    found: list[str] = []
    seen: dict[str, int] = {}
    for name, document in sorted(_all(repository), key=lambda pair: pair[1].time, reverse=True):
        says = [pack for pack in (*document.good, *document.bad) if pack in packs]
        if all(seen.get(pack, 0) >= document.level for pack in says):
            found.append(name)
        for pack in says:
            seen[pack] = max(seen.get(pack, HASHES), document.level)
    return found


def _all(repository: Repository) -> Iterable[tuple[str, Checked]]:
    for info in list(repository.backend.list(CHECKS)):
        # What cannot be read, or is gone, is read again in the packs themselves.
        with contextlib.suppress(DamageError, NewerFormatError, ObjectMissingError):
            yield info.name, read_checked(repository, info.name)


def newest(states: Mapping[str, PackState], level: int) -> datetime | None:
    """Return when a pack was last found good at a level."""
    return max(filter(None, (state.good_at(level) for state in states.values())), default=None)
