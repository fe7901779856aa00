"""The objects under ``gc/``: what was forgotten, and how far garbage collection is (docs/design.md, 3.9)."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TypeVar

from pydantic import BaseModel

from blocksnap.backends.errors import ObjectExistsError
from blocksnap.repository.decoding import encode_signed
from blocksnap.repository.documents import Condemned, Done, Forgotten, SetAside, Sweep
from blocksnap.repository.errors import NewerFormatError
from blocksnap.repository.frame import FrameType, Sealer
from blocksnap.repository.keys import Right
from blocksnap.repository.repository import ASIDE, FORGET, Repository

_PART = re.compile(r"gc/(\d{8})/(condemned|sweep|done)")
_Part = TypeVar("_Part", Condemned, Sweep, Done)


@dataclass(frozen=True, slots=True)
class Epoch:
    """The last epoch of garbage collection; ``number`` 0 when there was none.

    They count from 1: an index segment of epoch 0 is one of a writer.
    """

    number: int = 0
    condemned: Condemned | None = None
    sweep: Sweep | None = None
    done: bool = True

    @property
    def is_open(self) -> bool:
        """Whether something is condemned that may still be there."""
        return self.condemned is not None and not self.done


def read_epoch(repository: Repository) -> Epoch:
    """Return the last epoch; raises DamageError, and NewerFormatError for what this version does not know."""
    found = _list_parts(repository)
    if not found:
        return Epoch()
    number = max(found)
    parts = found[number]
    return Epoch(
        number,
        _read(repository, number, "condemned", Condemned),
        _read(repository, number, "sweep", Sweep) if "sweep" in parts else None,
        done="done" in parts,
    )


def read_object(repository: Repository, name: str) -> BaseModel:
    """Return any object under ``gc/``; raises DamageError, NewerFormatError, ObjectMissingError."""
    if name.startswith(FORGET):
        return repository.read_signed(name, FrameType.COLLECTION, Forgotten)
    if name.startswith(ASIDE):
        return repository.read_signed(name, FrameType.COLLECTION, SetAside)
    match = _PART.fullmatch(name)
    if match is None:
        raise NewerFormatError(repository.backend.place, f"the object {name}")
    models: dict[str, type[BaseModel]] = {"condemned": Condemned, "sweep": Sweep, "done": Done}
    return repository.read_signed(name, FrameType.COLLECTION, models[match[2]])


def epoch_numbers(repository: Repository) -> set[int]:
    """Return the epochs of which anything is left."""
    return set(_list_parts(repository))


def read_done(repository: Repository, number: int) -> Done:
    """Return the end of an epoch."""
    return _read(repository, number, "done", Done)


def create_part(repository: Repository, part: str, document: _Part) -> _Part:
    """Create one object of an epoch, or return that which was there first."""
    name = _name(document.epoch, part)
    sealed = _seal(repository, name, document)
    try:
        repository.backend.put(name, sealed)
    except ObjectExistsError:
        return repository.read_signed(name, FrameType.COLLECTION, type(document))
    return document


def create_forgotten(repository: Repository, document: Forgotten) -> None:
    """Give backups up: from now on nobody sees them, and the next garbage collection may drop them."""
    name = f"{FORGET}{document.run}"
    repository.backend.put(name, _seal(repository, name, document))


def create_set_aside(repository: Repository, document: SetAside) -> None:
    """Set aside what a repair has replaced: its packs and segments have to be durable by now."""
    name = f"{ASIDE}{document.run}"
    repository.backend.put(name, _seal(repository, name, document))


def part_names(number: int) -> tuple[str, ...]:
    """Return the names of the objects of an epoch, in the order in which they may be deleted."""
    return tuple(_name(number, part) for part in ("condemned", "sweep", "done"))


def _seal(repository: Repository, name: str, document: BaseModel) -> bytes:
    # Signed, so that a host which may only add cannot have others delete for it.
    plain = encode_signed(document, name, repository.keys, Right.COLLECT)
    return Sealer(repository.keys).seal(FrameType.COLLECTION, plain)


def _list_parts(repository: Repository) -> dict[int, set[str]]:
    found: dict[int, set[str]] = {}
    for info in repository.backend.list("gc/"):
        if info.name.startswith((FORGET, ASIDE)):
            continue
        match = _PART.fullmatch(info.name)
        if match is None:
            raise NewerFormatError(repository.backend.place, f"the object {info.name}")
        found.setdefault(int(match[1]), set()).add(match[2])
    return found


def _name(number: int, part: str) -> str:
    return f"gc/{number:08d}/{part}"


def _read(repository: Repository, number: int, part: str, model: type[_Part]) -> _Part:
    return repository.read_signed(_name(number, part), FrameType.COLLECTION, model)
