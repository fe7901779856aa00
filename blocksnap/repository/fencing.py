"""Who is writing to a repository, and how a silent run is shut out.

A run is *settled* when its manifest exists, or a fence in the place of one: of the two exactly one can be
created, so a run that was shut out can never commit. Clocks, and knowing that a process is gone, only
decide when it is worth trying (docs/design.md, 3.9).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timedelta

from blocksnap.backends.errors import ObjectExistsError
from blocksnap.errors import DamageError
from blocksnap.repository.documents import Fence, WriterRecord
from blocksnap.repository.errors import NewerFormatError
from blocksnap.repository.frame import FrameType, Sealer
from blocksnap.repository.repository import Repository

SILENCE = timedelta(hours=6)
"""A run says every five minutes that it is alive. A clock that is wrong by less shuts nobody out."""
IsGone = Callable[[WriterRecord], bool]
"""Tells that the process which wrote a record has ended; only ever of this host's own."""


@dataclass(frozen=True, slots=True)
class Run:
    """A run by its latest record, None when that cannot be read.

    ``epoch`` is the last one that it has said to have heeded, or -1. ``received`` is when the storage got
    its last record, by its own clock, if it has one.
    """

    writer: str
    record: WriterRecord | None
    epoch: int = -1
    received: datetime | None = None


def nobody_is_gone(_: WriterRecord) -> bool:
    """For where nothing is known of processes."""
    return False


def read_runs(repository: Repository, *, is_newer_passed_over: bool = False) -> dict[str, Run]:
    """Return all runs that have announced themselves, settled or not.

    A record that a later version wrote raises NewerFormatError, or is one that cannot be read.
    """
    names: dict[str, list[tuple[int, str]]] = {}
    arrivals: dict[str, datetime] = {}
    for info in repository.backend.list("writers/"):
        writer, _, number = info.name.removeprefix("writers/").partition(".")
        if number.isdecimal():
            names.setdefault(writer, []).append((int(number), info.name))
            if info.received:
                arrivals[writer] = max(info.received, arrivals.get(writer, info.received))
    runs = {}
    for writer, records in names.items():
        # The epoch is said in the second record or never.
        wanted = sorted({*sorted(records)[:2], max(records)})
        read = (
            _read_record(repository, name, is_newer_passed_over=is_newer_passed_over) for _, name in wanted
        )
        known = [record for record in read if record is not None]
        latest = max(known, key=lambda record: record.sequence, default=None)
        epochs = [record.epoch for record in known if record.epoch is not None]
        runs[writer] = Run(writer, latest, max(epochs, default=-1), arrivals.get(writer))
    return runs


def _read_record(repository: Repository, name: str, *, is_newer_passed_over: bool) -> WriterRecord | None:
    try:
        return repository.read_document(name, FrameType.WRITER, WriterRecord)
    except DamageError:
        return None
    except NewerFormatError:
        if not is_newer_passed_over:
            raise
        return None


def settled_runs(repository: Repository) -> set[str]:
    """Return the runs whose manifest or fence exists."""
    return {info.name.removeprefix("manifests/") for info in repository.backend.list("manifests/")}


def is_silent(run: Run, now: datetime, is_gone: IsGone) -> bool:
    """Tell whether it is worth trying to shut a run out: one whose records cannot be read, too.

    A record that is dated in the future, which may be decades, says nothing of when it was made: then the
    storage's clock does.
    """
    record = run.record
    if record is None or is_gone(record):
        return True
    heard = min(record.time, run.received) if run.received and record.time > now else record.time
    return heard < now - SILENCE


def fence(repository: Repository, writer: str, now: datetime) -> bool:
    """Shut a run out, or settle one's own; False when it has committed, or was shut out before."""
    document = Fence(writer=writer, time=now, fenced=True)
    sealed = Sealer(repository.keys).seal(FrameType.MANIFEST, document.model_dump_json().encode())
    try:
        repository.backend.put(f"manifests/{writer}", sealed)
    except ObjectExistsError:
        # A retried creation may meet its own first try.
        return repository.backend.read(f"manifests/{writer}") == sealed
    return True


def fenced_runs(repository: Repository, writers: set[str]) -> set[str]:
    """Return which of these settled runs were shut out."""
    found = set()
    for writer in sorted(writers):
        try:
            if repository.load_manifest(f"manifests/{writer}") is None:
                found.add(writer)
        except DamageError:
            continue
    return found
