"""Which rows of the index are needed: one merged index on disk, and one bit for each of its rows in memory.

The segments of a repository are merged into a file without a name, which is mapped: look-ups cost page cache
and no memory, however large the repository is. A walk over the maps of all backups visits each node once,
because a node whose bit is set has been seen with all that is below it.
"""

from __future__ import annotations

import heapq
import mmap
import struct
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Self

from blocksnap.errors import DamageError
from blocksnap.repository.blockmap import FANOUT, HOLE, Entry, MapReader, MapRoot
from blocksnap.repository.frame import FrameType
from blocksnap.repository.index import MAX_FRAME, ROW, Segment, first_row
from blocksnap.repository.pack import PackId

UNUSABLE, LAST_RESORT, TRUSTED = 0, 1, 2
"""How far the rows of a pack are to be believed."""
_ID = 32
_BUFFERED_ROWS = 4096
_PACK_FIELD = struct.Struct("<I")


@dataclass(frozen=True, slots=True)
class MergedRow:
    """A row of the merged index; ``pack`` is a position in ``MergedIndex.packs``."""

    id: bytes
    pack: int
    offset: int
    length: int
    type: FrameType


class MergedIndex:
    """All rows of all segments, sorted by id; equal ids lie beside each other.

    A context manager: leaving it gives the file back.
    """

    def __init__(self, segments: Sequence[Segment], folder: str | None = None) -> None:
        """Merge; ``folder`` has room for 44 bytes a row (default: that for temporary files)."""
        self.packs: list[PackId] = []
        self.sizes: list[int] = []
        numbers: dict[PackId, int] = {}
        tables = []
        for segment in segments:
            for pack, size in segment.packs:
                if numbers.setdefault(pack, len(self.packs)) == len(self.packs):
                    self.packs.append(pack)
                    self.sizes.append(size)
            tables.append([numbers[pack] for pack, _ in segment.packs])
        self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 - closed by __exit__
        self._count = 0
        self._fill(heapq.merge(*map(_renumbered, segments, tables)))
        self._map = mmap.mmap(self._file.fileno(), 0, prot=mmap.PROT_READ) if self._count else None
        self._rows = memoryview(self._map) if self._map else memoryview(b"")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._rows.release()
        if self._map:
            self._map.close()
        self._file.close()

    def __len__(self) -> int:
        return self._count

    def numbers(self, id_: bytes) -> Iterator[int]:
        """Yield the numbers of the rows that have this id."""
        number = first_row(self._rows, self._count, id_)
        while 0 <= number < self._count and self._rows[number * ROW.size : number * ROW.size + _ID] == id_:
            yield number
            number += 1

    def row(self, number: int) -> MergedRow:
        """Return one row."""
        id_, pack, offset, packed = ROW.unpack_from(self._rows, number * ROW.size)
        return MergedRow(id_, pack, offset, packed & MAX_FRAME, FrameType(packed >> 24))

    def pack_of(self, number: int) -> int:
        """Return the pack of one row."""
        pack: int = _PACK_FIELD.unpack_from(self._rows, number * ROW.size + _ID)[0]
        return pack

    def rows(self) -> Iterator[MergedRow]:
        """Yield all rows, in the order of their numbers."""
        return map(self.row, range(self._count))

    def _fill(self, rows: Iterable[bytes]) -> None:
        waiting: list[bytes] = []
        for row in rows:
            waiting.append(row)
            if len(waiting) == _BUFFERED_ROWS:
                self._write(waiting)
        self._write(waiting)
        self._file.flush()

    def _write(self, rows: list[bytes]) -> None:
        self._file.write(b"".join(rows))
        self._count += len(rows)
        rows.clear()


def _renumbered(segment: Segment, table: Sequence[int]) -> Iterator[bytes]:
    """Yield the rows of a segment with the merged numbers of its packs."""
    for id_, ordinal, offset, packed in ROW.iter_unpack(segment.rows):
        yield ROW.pack(id_, table[ordinal], offset, packed)


class Marker:
    """Marks what backups need, in a merged index.

    ``trust`` says of every pack whether its rows may be believed: UNUSABLE, LAST_RESORT or TRUSTED.
    A row of the middle sort is ``accepted`` one by one. Of an id that is in no such row, and of a node that
    cannot be read, ``gives_up`` tells whether to go on without. ``nodes`` counts the nodes that were read.
    """

    def __init__(
        self,
        index: MergedIndex,
        trust: Sequence[int],
        reader: MapReader,
        *,
        accepts: Callable[[int], bool] = lambda _: True,
        gives_up: Callable[[bytes], bool] = lambda _: False,
    ) -> None:
        self._index = index
        self._trust = trust
        self._reader = reader
        self._accepts = accepts
        self._gives_up = gives_up
        self._bits = bytearray(-(-len(index) // 8))
        self.nodes = 0
        self.lost: set[bytes] = set()
        """Ids that are needed and in no usable pack."""

    def is_marked(self, number: int) -> bool:
        """Tell whether a row is needed."""
        return bool(self._bits[number // 8] >> number % 8 & 1)

    def mark(self, root: MapRoot) -> None:
        """Mark everything below a root; raises DamageError when a node cannot be read."""
        stack: list[tuple[Entry, int]] = [(root.entry, root.levels - 1)]
        while stack:
            entry, level = stack.pop()
            if len(entry) != _ID or not self._mark_id(entry) or level < 0:
                continue
            self.nodes += 1
            stack.extend((child, level - 1) for child in reversed(self._below(entry, level)))

    def mark_difference(self, root: MapRoot, base: MapRoot) -> None:
        """Mark what is below a root but not, at the same place, below another of as many levels."""
        if root.levels != base.levels:
            self.mark(root)
            return
        stack: list[tuple[Entry, Entry, int]] = [(root.entry, base.entry, root.levels - 1)]
        while stack:
            entry, other, level = stack.pop()
            if len(entry) != _ID or entry == other or not self._mark_id(entry) or level < 0:
                continue
            self.nodes += 1
            mine = self._below(entry, level)
            if not mine:
                continue
            below = self._below(other, level) if len(other) == _ID else [other] * FANOUT
            stack.extend(
                (child, its, level - 1) for child, its in zip(mine, below or [HOLE] * FANOUT, strict=True)
            )

    def _below(self, entry: Entry, level: int) -> Sequence[Entry]:
        try:
            return self._reader.node(entry, level)
        except DamageError:
            if not self._gives_up(entry):
                raise
            return ()

    def _mark_id(self, id_: bytes) -> bool:
        """Mark the best row of an id; tell whether that is new."""
        last_resort = -1
        for number in self._index.numbers(id_):
            trust = self._trust[self._index.pack_of(number)]
            if trust == LAST_RESORT and last_resort < 0 and self._accepts(number):
                last_resort = number
            if trust == TRUSTED:
                return self._mark_row(number)
        if last_resort >= 0:
            return self._mark_row(last_resort)
        if id_ in self.lost or self._gives_up(id_):
            return False
        self.lost.add(id_)
        return True

    def _mark_row(self, number: int) -> bool:
        if self.is_marked(number):
            return False
        self._bits[number // 8] |= 1 << number % 8
        return True


def require_nothing_lost(marker: Marker) -> None:
    """Raise DamageError when something that is needed lies in no pack."""
    if marker.lost:
        raise DamageError(
            f"{len(marker.lost)} chunks or map nodes that backups need are in no pack",
            resolution="nothing was deleted; run: blocksnap check, then: blocksnap repair",
        )
