"""Read everything that a backup of a subvolume needs: records, what they refer to, and every chunk."""

from __future__ import annotations

from array import array
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice

from blocksnap.errors import DamageError
from blocksnap.operations.problems import Problems
from blocksnap.operations.reporting import Reporter, phase
from blocksnap.operations.tree_storing import inode_map
from blocksnap.pipeline.flow import Geometry
from blocksnap.repository.blockmap import Entry
from blocksnap.repository.documents import Backup
from blocksnap.repository.inode_map import InodeReader
from blocksnap.repository.inodes import PAGE_INODES, InodeRecord, levels_of
from blocksnap.repository.keys import Right
from blocksnap.repository.map_losses import MapLosses
from blocksnap.repository.repository import Repository
from blocksnap.restore.engine import UnreadableChunkError, verify_chunks
from blocksnap.restore.inode_values import LARGEST_VALUE, link_target, state_of, xattrs_of

_ID = 32
_MOST_TOLD = 1000


class UnreadableInodeError(DamageError):
    """Something of an inode cannot be read from the repository."""

    def __init__(self, inode: int, what: str, err: DamageError) -> None:
        self.inode = inode
        super().__init__(
            f"{what} of inode {inode} cannot be restored: {err.brief}",
            resolution="run: blocksnap check --read-data, and repair; find -inum tells its path",
        )


@dataclass(frozen=True, slots=True)
class _Numbered(Geometry):
    """Chunks of many files, numbered one file after the other."""

    firsts: array[int] = field(default_factory=lambda: array("Q"))
    sizes: array[int] = field(default_factory=lambda: array("Q"))
    inodes: array[int] = field(default_factory=lambda: array("Q"))

    def length(self, number: int) -> int:
        _, offset, size = self.place(number)
        return min(self.chunk_size, size - offset)

    def place(self, number: int) -> tuple[int, int, int]:
        """Return the inode, the offset in it, and its size."""
        at = bisect_right(self.firsts, number) - 1
        return self.inodes[at], (number - self.firsts[at]) * self.chunk_size, self.sizes[at]


def verify_tree_backup(repository: Repository, backup: Backup, report: Reporter) -> list[DamageError]:
    """Return what cannot be read, the first of it, in order of inode numbers. Raises MissingRightError."""
    repository.keys.require(Right.READ)
    found = inode_map(backup)
    reader = InodeReader(repository, found)
    problems = Problems()
    geometry = _Numbered(1 << 62, backup.chunk_size)

    def runs() -> Iterator[tuple[int, int, Entry]]:
        first, left = 0, found.count
        for page in _pages(reader, problems):
            records = _page(reader, page, problems)
            left -= len(records)
            if left < 0:
                problems.add(DamageError(f"there are more inodes than {found.count}, as the manifest says"))
                return
            for record in records:
                _look_at(reader, record, backup.chunk_size, problems)
                if not record.is_file or not record.size:
                    continue
                places = -(-record.size // backup.chunk_size)
                geometry.firsts.append(first)
                geometry.sizes.append(record.size)
                geometry.inodes.append(record.number)
                for number, count, entry in reader.maps.runs(record.content, 0, places, lambda *_: None):
                    if len(entry) == _ID:
                        yield first + number, count, entry
                first += places

    def note(err: UnreadableChunkError) -> None:
        inode, offset, _ = geometry.place(err.offset // backup.chunk_size)
        problems.add(UnreadableInodeError(inode, f"bytes {offset} to {offset + err.length}", err))

    with phase(report, f"verifying {backup.volume.name}", backup.size):
        verify_chunks(repository, geometry, runs(), report.advance, note)
    return problems.told(_inode)


def _inode(err: DamageError) -> int:
    return err.inode if isinstance(err, UnreadableInodeError) else -1


def _pages(reader: InodeReader, problems: Problems) -> Iterator[int]:
    def lose(begin: int, _: int, err: DamageError) -> None:
        problems.add(UnreadableInodeError(begin * PAGE_INODES, "records from that", err))

    try:
        yield from reader.pages(lose)
    except DamageError as err:
        problems.add(err)


def _page(reader: InodeReader, number: int, problems: Problems) -> list[InodeRecord]:
    try:
        return list(reader.page(number).values())
    except DamageError as err:
        problems.add(UnreadableInodeError(number * PAGE_INODES, "records from that", err))
        return []


def _look_at(reader: InodeReader, record: InodeRecord, chunk_size: int, problems: Problems) -> None:
    """Read all of an inode but its chunks."""
    try:
        xattrs_of(reader, record)
        if record.is_directory:
            for entry in reader.listing(record):
                if entry.kind != 8 and reader.find(entry.inode) is None:
                    problem = DamageError(f"{entry.name!r} leads to inode {entry.inode}, which is not there")
                    problems.add(UnreadableInodeError(record.number, "a name", problem))
        elif not record.is_file:
            link_target(reader, record)
        elif record.detail.length <= LARGEST_VALUE:
            # A larger one is that of an image in many pieces, which is restored without it.
            state_of(reader, record)
        places = -(-record.size // chunk_size)
        if record.is_file and record.content.levels != levels_of(places):
            raise DamageError("its content does not fit its size")
        losses = MapLosses(reader.maps, (), ())
        found = losses.measure(record.content, 0, places)
        for told, (begin, end) in enumerate(islice(losses.ranges(record.content, 0, places), _MOST_TOLD), 1):
            lost = DamageError("a map node is lost")
            where = f"bytes {begin * chunk_size} to {min(end * chunk_size, record.size)}"
            behind = found.ranges - _MOST_TOLD if told == _MOST_TOLD else 0
            problems.add(UnreadableInodeError(record.number, where, lost), 1 + behind)
    except DamageError as err:
        problems.add(UnreadableInodeError(record.number, "the record", err))
