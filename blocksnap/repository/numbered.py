"""The rows of the index by number, so that a walk over all maps can remember a row in one bit."""

from __future__ import annotations

import heapq
from array import array
from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from blocksnap.repository.index import MAX_FRAME
from blocksnap.repository.lookup import View
from blocksnap.repository.pack import PackId
from blocksnap.repository.table import ROW


class NumberedRow(NamedTuple):
    """A row of the index; ``pack`` is a position in ``NumberedIndex.packs``."""

    number: int
    pack: int
    offset: int
    length: int
    type: int


Entry = tuple[bytes, int, int, int, int, int]
"""Id, number, pack, offset, length and type of a row: there are millions, so they are no objects."""


@dataclass(frozen=True, slots=True)
class _Part:
    view: View
    first: int
    packs: array[int]


class NumberedIndex:
    """The rows of all listed segments, as they were when this was made."""

    def __init__(self, views: Sequence[View]) -> None:
        self.packs: list[PackId] = []
        self.sizes: list[int] = []
        numbers: dict[bytes, int] = {}
        self._parts: list[_Part] = []
        self._count = 0
        for view in views:
            packs = array("I")
            for number in range(view.table.pack_count):
                known = numbers.setdefault(view.table.packed_pack(number), len(self.packs))
                if known == len(self.packs):
                    pack, size = view.table.pack(number)
                    self.packs.append(pack)
                    self.sizes.append(size)
                packs.append(known)
            self._parts.append(_Part(view, self._count, packs))
            self._count += view.table.rows

    def __len__(self) -> int:
        return self._count

    @property
    def segments(self) -> dict[str, int]:
        """The listed segments, and how many rows each has."""
        return {
            segment.name: segment.rows
            for part in self._parts
            for segment, state in zip(part.view.table.segments, part.view.segments, strict=True)
            if state
        }

    def find(self, id_: bytes) -> Iterator[NumberedRow]:
        """Yield the rows that have this id."""
        for part in self._parts:
            for row in part.view.table.find(id_):
                if part.view.segments[row.segment]:
                    yield NumberedRow(
                        part.first + row.number, part.packs[row.pack], row.offset, row.length, row.type
                    )

    def row(self, number: int) -> tuple[bytes, NumberedRow]:
        """Return one row with its id."""
        part = next(part for part in reversed(self._parts) if part.first <= number)
        id_, row = part.view.table.row(number - part.first)
        return id_, NumberedRow(number, part.packs[row.pack], row.offset, row.length, row.type)

    def entries(self) -> Iterator[Entry]:
        """Yield all rows, in the order of their numbers."""
        for part in self._parts:
            yield from self._entries(part, None)

    def sorted_entries(self, segments: Container[str]) -> Iterator[Entry]:
        """Yield the rows of some segments in the order of their ids."""
        return heapq.merge(*(self._entries(part, segments) for part in self._parts))

    def segments_of(self, packs: Container[int]) -> set[str]:
        """Return the segments that have rows of any of these packs."""
        found: set[str] = set()
        for part in self._parts:
            local = {number for number, pack in enumerate(part.packs) if pack in packs}
            touched = bytearray(len(part.view.segments))
            for piece in part.view.table.pieces():
                for _, pack, segment, _, _ in ROW.iter_unpack(piece):
                    if pack in local:
                        touched[segment] = 1
            names = part.view.table.segments
            found.update(
                names[number].name
                for number, state in enumerate(part.view.segments)
                if state and touched[number]
            )
        return found

    def _entries(self, part: _Part, segments: Container[str] | None) -> Iterator[Entry]:
        table, packs = part.view.table, part.packs
        wanted = bytearray(part.view.segments)
        if segments is not None:
            for number, segment in enumerate(table.segments):
                wanted[number] = wanted[number] and segment.name in segments
        number = part.first
        for piece in table.pieces():
            for id_, pack, segment, offset, packed in ROW.iter_unpack(piece):
                if wanted[segment]:
                    yield id_, number, packs[pack], offset, packed & MAX_FRAME, packed >> 24
                number += 1
