"""Put segments and tables together into one table: a merge by ranges of ids, in little memory."""

from __future__ import annotations

import os
import struct
import sys
from array import array
from bisect import bisect_left
from collections.abc import Callable, Container, Iterator
from dataclasses import dataclass
from typing import Protocol

from blake3 import blake3

from blocksnap.repository.index import ROW as SEGMENT_ROW
from blocksnap.repository.index import Segment
from blocksnap.repository.keys import KeyRing
from blocksnap.repository.table import (
    BLOCK_ROWS,
    MAGIC,
    ROW,
    SEGMENT,
    TRAILER,
    BlockSeal,
    Covered,
    Table,
    TornTableError,
)

_RANGE_ROWS = 65_536
"""Rows that are sorted in memory at a time, about: 150 bytes each."""
_PREFIXES = 1 << 64
_LABEL = struct.Struct("<I")
_SEGMENT_PARTS = struct.Struct("<32sI8s")
_TABLE_PARTS = struct.Struct("<32sII8s")
_ID = 32


class _Source(Protocol):
    def take(self, bound: bytes) -> list[bytes]:
        """Return the next rows whose id is below a bound, as the new table has them."""
        ...


@dataclass(slots=True)
class _SegmentSource:
    segment: Segment
    labels: list[bytes]
    done: int = 0

    def take(self, bound: bytes) -> list[bytes]:
        rows, size, labels = self.segment.rows, SEGMENT_ROW.size, self.labels

        def id_of(number: int) -> bytes:
            return bytes(rows[number * size : number * size + _ID])

        end = bisect_left(range(len(self.segment)), bound, self.done, key=id_of)
        part = bytes(rows[self.done * size : end * size])
        self.done = end
        return [id_ + labels[pack] + rest for id_, pack, rest in _SEGMENT_PARTS.iter_unpack(part)]


class _TableSource:
    def __init__(self, table: Table, packs: list[bytes], segments: list[bytes]) -> None:
        self._pieces = table.pieces()
        self._packs = packs
        self._segments = segments
        self._rest = b""

    def take(self, bound: bytes) -> list[bytes]:
        parts = []
        while True:
            rows, size = self._rest, ROW.size
            count = len(rows) // size
            end = bisect_left(range(count), bound, key=lambda n: rows[n * size : n * size + _ID])
            parts.append(rows[: end * size])
            self._rest = rows[end * size :]
            if self._rest:
                break
            piece = next(self._pieces, None)
            if piece is None:
                break
            self._rest = piece
        packs, segments = self._packs, self._segments
        # A segment without a label is not wanted.
        return [
            id_ + packs[pack] + segments[segment] + rest
            for part in parts
            for id_, pack, segment, rest in _TABLE_PARTS.iter_unpack(part)
            if segments[segment]
        ]


class Merge:
    """What goes into one table; equal ids come to lie beside each other."""

    def __init__(self, keys: KeyRing) -> None:
        self._keys = keys
        self._packs: dict[bytes, int] = {}
        self._sources: list[Callable[[], _Source]] = []
        self.segments: list[Covered] = []

    @property
    def rows(self) -> int:
        """Number of rows that the table will have."""
        return sum(segment.rows for segment in self.segments)

    def add_segment(self, segment: Segment) -> None:
        """Add all rows of a segment."""
        mine = self._cover(Covered(segment.name, len(segment)))
        labels = [self._label(pack) + mine for pack in segment.packed_packs()]
        self._sources.append(lambda: _SegmentSource(segment, labels))

    def add_table(self, table: Table, wanted: Container[str]) -> None:
        """Add the rows that a table has of some segments."""
        segments = [self._cover(segment) if segment.name in wanted else b"" for segment in table.segments]
        used = range(table.pack_count) if all(segments) else _used_packs(table, segments)
        packs = [b""] * table.pack_count
        for number in used:
            packs[number] = self._label(table.packed_pack(number))
        self._sources.append(lambda: _TableSource(table, packs, segments))

    def write(self, fd: int) -> None:
        """Write the table; may be tried again elsewhere.

        Raises OSError, and DamageError for what it is made of, also when a row of that is missing.
        """
        sources = [begin() for begin in self._sources]
        nonce = os.urandom(16)
        output = _BlockWriter(fd, BlockSeal(self._keys, nonce))
        parts = max(-(-self.rows // _RANGE_ROWS), 1)
        for part in range(1, parts + 1):
            bound = (part * _PREFIXES // parts).to_bytes(9, "big")[1:] if part < parts else b"\xff" * 33
            rows = [row for source in sources for row in source.take(bound)]
            rows.sort()
            output.add(rows)
        output.finish()
        if output.rows != self.rows:
            raise TornTableError(f"{self.rows - output.rows} rows are missing")
        if sys.byteorder == "big":
            output.firsts.byteswap()
        tail = b"".join(
            (
                output.firsts.tobytes(),
                *self._packs,
                *(SEGMENT.pack(segment.name.encode(), segment.rows) for segment in self.segments),
                TRAILER.pack(
                    MAGIC,
                    1,
                    len(self.segments),
                    output.rows,
                    len(self._packs),
                    self._keys.repository_id,
                    nonce,
                ),
            )
        )
        _write(fd, tail + blake3(tail, key=self._keys.cache_key).digest())

    def _cover(self, segment: Covered) -> bytes:
        self.segments.append(segment)
        return _LABEL.pack(len(self.segments) - 1)

    def _label(self, pack: bytes) -> bytes:
        return _LABEL.pack(self._packs.setdefault(pack, len(self._packs)))


def _used_packs(table: Table, segments: list[bytes]) -> list[int]:
    """Return the packs that rows of the segments with a label are in: the others are to be forgotten."""
    used = bytearray(table.pack_count)
    for piece in table.pieces():
        for _, pack, segment, _ in _TABLE_PARTS.iter_unpack(piece):
            if segments[segment]:
                used[pack] = 1
    return [number for number, is_used in enumerate(used) if is_used]


class _BlockWriter:
    def __init__(self, fd: int, seal: BlockSeal) -> None:
        self._fd = fd
        self._seal = seal
        self._carry = b""
        self.firsts = array("Q")
        self.rows = 0

    def add(self, rows: list[bytes]) -> None:
        self.rows += len(rows)
        size = BLOCK_ROWS * ROW.size
        data = self._carry + b"".join(rows)
        whole = len(data) - len(data) % size
        self._carry = data[whole:]
        _write(self._fd, b"".join(self._blocks(data[:whole], size)))

    def finish(self) -> None:
        if self._carry:
            size = BLOCK_ROWS * ROW.size
            _write(self._fd, b"".join(self._blocks(self._carry.ljust(size, b"\0"), size)))

    def _blocks(self, data: bytes, size: int) -> Iterator[bytes]:
        for at in range(0, len(data), size):
            rows = data[at : at + size]
            tag = self._seal.tag(len(self.firsts), rows)
            self.firsts.append(int.from_bytes(rows[:8], "big"))
            yield rows
            yield tag


def _write(fd: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]
