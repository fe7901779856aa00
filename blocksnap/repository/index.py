"""The index: which pack holds which blob, as immutable sorted segments.

A segment ``index/<epoch>-<wid>-<n>`` is

    header  32 bytes  ``BSINDEX1``, u32 version 1, u32 rows, u32 packs, u32 row size 44, 8 zero bytes
    rows    44 bytes each, sorted: 32s id, u32 pack ordinal, u32 offset, u32 frame length | type << 24
    packs   56 bytes each: 16s writer, 32s hash, u64 size
    check   32 bytes  BLAKE3 of all before, keyed with the index key

Rows exist only for packs that are durable. Ids are uniform, so a search begins where the id ought to be
and needs a few probes of the mapped segment, whatever its size.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from blake3 import blake3

from blocksnap.repository.errors import DamagedObjectError, NewerFormatError
from blocksnap.repository.pack import PackId, SealedPack

MAGIC = b"BSINDEX1"
HEADER = struct.Struct("<8sIIIIQ")
ROW = struct.Struct("<32sIII")
PACK = struct.Struct("<16s32sQ")
CHECK_SIZE = 32
MAX_FRAME = (1 << 24) - 1
SEGMENT_ROWS = 200_000
"""A writer's segment is stored when it has this many rows, which bounds the memory of a run."""
_LINEAR = 8


@dataclass(frozen=True, slots=True)
class Location:
    """Where a frame lies."""

    pack: PackId
    offset: int
    length: int
    type: int


def segment_name(epoch: int, writer: bytes, number: int) -> str:
    """Return the name of a writer's n-th segment."""
    return f"index/{epoch:08d}-{writer.hex()}-{number:06d}"


def encode_segment(packs: Iterable[SealedPack], index_key: bytes) -> bytes:
    """Return the segment that lists all frames of these packs."""
    ordered = list(packs)
    rows = sorted(
        ROW.pack(row.id, ordinal, row.offset, row.length | row.type << 24)
        for ordinal, pack in enumerate(ordered)
        for row in pack.rows
    )
    body = b"".join(
        (
            HEADER.pack(MAGIC, 1, len(rows), len(ordered), ROW.size, 0),
            *rows,
            *(PACK.pack(pack.id.writer, pack.id.hash, pack.size) for pack in ordered),
        )
    )
    return body + blake3(body, key=index_key).digest()


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
        self._rows: memoryview = data[HEADER.size : HEADER.size + rows * ROW.size]
        self._count: int = rows
        self._absent: frozenset[int] = frozenset()
        self.packs = [
            (PackId(writer, digest), size)
            for writer, digest, size in PACK.iter_unpack(data[HEADER.size + rows * ROW.size : end])
        ]

    def __len__(self) -> int:
        return self._count

    def pass_over_missing(self, sizes: Mapping[str, int]) -> None:
        """Find nothing any more in packs that are not among ``sizes``, or have another size there."""
        self._absent = frozenset(
            ordinal for ordinal, (pack, size) in enumerate(self.packs) if sizes.get(pack.name) != size
        )

    def find(self, id_: bytes) -> Location | None:
        """Return where a blob lies, or None."""
        low, high = 0, self._count
        rows, size = self._rows, ROW.size
        # Interpolation: each probe narrows to where a uniform id would be, and to one half at worst.
        target = int.from_bytes(id_[:8], "big")
        low_key, high_key = 0, 1 << 64
        while high - low > _LINEAR:
            guess = low + (target - low_key) * (high - low) // max(high_key - low_key, 1)
            middle = min(max(guess, low + (high - low) // 8), high - 1 - (high - low) // 8)
            key = bytes(rows[middle * size : middle * size + 32])
            if key == id_:
                return self._location(middle)
            if key < id_:
                low, low_key = middle + 1, int.from_bytes(key[:8], "big")
            else:
                high, high_key = middle, int.from_bytes(key[:8], "big")
        for number in range(low, high):
            if rows[number * size : number * size + 32] == id_:
                return self._location(number)
        return None

    def _location(self, number: int) -> Location | None:
        _, ordinal, offset, packed = ROW.unpack_from(self._rows, number * ROW.size)
        if ordinal in self._absent:
            return None
        try:
            return Location(self.packs[ordinal][0], offset, packed & MAX_FRAME, packed >> 24)
        except IndexError as err:
            raise DamagedObjectError(self.name, "a row points nowhere") from err


class Index:
    """All segments of a repository, and what this run has added."""

    def __init__(self) -> None:
        self._segments: list[Segment] = []

    @property
    def segments(self) -> tuple[Segment, ...]:
        """The segments that were loaded."""
        return tuple(self._segments)

    @property
    def packs(self) -> int:
        """Number of packs that have rows."""
        return sum(len(segment.packs) for segment in self._segments)

    def add(self, segment: Segment) -> None:
        """Add a segment."""
        self._segments.append(segment)

    def find(self, id_: bytes) -> Location | None:
        """Return where a blob lies, or None."""
        return next(self.find_all(id_), None)

    def find_all(self, id_: bytes) -> Iterator[Location]:
        """Yield every place where a blob lies."""
        for segment in reversed(self._segments):
            found = segment.find(id_)
            if found is not None:
                yield found
