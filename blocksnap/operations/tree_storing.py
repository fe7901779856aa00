"""Store the backup of a subvolume: its touched inodes, and of its files the chunks that may have changed.

One pass: the engine walks the inodes, what it names is read and stored, and records are put into the map in
ascending order, with the parent's pages underneath. Memory is bounded by what is on its way, whatever the
number of inodes; directories, which come first, wait on a shelf until it is their number's turn.
"""

from __future__ import annotations

import heapq
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Literal

from blocksnap.controller.pacing import Pace
from blocksnap.extents.btrfs import SubvolumeParent
from blocksnap.extents.btrfs_changes import Change, InodeChange, InodeRemoval, SubvolumeChanges
from blocksnap.operations.catalogue import map_root, root_document
from blocksnap.operations.draft import BackupOptions, Draft
from blocksnap.operations.reporting import Reporter, phase
from blocksnap.operations.sink import DataSink
from blocksnap.operations.tree_records import ParentMemory, RecordShelf, make_record
from blocksnap.pipeline.files import FilesFlow
from blocksnap.pipeline.flow import ChunkResult, Geometry
from blocksnap.pipeline.selection import Ranges, chunks_of
from blocksnap.repository.blockmap import HOLE, ZERO, MapReader, MapRoot
from blocksnap.repository.documents import Backup, Inodes
from blocksnap.repository.errors import DamagedObjectError
from blocksnap.repository.inode_map import ContentWriter, InodeMap, InodeMapWriter, InodeReader
from blocksnap.repository.inodes import InodeRecord
from blocksnap.repository.repository import Repository
from blocksnap.repository.writer import RepositoryWriter, Stored
from blocksnap.volumes.base import TreeSnapshot, Volume

_NOTHING: tuple[tuple[int, int], ...] = ()


def inode_map(backup: Backup) -> InodeMap:
    """Return the map of a backup of a subvolume; raises DamagedObjectError for any other."""
    if backup.inodes is None:
        raise DamagedObjectError(f"backup {backup.id[:8]}", "it is not of a subvolume")
    return InodeMap(map_root(backup.map), backup.inodes.pages, backup.inodes.count, backup.size)


@dataclass(frozen=True, slots=True)
class TreePlan:
    """Which inodes are looked at, and why."""

    volume: Volume
    snapshot: TreeSnapshot
    parent: Backup | None
    changes: SubvolumeChanges
    chunk_size: int

    @property
    def kind(self) -> Literal["full", "incremental"]:
        """Full when nothing is compared or inherited, else incremental."""
        return "incremental" if self.parent else "full"

    def facts(self) -> dict[str, object]:
        """Return the decision for the log."""
        return {
            "volume": self.volume.name,
            "kind": self.kind,
            "method": self.changes.method,
            "reason": self.changes.reason,
        }


def plan_tree(
    repository: Repository,
    volume: Volume,
    snapshot: TreeSnapshot,
    parent: Backup | None,
    knows: Callable[[Volume, str], bool],
    *,
    full: bool,
) -> TreePlan:
    """Ask the tree what has changed; ``knows`` tells whether this host has a record of a run of a volume."""
    if full or (parent is not None and (parent.inodes is None or parent.chunk_size != repository.chunk_size)):
        parent = None
    remembered = None
    lost = parent is not None and repository.known_losses(parent.id)
    if parent is not None and not lost:
        run = parent.source.get("run")
        known_here = isinstance(run, str) and knows(volume, run)
        memory = ParentMemory(InodeReader(repository, inode_map(parent)))
        remembered = SubvolumeParent(parent.source, known_here, memory)
    changes = snapshot.find_tree_changes(remembered)
    if lost:
        reason = "parts of the parent backup are lost, so that everything is read"
        changes = SubvolumeChanges("compare", reason, inherits=False, walk=changes.walk)
    return TreePlan(volume, snapshot, parent, changes, repository.chunk_size)


def measure(plan: TreePlan) -> dict[str, object]:
    """Walk a plan without storing anything; return its facts with what would be read."""
    read = inodes = 0
    for change in plan.changes.walk:
        inodes += 1
        if isinstance(change, InodeChange):
            read += change.changed.total
    return {**plan.facts(), "inodes": inodes, "read_bytes": read}


def store_tree(
    repository: Repository,
    writer: RepositoryWriter,
    plan: TreePlan,
    before: Stored,
    options: BackupOptions,
    report: Reporter,
) -> Draft:
    """Read and store what the plan says; nothing is committed, but the map is complete.

    What the writer has stored since ``before`` is counted for this volume. Raises DamageError when the
    parent is damaged.
    """
    known = inode_map(plan.parent) if plan.parent and plan.changes.inherits else None
    storing = _TreeStoring(repository, writer, plan, known)
    pace = Pace(options.pace) if options.pace.policy != "off" else None
    sink = DataSink(writer, options.level)
    with phase(report, plan.volume.name, 0):
        # The walk recalls what the parent knows in a thread of its own, from a reader of its own.
        flow = FilesFlow(
            storing.items(),
            plan.snapshot.open_file,
            plan.chunk_size,
            sink,
            workers=options.workers,
            pace=pace,
        )
        try:
            with flow:
                found = storing.build(flow, report)
        finally:
            storing.close()
    if pace is not None:
        report.event("paced", volume=plan.volume.name, held_back_seconds=round(pace.held_back_seconds, 3))
    report.event("inodes", volume=plan.volume.name, touched=storing.touched, removed=storing.removed)
    return Draft(
        volume=plan.volume,
        snapshot=plan.snapshot,
        parent=plan.parent,
        method=plan.changes.method,
        reason=plan.changes.reason,
        size=found.file_bytes,
        chunk_size=plan.chunk_size,
        map=root_document(found.root),
        mapped=None,
        inodes=Inodes(pages=found.pages, count=found.count),
        changed_bytes=storing.changed_bytes,
        read_bytes=storing.read_bytes,
        before=before,
        stored=writer.stored.since(before),
    )


@dataclass(frozen=True, slots=True)
class _Item:
    """An inode of the walk, with the chunks of its file that are to be read, or become holes."""

    change: Change
    before: InodeRecord | None = None
    ranges: Sequence[tuple[int, int]] = _NOTHING
    holes: Sequence[tuple[int, int]] = _NOTHING

    @property
    def inode(self) -> int:
        return self.change.number

    @property
    def size(self) -> int:
        return self.change.attributes.size if isinstance(self.change, InodeChange) else 0


class _TreeStoring:
    def __init__(
        self, repository: Repository, writer: RepositoryWriter, plan: TreePlan, known: InodeMap | None
    ) -> None:
        self._repository = repository
        self._writer = writer
        self._plan = plan
        self._known = known
        # One for each of the two threads that read the parent.
        self._walking = InodeReader(repository, known) if known else None
        self._building = InodeReader(repository, known) if known else None
        self._maps = self._building.maps if self._building else MapReader(repository.load_node)
        self._shelf = RecordShelf()
        self._gone = array("Q")
        self._late: list[int] = []
        self.changed_bytes = self.read_bytes = 0
        self.touched = self.removed = 0

    def close(self) -> None:
        self._shelf.close()

    def items(self) -> Iterator[_Item]:
        """Walk the tree; in the thread that reads."""
        chunk_size = self._plan.chunk_size
        for change in self._plan.changes.walk:
            if not isinstance(change, InodeChange) or not change.is_file:
                yield _Item(change)
                continue
            before = self._walking.find(change.number) if self._walking and not change.is_new else None
            if before is not None and (not before.is_file or before.generation != change.generation):
                before = None
            yield _Item(change, before, *select_chunks(change, before, chunk_size))

    def build(self, flow: FilesFlow[_Item], report: Reporter) -> InodeMap:
        """Store everything and return the map of inodes."""
        items = flow.walked()
        first = self._shelve(items)
        others = self._others(chain([first], items) if first else items, report)
        builder = InodeMapWriter(self._writer, self._building, self._known)
        shelved = ((record.number, record) for record in self._shelf)
        gone: Iterable[tuple[int, InodeRecord | None]] = ((number, None) for number in self._gone)
        for number, record in heapq.merge(shelved, gone, others, key=lambda each: each[0]):
            if record is None:
                builder.remove(number)
            else:
                builder.put(record)
        found = builder.finish()
        self.removed = len(self._gone) + len(self._late)
        return self._without(found, self._late) if self._late else found

    def _shelve(
        self, items: Iterator[tuple[_Item, Iterator[ChunkResult]]]
    ) -> tuple[_Item, Iterator[ChunkResult]] | None:
        """Take directories and removals; return the first of the other inodes."""
        for item, results in items:
            change = item.change
            if isinstance(change, InodeRemoval):
                self._gone.append(change.number)
            elif change.is_directory:
                self.touched += 1
                self._shelf.add(make_record(self._writer, change))
            else:
                return item, results
        return None

    def _others(
        self, items: Iterable[tuple[_Item, Iterator[ChunkResult]]], report: Reporter
    ) -> Iterator[tuple[int, InodeRecord | None]]:
        for item, results in items:
            change = item.change
            if isinstance(change, InodeRemoval):
                # What was in a directory whose number something else has now.
                self._late.append(change.number)
                continue
            self.touched += 1
            content = self._content(item, results, report) if change.is_file else MapRoot(0, HOLE)
            yield change.number, make_record(self._writer, change, content)

    def _content(self, item: _Item, results: Iterator[ChunkResult], report: Reporter) -> MapRoot:
        geometry = Geometry(item.size, self._plan.chunk_size)
        before = item.before.content if item.before else None
        builder = ContentWriter(self._maps, self._writer, before, geometry.count)
        holes = iter(item.holes)
        hole = next(holes, None)
        for result in results:
            while hole is not None and hole[0] < result.number:
                builder.fill(*hole)
                hole = next(holes, None)
            if builder.set(result.number, ZERO if result.id is None else result.id):
                self.changed_bytes += result.length
            self.read_bytes += result.length
            report.advance(result.length)
        while hole is not None:
            builder.fill(*hole)
            hole = next(holes, None)
        return builder.finish()

    def _without(self, found: InodeMap, late: list[int]) -> InodeMap:
        """Leave out what was told to be gone when its number had passed."""
        # What was stored has to be readable first.
        self._writer.flush()
        builder = InodeMapWriter(self._writer, InodeReader(self._repository, found), found)
        for number in sorted(late):
            builder.remove(number)
        return builder.finish()


def select_chunks(
    change: InodeChange, before: InodeRecord | None, chunk_size: int
) -> tuple[tuple[tuple[int, int], ...], tuple[tuple[int, int], ...]]:
    """Return the chunks of a file to read, and those that become holes unread, as ranges of numbers.

    Where the file's size changed, the chunks in which it ended and ends are read too if they are there on
    both sides: their length is another, and with it their id.
    """
    size = change.attributes.size
    geometry = Geometry(size, chunk_size)
    if not size:
        return (), ()
    touched = list(chunks_of(geometry, change.changed.pairs()))
    if before is None:
        return tuple(Ranges(touched)), ()
    inner = [
        (-(-begin // chunk_size), _whole_end(begin + length, geometry))
        for begin, length in change.holes.pairs()
    ]
    touched += chunks_of(geometry, change.holes.pairs())
    if size != before.size:
        ends = (before.size // chunk_size, (size - 1) // chunk_size)
        touched += [(end, end + 1) for end in ends if end * chunk_size < min(size, max(before.size, 1))]
    read = Ranges(sorted(touched))
    holes = Ranges((begin, end) for begin, end in inner if begin < end)
    kept = Ranges(chunks_of(geometry, change.changed.pairs()))
    empty = tuple(_without(holes, kept))
    return tuple(_without(read, Ranges(empty))), empty


def _whole_end(end: int, geometry: Geometry) -> int:
    """Return the chunk behind the last that ends at or before a byte; the file's last may be short."""
    return geometry.count if end >= geometry.size else end // geometry.chunk_size


def _without(ranges: Ranges, others: Ranges) -> Iterator[tuple[int, int]]:
    """Yield what of some ranges is not in others."""
    taken = list(others)
    at = 0
    for first, end in ranges:
        begin = first
        while at < len(taken) and taken[at][1] <= begin:
            at += 1
        for other, last in taken[at:]:
            if other >= end:
                break
            if begin < other:
                yield begin, other
            begin = max(begin, last)
        if begin < end:
            yield begin, end
