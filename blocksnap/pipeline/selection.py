"""From what a source says has changed to which chunks are read and which become holes: pure arithmetic.

A volume can be in millions of pieces. Extents and ranges are walked side by side and only the result is
kept, 16 bytes a range.
"""

from __future__ import annotations

import heapq
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from typing import Protocol

from blocksnap.pipeline.flow import Geometry

Pair = tuple[int, int]


class Extents(Protocol):
    """Sorted, disjoint extents that can be walked more than once."""

    def pairs(self) -> Iterator[Pair]:
        """Return them as (offset, length) pairs."""
        ...


class Ranges:
    """Ranges ``[begin, end)`` of chunk numbers, sorted, disjoint and merged; iterates over (begin, end)."""

    __slots__ = ("_flat",)

    def __init__(self, ranges: Iterable[Pair] = ()) -> None:
        """Keep what comes sorted by its beginning, overlapping or not."""
        self._flat = array("Q", chain.from_iterable(_merged(ranges)))

    def __iter__(self) -> Iterator[Pair]:
        flat = iter(self._flat)
        return zip(flat, flat, strict=True)

    def __len__(self) -> int:
        return len(self._flat) // 2

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Ranges) and self._flat == other._flat

    def __hash__(self) -> int:
        return hash(self._flat.tobytes())

    def __repr__(self) -> str:
        return f"Ranges({list(self)})"

    def extents(self, geometry: Geometry) -> Iterator[Pair]:
        """Yield the ranges as (offset, length) pairs, up to the end of the volume."""
        size, chunk_size = geometry.size, geometry.chunk_size
        for begin, end in self:
            offset = begin * chunk_size
            yield offset, min(end * chunk_size, size) - offset

    def total_bytes(self, geometry: Geometry) -> int:
        """Return the sum of the lengths."""
        return sum(length for _, length in self.extents(geometry))


@dataclass(frozen=True, slots=True)
class Selection:
    """Chunks that are read and chunks that become holes; every other chunk is inherited."""

    read: Ranges
    holes: Ranges

    def extents(self, geometry: Geometry) -> Iterator[Pair]:
        """Yield what is read as (offset, length) pairs."""
        return self.read.extents(geometry)


def select_all(geometry: Geometry, allocated: Extents) -> Selection:
    """Read every chunk that holds data; all others are holes."""
    read = Ranges(chunks_of(geometry, allocated.pairs()))
    return Selection(read, Ranges(subtract([(0, geometry.count)], read)))


def select_changed(
    geometry: Geometry, *, allocated: Extents, changed: Extents, discarded: Extents, parent_size: int
) -> Selection:
    """Read the chunks that may have changed.

    A chunk that lost some of its data but not all is read; one that lost all is a hole. A short
    last chunk, the parent's or this one's, is read when the size has changed, or is a hole when it
    holds no data, because its id covers another length: all that it held may lie beyond the new end.
    """

    def kept() -> Iterator[Pair]:
        return _merged(chunks_of(geometry, allocated.pairs()))

    def lost() -> Iterator[Pair]:
        return _merged(chunks_of(geometry, discarded.pairs()))

    tails = _tails(geometry, parent_size)
    read = heapq.merge(
        chunks_of(geometry, changed.pairs()), _intersect(lost(), kept()), _intersect(iter(tails), kept())
    )
    gone = _merged(heapq.merge(lost(), iter(tails)))
    return Selection(Ranges(read), Ranges(subtract(gone, kept())))


def select_either(one: Iterable[Pair], other: Iterable[Pair]) -> Ranges:
    """Return the chunks that are in either of two sequences of ranges, each sorted by its beginnings."""
    return Ranges(heapq.merge(one, other))


def chunks_of(geometry: Geometry, extents: Iterable[Pair]) -> Iterator[Pair]:
    """Yield, for each of some sorted extents, the range of chunks that it touches."""
    size, count = geometry.chunk_size, geometry.count
    for offset, length in extents:
        begin, end = offset // size, min(-(-(offset + length) // size), count)
        if begin < end:
            yield begin, end


def _tails(geometry: Geometry, parent_size: int) -> list[Pair]:
    if parent_size == geometry.size:
        return []
    short = {
        size // geometry.chunk_size
        for size in (parent_size, geometry.size)
        if size % geometry.chunk_size and size <= geometry.size
    }
    return [(number, number + 1) for number in sorted(short)]


def _merged(ranges: Iterable[Pair]) -> Iterator[Pair]:
    """Merge ranges that come sorted by their beginnings."""
    first = last = -1
    for begin, end in ranges:
        if begin > last:
            if first >= 0:
                yield first, last
            first, last = begin, end
        elif end > last:
            last = end
    if first >= 0:
        yield first, last


def _intersect(one: Iterator[Pair], other: Iterator[Pair]) -> Iterator[Pair]:
    mine, theirs = next(one, None), next(other, None)
    while mine is not None and theirs is not None:
        begin, end = max(mine[0], theirs[0]), min(mine[1], theirs[1])
        if begin < end:
            yield begin, end
        if mine[1] <= theirs[1]:
            mine = next(one, None)
        else:
            theirs = next(other, None)


def subtract(one: Iterable[Pair], other: Iterable[Pair]) -> Iterator[Pair]:
    """Yield what of ``one`` is not in ``other``; both are merged."""
    cuts = iter(other)
    cut = next(cuts, None)
    for begin, end in one:
        at = begin
        while cut is not None and cut[0] < end:
            if cut[0] > at:
                yield at, cut[0]
            at = max(at, cut[1])
            if at >= end:
                break
            cut = next(cuts, None)
        if at < end:
            yield at, end
