"""Delete what a sweep names: manifests, then rows of the index, then packs. All of it may be done twice."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from datetime import datetime
from itertools import islice

from blocksnap.backends.errors import ObjectMissingError
from blocksnap.repository.checked import superseded
from blocksnap.repository.documents import Done, Sweep
from blocksnap.repository.drills import superseded_drills
from blocksnap.repository.epochs import create_part, epoch_numbers, part_names, read_done, read_epoch
from blocksnap.repository.fencing import fence, settled_runs
from blocksnap.repository.index import ROW, encode_sorted, segment_name
from blocksnap.repository.missing import KEPT_FOR
from blocksnap.repository.numbered import Entry, NumberedIndex
from blocksnap.repository.repository import Repository
from blocksnap.repository.writer import RepositoryWriter

SHARD_ROWS = 131_072
_PACK = slice(32, 36)
"""Where a row has its pack."""
MANY_SEGMENTS = 16
"""From this number on the smaller ones are merged."""


def execute_sweep(repository: Repository, writer: RepositoryWriter, sweep: Sweep, now: datetime) -> None:
    """Delete everything that the sweep names, and say that it is done."""
    # In this order: nothing that can be seen ever needs what is gone.
    for run in sweep.manifests:
        _delete(repository, f"manifests/{run}")
        # The name stays taken: a creation that is still under way somewhere must not bring the backup back.
        fence(repository, run, now)
    _replace_segments(repository, writer, sweep)
    _delete_all(repository, sweep.packs)
    create_part(repository, "done", Done(epoch=sweep.epoch, run=writer.id.hex(), time=now))


def tidy(repository: Repository, epoch: int, now: datetime) -> None:
    """Delete what is of no use any more: records of settled runs, acts of forgetting, old history."""
    settled = settled_runs(repository)
    for info in list(repository.backend.list("writers/")):
        if info.name.removeprefix("writers/").partition(".")[0] in settled:
            _delete(repository, info.name)
    manifests = [manifest for manifest, _ in repository.manifests()]
    known = {backup.id for manifest in manifests for backup in manifest.backups}
    if not repository.damage:
        for name, document in repository.forgotten().items():
            if known.isdisjoint(document.backups):
                _delete(repository, name)
    packs = {info.name for info in repository.backend.list("packs/")}
    _delete_all(repository, superseded(repository, packs))
    _delete_all(repository, superseded_drills(repository))
    _tidy_aside(repository, packs, known)
    # A clock that is a year ahead would let a run commit that was shut out yesterday: what time it is has to
    # be said by a backup, too.
    newest = max((manifest.time for manifest in manifests), default=None)
    if newest is not None:
        _forget_history(repository, epoch, settled, min(now, newest))


def _tidy_aside(repository: Repository, packs: set[str], backups: set[str]) -> None:
    """Delete segments that were replaced by a repair, and what repairs say of things that are gone."""
    aside = repository.aside()
    segments = {info.name for info in repository.backend.list("index/")} & aside.objects
    _delete_all(repository, sorted(segments))
    there = packs | {info.name for info in repository.backend.list("manifests/")}
    for name, record in repository.aside_records().items():
        of_use = there.intersection(record.packs) or there.intersection(record.objects)
        of_use = of_use or backups.intersection(each.backup for each in record.ranges)
        if not of_use and not (record.lost and not record.ranges) and not repository.damage:
            _delete(repository, name)


def _forget_history(repository: Repository, epoch: int, settled: set[str], now: datetime) -> None:
    arrived = {info.name: info.received for info in repository.backend.list("manifests/")}
    condemned = read_epoch(repository).condemned
    # A manifest that the last epoch knew has to be there, or what stands for it.
    for run in sorted(settled - set(condemned.marked if condemned else ())):
        found = repository.find_fence(run)
        # By both clocks, or whoever shut it out with a wrong one would have it go at once.
        if (
            found is not None
            and max(found.time, arrived.get(f"manifests/{run}") or found.time) < now - KEPT_FOR
        ):
            _delete(repository, f"manifests/{run}")
    numbers = {number for number in epoch_numbers(repository) if number < epoch}
    for number in sorted(numbers):
        if read_done(repository, number).time > now - KEPT_FOR:
            break
        _delete_all(repository, part_names(number))


def _replace_segments(repository: Repository, writer: RepositoryWriter, sweep: Sweep) -> None:
    """Replace the segments that list swept packs, and merge the small ones when there are many."""
    repository.refresh_index()
    # Nor are rows of use that point into packs which are gone, and known to be.
    there = {info.name for info in repository.backend.list("packs/")}
    names = set(sweep.packs) | (repository.aside().packs - there)
    index = NumberedIndex(repository.index.views)
    swept = {number for number, pack in enumerate(index.packs) if pack.name in names}
    segments = index.segments
    old = index.segments_of(swept) if swept else set[str]()
    if len(segments) - len(old) > MANY_SEGMENTS:
        old |= {name for name, rows in segments.items() if rows < SHARD_ROWS // 2}
    if not old:
        return
    kept = _without_repeats(entry for entry in index.sorted_entries(old) if entry[2] not in swept)
    # Packed at once, as a shard of tuples would take a hundred megabytes.
    rows = (ROW.pack(id_, pack, offset, length | kind << 24) for id_, _, pack, offset, length, kind in kept)
    number = 0
    while shard := list(islice(rows, SHARD_ROWS)):
        data = _encode_shard(shard, index, repository.keys.index_key)
        repository.backend.put(segment_name(sweep.epoch, writer.id, number), data)
        number += 1
    # One that was made up for a damaged one is no object; what it says is stored by now.
    _delete_all(repository, sorted(old.intersection(repository.segment_names())))
    repository.refresh_index()


def _encode_shard(rows: list[bytes], index: NumberedIndex, index_key: bytes) -> bytes:
    """Return a segment of rows that have the numbers of their packs in the index; consumes them."""
    used: dict[bytes, bytes] = {}
    for number, row in enumerate(rows):
        label = used.setdefault(row[_PACK], len(used).to_bytes(4, "little"))
        rows[number] = row[: _PACK.start] + label + row[_PACK.stop :]
    packs = [int.from_bytes(pack, "little") for pack in used]
    return encode_sorted(rows, [(index.packs[pack], index.sizes[pack]) for pack in packs], index_key)


def _without_repeats(rows: Iterable[Entry]) -> Iterator[Entry]:
    last = b""
    seen: set[tuple[int, ...]] = set()
    for row in rows:
        id_, _, *place = row
        if id_ != last:
            seen.clear()
            last = id_
        # All of it: one that says the length wrong must not stand for the true one.
        if (where := tuple(place)) not in seen:
            seen.add(where)
            yield row


def _delete_all(repository: Repository, names: Iterable[str]) -> None:
    for name in list(names):
        _delete(repository, name)


def _delete(repository: Repository, name: str) -> None:
    # Another collector may have been faster.
    with contextlib.suppress(ObjectMissingError):
        repository.backend.delete(name)
