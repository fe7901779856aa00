"""Manifests that have been here and are not any more, though no collection has deleted them.

What no manifest leads to is garbage, so a folder of manifests that is not mounted, was not copied or lies in
lost+found makes garbage of everything. Three things tell of them (docs/design.md, 3.9):

* a run's last record, which names the manifest once it is there;
* a pack whose run has left neither a record nor a manifest nor a fence. Runs announce themselves before their
  first pack, and records go when a manifest or a fence is there. Fences go after a year, so it tells nothing
  of a pack, or in a repository, that is older, unless there is not a single manifest;
* the last epoch, which names the manifests that were marked, and those of them that it has deleted.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from datetime import datetime, timedelta

from blocksnap.backends.base import ObjectInfo
from blocksnap.errors import DamageError
from blocksnap.repository.documents import WriterRecord
from blocksnap.repository.epochs import read_epoch
from blocksnap.repository.errors import NewerFormatError
from blocksnap.repository.frame import FrameType
from blocksnap.repository.pack import PackId
from blocksnap.repository.repository import Repository

KEPT_FOR = timedelta(days=365)
"""How long fences and the objects of an epoch stay: four times as long as any run may last."""


class MissingManifestsError(DamageError):
    """Manifests are gone: what they need would be taken for garbage (exit code 13)."""

    def __init__(self, runs: tuple[str, ...]) -> None:
        self.runs = runs
        super().__init__(
            f"{len(runs)} manifests are gone, manifests/{runs[0]} first; what they need looks like garbage, "
            "and nothing was deleted",
            resolution="bring back the folder manifests/ (a mount, lost+found, a copy of the repository); if "
            "it is lost for good: blocksnap repair --accept-loss",
        )


def missing_manifests(
    repository: Repository, packs: Iterable[ObjectInfo], now: datetime, *, any_manifest: bool
) -> tuple[str, ...]:
    """Return the runs whose manifests are gone; ``packs`` have been listed before this is called.

    ``any_manifest`` tells whether there is one at all, beside fences. Raises DamageError.
    """
    packs = list(packs)
    # In this order: a record goes only when a manifest or a fence is there, and a manifest only when a sweep
    # names it, with a fence right after it.
    records = _last_records(info.name for info in repository.backend.list("writers/"))
    listed = {info.name.removeprefix("manifests/") for info in repository.backend.list("manifests/")}
    epoch = read_epoch(repository)
    swept = set(epoch.sweep.manifests) if epoch.sweep else set[str]()
    known = records.keys() | listed | swept
    unsettled = sorted(records.keys() - listed - swept)
    committed = {run for run in unsettled if _tells_of_commit(repository, records[run])}
    # A damaged manifest that was given up may have been removed by hand.
    given_up = {name.removeprefix("manifests/") for name in repository.aside().objects}
    marked = set(epoch.condemned.marked) if epoch.condemned else set[str]()
    is_young = repository.config.created > now - KEPT_FOR
    owners = set(_owners(packs, now, of_all=not any_manifest, of_young=is_young))
    return tuple(sorted((committed | marked - listed - swept | owners - known) - given_up))


def _owners(packs: Iterable[ObjectInfo], now: datetime, *, of_all: bool, of_young: bool) -> Iterator[str]:
    """Yield the runs of packs, as far as something of them has to be there still."""
    for info in packs:
        is_young = of_young and (info.received is None or info.received > now - KEPT_FOR)
        if of_all or is_young:
            try:
                yield PackId.parse(info.name).writer.hex()
            except ValueError:
                continue


def _last_records(names: Iterable[str]) -> dict[str, str]:
    """Return the names of the last records of runs."""
    last: dict[str, tuple[int, str]] = {}
    for name in names:
        run, _, number = name.removeprefix("writers/").partition(".")
        found = int(number) if number.isdecimal() else -1, name
        last[run] = max(found, last.get(run, found))
    return {run: name for run, (_, name) in last.items()}


def _tells_of_commit(repository: Repository, record: str) -> bool:
    try:
        return repository.read_document(record, FrameType.WRITER, WriterRecord).tells_of_commit
    except (DamageError, NewerFormatError):
        # Or it went meanwhile, as its run is settled.
        return False
