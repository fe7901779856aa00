"""The two space maps of a thin pool, written for ``thin_builder`` (kernel: dm-space-map-common.c).

Two bits a block: how often it is referred to, 3 for three times or more, which a tree then tells. Of the two
bits the lower one is the more significant.
"""

from __future__ import annotations

import struct
from array import array
from collections.abc import Iterable, Sequence
from typing import Protocol

from support.thin_checksums import BITMAP_SALT, INDEX_SALT
from support.thin_metadata import BLOCK_SIZE

_HEADER = 16
_PER_BITMAP = (BLOCK_SIZE - _HEADER) * 4
_MANY = 3
_TWO_BITS = bytes([0, 2, 1, *[3] * 253])
_INDEX = struct.Struct("<QII")


class Space(Protocol):
    """Where blocks are allocated and written: a ThinBuilder."""

    taken: list[int]
    """The blocks that were allocated for the space maps so far."""

    def allocate_block(self) -> int: ...
    def put(self, block: int, content: bytes, salt: int) -> None: ...
    def tree(self, entries: Sequence[tuple[int, bytes]], value_size: int) -> int: ...


class Leaf(Protocol):
    """A leaf of a mapping tree."""

    @property
    def values(self) -> Sequence[int]: ...


class DataCounts:
    """How many leaves map each data block."""

    def __init__(self, blocks: int) -> None:
        self._counts = bytearray(blocks)
        self.many: dict[int, int] = {}

    def count(self, block: int) -> int:
        """Return the number of one block."""
        return self.many.get(block, self._counts[block])

    def add_leaf(self, leaf: Leaf) -> None:
        """Count what a leaf maps."""
        values = leaf.values
        if len(values) > 1 and self._add_progression(values):
            return
        counts, many = self._counts, self.many
        for value in values:
            block = value >> 24
            if counts[block] < _MANY:
                counts[block] += 1
            else:
                many[block] = many.get(block, _MANY) + 1

    def _add_progression(self, values: Sequence[int]) -> bool:
        """Count blocks that are all as far apart, if none was counted before: those of a fresh volume."""
        first, step = values[0], values[1] - values[0]
        end = first + step * len(values)
        if step <= 0 or step % (1 << 24) or array("Q", range(first, end, step)) != values:
            return False
        blocks = slice(first >> 24, end >> 24, step >> 24)
        if any(self._counts[blocks]):
            return False
        self._counts[blocks] = b"\1" * len(values)
        return True

    def saturated(self) -> bytearray:
        """Return the counts, 3 for all above."""
        return self._counts

    def overflowing(self) -> Iterable[tuple[int, int]]:
        """Yield blocks referred to three times or more."""
        at = self._counts.find(_MANY)
        while at >= 0:
            yield at, self.many.get(at, _MANY)
            at = self._counts.find(_MANY, at + 1)


def write_data_space_map(space: Space, data: DataCounts) -> bytes:
    """Write the data space map and return its root."""
    entries = _write_bitmaps(space, data.saturated())
    tree = space.tree([(n, _INDEX.pack(*entry)) for n, entry in enumerate(entries)], 16)
    overflow = space.tree([(n, struct.pack("<I", count)) for n, count in data.overflowing()], 4)
    return _root(data.saturated(), tree, overflow)


def write_metadata_space_map(space: Space, counts: array[int]) -> bytes:
    """Write the metadata space map and return its root; it counts what both space maps take themselves."""
    many = [(n, struct.pack("<I", count)) for n, count in enumerate(counts) if count >= _MANY]
    overflow = space.tree(many, 4)
    index = space.allocate_block()
    bitmaps = [space.allocate_block() for _ in range(-(-len(counts) // _PER_BITMAP))]
    for block in space.taken:
        counts[block] = 1
    saturated = bytearray(min(count, _MANY) for count in counts)
    entries = _write_bitmaps(space, saturated, bitmaps)
    packed = b"".join(_INDEX.pack(*entry) for entry in entries)
    space.put(index, struct.pack("<IIQ", 0, 0, index) + packed, INDEX_SALT)
    return _root(saturated, index, overflow)


def _write_bitmaps(
    space: Space, saturated: bytearray, blocks: Sequence[int] = ()
) -> list[tuple[int, int, int]]:
    """Write the bitmaps; return of each its block, how many are free, and a bound below which none is."""
    entries = []
    for number, begin in enumerate(range(0, len(saturated), _PER_BITMAP)):
        counts = saturated[begin : begin + _PER_BITMAP]
        bits = counts.translate(_TWO_BITS).ljust(_PER_BITMAP, b"\0")
        packed = 0
        for plane in range(4):
            packed |= int.from_bytes(bits[plane::4], "little") << 2 * plane
        block = blocks[number] if blocks else space.allocate_block()
        space.put(
            block, struct.pack("<IIQ", 0, 0, block) + packed.to_bytes(_PER_BITMAP // 4, "little"), BITMAP_SALT
        )
        free = counts.find(0)
        entries.append((block, counts.count(0), free if free >= 0 else len(counts)))
    return entries


def _root(saturated: bytearray, bitmap_root: int, overflow_root: int) -> bytes:
    allocated = len(saturated) - saturated.count(0)
    return struct.pack("<QQQQ96x", len(saturated), allocated, bitmap_root, overflow_root)
