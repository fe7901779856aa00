"""Extents of a volume as values: packed as the C core returns them, or one by one.

An extent list is sorted, disjoint and merged; every offset and length is in bytes.
"""

from __future__ import annotations

import struct
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
        """Build a list from (offset, length) pairs in any order, overlapping or not."""
        merged: list[list[int]] = []
        for offset, length in sorted(extents):
            if length <= 0:
                continue
            if merged and offset <= merged[-1][1]:
                merged[-1][1] = max(merged[-1][1], offset + length)
            else:
                merged.append([offset, offset + length])
        return cls(b"".join(_PAIR.pack(begin, end - begin) for begin, end in merged))

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
        return sum(length for _, length in _PAIR.iter_unpack(self._packed))

    def __len__(self) -> int:
        return len(self._packed) // _PAIR.size

    def __bool__(self) -> bool:
        return bool(self._packed)

    def __iter__(self) -> Iterator[Extent]:
        for offset, length in _PAIR.iter_unpack(self._packed):
            yield Extent(offset, length)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ExtentList) and self._packed == other._packed

    def __hash__(self) -> int:
        return hash(self._packed)

    def __repr__(self) -> str:
        return f"ExtentList.of({[(e.offset, e.length) for e in self]})"

    def union(self, other: ExtentList) -> ExtentList:
        """Return the bytes that are in either list."""
        if not other:
            return self
        if not self:
            return other
        return ExtentList.of((e.offset, e.length) for each in (self, other) for e in each)

    def intersect(self, other: ExtentList) -> ExtentList:
        """Return the bytes that are in both lists."""
        found: list[tuple[int, int]] = []
        mine, theirs = list(self), list(other)
        i = j = 0
        while i < len(mine) and j < len(theirs):
            begin = max(mine[i].offset, theirs[j].offset)
            end = min(mine[i].end, theirs[j].end)
            if begin < end:
                found.append((begin, end - begin))
            if mine[i].end <= theirs[j].end:
                i += 1
            else:
                j += 1
        return ExtentList.of(found)

    def clip(self, length: int) -> ExtentList:
        """Return the part below ``length``."""
        return ExtentList.of((e.offset, min(e.end, length) - e.offset) for e in self if e.offset < length)

    def align(self, unit: int, *, limit: int) -> ExtentList:
        """Return the list widened to multiples of ``unit``, not beyond ``limit``."""
        return ExtentList.of(
            (begin, min(-(-e.end // unit) * unit, limit) - begin)
            for e in self
            for begin in (e.offset // unit * unit,)
        )
