"""Which units of a volume a pool has mapped: a bitmap, kept as what differs from one that is stored.

A pool maps in units of its own, and what a discard took away between two backups is found by comparing these
sets. The set of a large volume is never in memory: pages are fetched one by one, and only those that differ
from the set that a new one is made from are held.
"""

from __future__ import annotations

import heapq
import itertools
import operator
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

from blocksnap.extents.model import ExtentList

PAGE_BYTES = 4096
EMPTY_PAGE = bytes(PAGE_BYTES)
UNITS_PER_PAGE = PAGE_BYTES * 8
_Pieces = list[tuple[int, int]]


@dataclass(frozen=True, slots=True)
class MappedSet:
    """One bit a unit of ``unit`` bytes, least significant bit first, ``length`` bytes of bitmap.

    ``made_from`` fetches a page of the set that this one was made from, and may raise what fetching raises;
    ``pages`` are those that are other than there. Without, all others are empty. A page is 4 KiB; what is
    beyond the length is 0.
    """

    unit: int
    length: int
    made_from: Callable[[int], bytes] | None = None
    pages: Mapping[int, bytes] = field(default_factory=dict)

    @classmethod
    def of(cls, unit: int, bitmap: bytes) -> MappedSet:
        """Make a set from a bitmap."""
        pages = {number: page for number, page in cut(bitmap) if page != EMPTY_PAGE}
        return cls(unit, len(bitmap), pages=pages)

    @property
    def page_count(self) -> int:
        """How many pages there are, at least one."""
        return max(-(-self.length // PAGE_BYTES), 1)

    def page(self, number: int) -> bytes:
        """Return a page, of 4 KiB; beyond the last one they are empty."""
        found = self.pages.get(number)
        if found is not None:
            return found
        return EMPTY_PAGE if self.made_from is None or number >= self.page_count else self.made_from(number)

    def read(self, offset: int, length: int) -> bytes:
        """Return bytes of the bitmap; beyond its end they are 0."""
        first, end = offset // PAGE_BYTES, -(-(offset + length) // PAGE_BYTES)
        pages = b"".join(self.page(number) for number in range(first, end))
        return pages[offset - first * PAGE_BYTES :][:length]

    def mapped_units(self) -> int:
        """Count the units that are mapped; looks at every page."""
        return sum(
            int.from_bytes(self.page(number), "little").bit_count() for number in range(self.page_count)
        )

    def extents(self, offset: int, length: int) -> ExtentList:
        """Return what is mapped of a range of the volume; in units, so it may reach beyond both ends."""
        from blocksnap._native import bitmap_extents

        first = offset // self.unit // 8
        end = -(-(offset + length) // self.unit) // 8 + 1
        return ExtentList(bitmap_extents(self.read(first, end - first), self.unit, first * 8))

    def updated(self, units: int, changed: ExtentList, cleared: ExtentList) -> MappedSet:
        """Return the set of ``units`` units in which extents are mapped, or not any more.

        Fetches the pages that change, and holds only those.
        """
        from blocksnap._native import bitmap_update

        length = -(-units // 8)
        last = max(-(-length // PAGE_BYTES) - 1, 0)
        pages = {}
        for number, set_, clear in self._pieces(changed, cleared, last):
            bits = min(units - number * UNITS_PER_PAGE, UNITS_PER_PAGE)
            before = self.page(number)
            packed = ExtentList.of(set_).packed, ExtentList.of(clear).packed
            after = bitmap_update(before, bits, self.unit, *packed).ljust(PAGE_BYTES, b"\0")
            if after != before:
                pages[number] = after
        return MappedSet(self.unit, length, self.page, pages)

    def _pieces(
        self, changed: ExtentList, cleared: ExtentList, last: int
    ) -> Iterator[tuple[int, _Pieces, _Pieces]]:
        """Yield what changes of each page, and what is cleared, up to the last one, which is always there.

        Only one page's are unpacked at a time: the lists may have hundreds of millions of extents.
        """
        span = UNITS_PER_PAGE * self.unit
        streams = [_by_page(extents, span, side) for side, extents in enumerate((changed, cleared))]
        page_of = operator.itemgetter(0)
        merged = heapq.merge(*streams, [(last, 2, (0, 0))], key=page_of)
        for number, of_page in itertools.groupby(merged, page_of):
            if number > last:
                return
            sides: tuple[_Pieces, _Pieces, _Pieces] = ([], [], [])
            for _, side, piece in of_page:
                sides[side].append(piece)
            yield number, sides[0], sides[1]


def cut(bitmap: bytes, first: int = 0) -> Iterator[tuple[int, bytes]]:
    """Cut a bitmap in pages, the last of which is filled up; ``first`` is the number of the first."""
    for at in range(0, len(bitmap), PAGE_BYTES):
        yield first + at // PAGE_BYTES, bitmap[at : at + PAGE_BYTES].ljust(PAGE_BYTES, b"\0")


def _by_page(extents: ExtentList, span: int, side: int) -> Iterator[tuple[int, int, tuple[int, int]]]:
    """Cut extents where pages of ``span`` bytes of the volume end; offsets are those within the page.

    Yields the number of the page, ``side`` and the piece.
    """
    for offset, length in extents.pairs():
        begin, end = offset, offset + length
        while begin < end:
            number = begin // span
            stop = min((number + 1) * span, end)
            yield number, side, (begin - number * span, stop - begin)
            begin = stop
