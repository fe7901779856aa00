"""The index: which pack holds which blob, as immutable sorted segments.

A segment ``index/<epoch>-<wid>-<n>`` is

    header  32 bytes  ``BSINDEX1``, u32 version 1, u32 rows, u32 packs, u32 row size 44, 8 zero bytes
    rows    44 bytes each, sorted: 32s id, u32 pack ordinal, u32 offset, u32 frame length | type << 24
    packs   56 bytes each: 16s writer, 32s hash, u64 size
    check   32 bytes  BLAKE3 of all before, keyed with the index key

Rows exist only for packs that are durable. Segments are how rows travel; what is searched is a table made of
them (``table``).
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator, Sequence

from blake3 import blake3

from blocksnap.repository.errors import DamagedObjectError, NewerFormatError
from blocksnap.repository.pack import PackId, SealedPack

MAGIC = b"BSINDEX1"
HEADER = struct.Struct("<8sIIIIQ")
ROW = struct.Struct("<32sIII")
PACK = struct.Struct("<16s32sQ")
CHECK_SIZE = 32
_ORDER = struct.Struct("<32sI8x")
_ROWS_AT_ONCE = 4096
MAX_FRAME = (1 << 24) - 1
SEGMENT_ROWS = 65_536
"""A writer's segment is stored when it has this many rows, which bounds the memory of a run."""


def segment_name(epoch: int, writer: bytes, number: int) -> str:
    """Return the name of a writer's n-th segment."""
    return f"index/{epoch:08d}-{writer.hex()}-{number:06d}"


def encode_segment(packs: Iterable[SealedPack], index_key: bytes) -> bytes:
    """Return the segment that lists all frames of these packs."""
    ordered = list(packs)
    rows = [
        (row.id, ordinal, row.offset, row.length, row.type)
        for ordinal, pack in enumerate(ordered)
        for row in pack.rows
    ]
    return encode_rows(rows, [(pack.id, pack.size) for pack in ordered], index_key)


def encode_rows(
    rows: Iterable[tuple[bytes, int, int, int, int]], packs: Sequence[tuple[PackId, int]], index_key: bytes
) -> bytes:
    """Return the segment with these rows: id, ordinal of the pack, offset, length and type of the frame."""
    packed = sorted(
        ROW.pack(id_, ordinal, offset, length | kind << 24) for id_, ordinal, offset, length, kind in rows
    )
    return encode_sorted(packed, packs, index_key)


def encode_sorted(rows: Sequence[bytes], packs: Sequence[tuple[PackId, int]], index_key: bytes) -> bytes:
    """Return the segment with these rows, which are packed and in order already."""
    body = bytearray(HEADER.pack(MAGIC, 1, len(rows), len(packs), ROW.size, 0))
    # In place: there may be millions of bytes.
    for row in rows:
        body += row
    for pack, size in packs:
        body += PACK.pack(pack.writer, pack.hash, size)
    body += blake3(body, key=index_key).digest()
    return bytes(body)


class Segment:
    """One segment, as bytes or mapped."""

    def __init__(self, data: memoryview, *, name: str, index_key: bytes) -> None:
        """Check the segment whole; raises DamagedObjectError, NewerFormatError."""
        self.name = name
        if len(data) < HEADER.size + CHECK_SIZE:
            raise DamagedObjectError(name, "cut short")
        magic, version, rows, packs, row_size, zero = HEADER.unpack_from(data)
        if magic != MAGIC:
            raise DamagedObjectError(name, "it is not an index segment")
        # In every version a segment ends with the checksum of what comes before.
        if blake3(data[:-CHECK_SIZE], key=index_key).digest() != data[-CHECK_SIZE:]:
            raise DamagedObjectError(name, "its checksum is wrong")
        if version != 1:
            raise NewerFormatError(name, f"index segments of version {version}")
        end = HEADER.size + rows * ROW.size + packs * PACK.size
        if (row_size, zero) != (ROW.size, 0) or end + CHECK_SIZE != len(data):
            raise DamagedObjectError(name, "it contradicts itself")
        _require_in_order(data[HEADER.size : HEADER.size + rows * ROW.size], packs, name)
        self._rows: memoryview = data[HEADER.size : HEADER.size + rows * ROW.size]
        self._packs: memoryview = data[HEADER.size + rows * ROW.size : end]
        self._count: int = rows

    def __len__(self) -> int:
        return self._count

    @property
    def rows(self) -> memoryview:
        """All rows, as they are stored."""
        return self._rows

    def packed_packs(self) -> Iterator[bytes]:
        """Yield the packs as they are stored, in the order of their ordinals."""
        for at in range(0, len(self._packs), PACK.size):
            yield bytes(self._packs[at : at + PACK.size])

    @property
    def packs(self) -> Iterator[tuple[PackId, int]]:
        """Yield the packs with their sizes, in the order of their ordinals."""
        for writer, digest, size in PACK.iter_unpack(bytes(self._packs)):
            yield PackId(writer, digest), size


def _require_in_order(rows: memoryview, packs: int, name: str) -> None:
    """Raise DamagedObjectError unless ids ascend and each row names one of so many packs."""
    # Copied, part by part: CPython 3.11 dies when an iterator over a view is collected as garbage.
    last = b""
    for at in range(0, len(rows), _ROWS_AT_ONCE * ROW.size):
        part = bytes(rows[at : at + _ROWS_AT_ONCE * ROW.size])
        ids, ordinals = zip(*_ORDER.iter_unpack(part), strict=True)
        if max(ordinals) >= packs:
            raise DamagedObjectError(name, "a row points nowhere")
        if last > ids[0] or sorted(ids) != list(ids):
            raise DamagedObjectError(name, "its rows are not in order")
        last = ids[-1]
