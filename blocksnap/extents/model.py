"""Extents of a volume as values: packed as the C core returns them, or one by one.

An extent list is sorted, disjoint and merged; every offset and length is in bytes. A volume can have millions
of them, so a list is walked and never unpacked: an operation needs the 16 bytes of each extent of its result.
"""

from __future__ import annotations

import heapq
import io
import struct
from bisect import bisect_left
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

_PAIR = struct.Struct("<QQ")


@dataclass(frozen=True, slots=True)
class Extent:
    """The half-open byte range ``[offset, offset + length)`` of a volume."""

    offset: int
    length: int

    @property
    def end(self) -> int:
        """Offset of the first byte after the extent."""
        return self.offset + self.length


class ExtentList:
    """A sorted, merged list of extents, 16 bytes each.

    Immutable; all operations return a new list.
    """

    __slots__ = ("_packed",)

    def __init__(self, packed: bytes = b"") -> None:
        """Take over packed little-endian u64 pairs as ``blocksnap._native`` returns them."""
        if len(packed) % _PAIR.size:
            raise ValueError("packed extents are 16 bytes each")
        self._packed = packed

    @classmethod
    def of(cls, extents: Iterable[tuple[int, int]]) -> ExtentList:
        """Build a list from (offset, length) pairs in any order, overlapping or not.

        For a few: the pairs are sorted in memory.
        """
        return _collect((offset, offset + length) for offset, length in sorted(extents))

    @classmethod
    def whole(cls, length: int) -> ExtentList:
        """Build the list of the one extent ``[0, length)``."""
        return cls.of([(0, length)])

    @property
    def packed(self) -> bytes:
        """The list as packed little-endian u64 pairs."""
        return self._packed

    @property
    def total(self) -> int:
        """Sum of the lengths in bytes."""
        return sum(length for _, length in self.pairs())

    def pairs(self) -> Iterator[tuple[int, int]]:
        """Return the extents as (offset, length) pairs, which is faster than ``Extent`` for long lists."""
        return _PAIR.iter_unpack(self._packed)

    def __len__(self) -> int:
        return len(self._packed) // _PAIR.size

    def __bool__(self) -> bool:
        return bool(self._packed)

    def __iter__(self) -> Iterator[Extent]:
        for offset, length in self.pairs():
            yield Extent(offset, length)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ExtentList) and self._packed == other._packed

    def __hash__(self) -> int:
        return hash(self._packed)

    def __repr__(self) -> str:
        return f"ExtentList.of({list(self.pairs())})"

    def union(self, other: ExtentList) -> ExtentList:
        """Return the bytes that are in either list."""
        if not other:
            return self
        if not self:
            return other
        return _collect(heapq.merge(self._ranges(), other._ranges()))

    def intersect(self, other: ExtentList) -> ExtentList:
        """Return the bytes that are in both lists."""
        return _collect(_shared(self._ranges(), other._ranges()))

    def clip(self, length: int) -> ExtentList:
        """Return the part below ``length``."""
        count = bisect_left(range(len(self)), length, key=lambda index: self._at(index)[0])
        if not count:
            return ExtentList()
        offset, last = self._at(count - 1)
        if count == len(self) and offset + last <= length:
            return self
        head = memoryview(self._packed)[: (count - 1) * _PAIR.size]
        return ExtentList(b"".join((head, _PAIR.pack(offset, min(last, length - offset)))))

    def align(self, unit: int, *, limit: int) -> ExtentList:
        """Return the list widened to multiples of ``unit``, not beyond ``limit``."""
        return _collect(
            (begin // unit * unit, min(-(-end // unit) * unit, limit)) for begin, end in self._ranges()
        )

    def _at(self, index: int) -> tuple[int, int]:
        offset, length = _PAIR.unpack_from(self._packed, index * _PAIR.size)
        return offset, length

    def _ranges(self) -> Iterator[tuple[int, int]]:
        return ((offset, offset + length) for offset, length in self.pairs())


def _collect(ranges: Iterable[tuple[int, int]]) -> ExtentList:
    """Merge ranges ``[begin, end)`` that come sorted by their beginning, and leave out empty ones."""
    # BytesIO gives its buffer away without a copy.
    packed = io.BytesIO()
    first = last = 0
    for begin, end in ranges:
        if begin >= end:
            continue
        if begin > last:
            if first < last:
                packed.write(_PAIR.pack(first, last - first))
            first = begin
        last = max(last, end)
    if first < last:
        packed.write(_PAIR.pack(first, last - first))
    return ExtentList(packed.getvalue())


def _shared(one: Iterator[tuple[int, int]], other: Iterator[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    mine, theirs = next(one, None), next(other, None)
    while mine is not None and theirs is not None:
        yield max(mine[0], theirs[0]), min(mine[1], theirs[1])
        if mine[1] <= theirs[1]:
            mine = next(one, None)
        else:
            theirs = next(other, None)
