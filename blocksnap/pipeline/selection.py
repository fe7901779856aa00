"""From what a source says has changed to which chunks are read and which become holes: pure arithmetic."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from blocksnap.pipeline.flow import Geometry

Pairs = Iterable[tuple[int, int]]


@dataclass(frozen=True, slots=True)
class Selection:
    """Ranges of chunk numbers ``[begin, end)``, sorted and disjoint; every other chunk is inherited."""

    read: tuple[tuple[int, int], ...]
    holes: tuple[tuple[int, int], ...]

    def extents(self, geometry: Geometry) -> Iterator[tuple[int, int]]:
        """Yield what is read as (offset, length) pairs."""
        for begin, end in self.read:
            offset = begin * geometry.chunk_size
            yield offset, min(end * geometry.chunk_size, geometry.size) - offset


def select_all(geometry: Geometry, allocated: Pairs) -> Selection:
    """Read every chunk that holds data; all others are holes."""
    read = _chunks(geometry, allocated)
    return Selection(tuple(read), tuple(_subtract([(0, geometry.count)], read)))


def select_changed(
    geometry: Geometry, *, allocated: Pairs, changed: Pairs, discarded: Pairs, parent_size: int
) -> Selection:
    """Read the chunks that may have changed.

    A chunk that lost some of its data but not all is read; one that lost all is a hole. A short
    last chunk, the parent's or this one's, is read when the size has changed, because its id covers
    another length.
    """
    kept = _chunks(geometry, allocated)
    lost = _chunks(geometry, discarded)
    read = _union(_chunks(geometry, changed), _intersect(lost, kept))
    if parent_size != geometry.size:
        tails = [
            (size // geometry.chunk_size,) * 2
            for size in (parent_size, geometry.size)
            if size % geometry.chunk_size and size <= geometry.size
        ]
        read = _union(read, _intersect([(number, number + 1) for number, _ in sorted(tails)], kept))
    return Selection(tuple(read), tuple(_subtract(lost, kept)))


def _chunks(geometry: Geometry, extents: Pairs) -> list[tuple[int, int]]:
    """Return the chunk ranges that sorted extents touch, merged."""
    ranges: list[tuple[int, int]] = []
    for offset, length in extents:
        begin, end = geometry.numbers(offset, length)
        end = min(end, geometry.count)
        if begin >= end:
            continue
        if ranges and begin <= ranges[-1][1]:
            ranges[-1] = (ranges[-1][0], max(ranges[-1][1], end))
        else:
            ranges.append((begin, end))
    return ranges


def _union(one: list[tuple[int, int]], other: list[tuple[int, int]]) -> list[tuple[int, int]]:
    merged: list[tuple[int, int]] = []
    for begin, end in sorted(one + other):
        if merged and begin <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(merged[-1][1], end))
        else:
            merged.append((begin, end))
    return merged


def _intersect(one: list[tuple[int, int]], other: list[tuple[int, int]]) -> list[tuple[int, int]]:
    found: list[tuple[int, int]] = []
    i = j = 0
    while i < len(one) and j < len(other):
        begin, end = max(one[i][0], other[j][0]), min(one[i][1], other[j][1])
        if begin < end:
            found.append((begin, end))
        if one[i][1] <= other[j][1]:
            i += 1
        else:
            j += 1
    return found


def _subtract(one: list[tuple[int, int]], other: list[tuple[int, int]]) -> list[tuple[int, int]]:
    left: list[tuple[int, int]] = []
    j = 0
    for begin, end in one:
        at = begin
        while j < len(other) and other[j][1] <= at:
            j += 1
        k = j
        while k < len(other) and other[k][0] < end:
            if other[k][0] > at:
                left.append((at, other[k][0]))
            at = max(at, other[k][1])
            k += 1
        if at < end:
            left.append((at, end))
    return left
