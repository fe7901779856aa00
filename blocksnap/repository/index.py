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
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
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
    body = b"".join(
        (
            HEADER.pack(MAGIC, 1, len(packed), len(packs), ROW.size, 0),
            *packed,
            *(PACK.pack(pack.writer, pack.hash, size) for pack, size in packs),
        )
    )
    return body + blake3(body, key=index_key).digest()


class Segment:
    """One segment, as bytes or mapped."""

    def __init__(self, data: memoryview, *, name: str, index_key: bytes, stored: bool = True) -> None:
        """Check the segment whole; raises DamagedObjectError, NewerFormatError.

        One that is not ``stored`` was only made up.
        """
        self.name = name
        self.stored = stored
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

    def pass_over(self, unusable: Callable[[PackId, int], bool]) -> None:
        """Find nothing any more in the packs that this is true of; it gets each with its size."""
        self._absent |= {ordinal for ordinal, (pack, size) in enumerate(self.packs) if unusable(pack, size)}

    @property
    def rows(self) -> memoryview:
        """All rows, as they are stored."""
        return self._rows

    def find(self, id_: bytes) -> Location | None:
        """Return where a blob lies, or None."""
        return next(self.find_all(id_), None)

    def find_all(self, id_: bytes) -> Iterator[Location]:
        """Yield every place where a blob lies."""
        number = first_row(self._rows, self._count, id_)
        while 0 <= number < self._count and self._rows[number * ROW.size : number * ROW.size + 32] == id_:
            location = self._location(number)
            if location is not None:
                yield location
            number += 1

    def _location(self, number: int) -> Location | None:
        _, ordinal, offset, packed = ROW.unpack_from(self._rows, number * ROW.size)
        if ordinal in self._absent:
            return None
        try:
            return Location(self.packs[ordinal][0], offset, packed & MAX_FRAME, packed >> 24)
        except IndexError as err:
            raise DamagedObjectError(self.name, "a row points nowhere") from err


def first_row(rows: memoryview, count: int, id_: bytes) -> int:
    """Return the number of the first of ``count`` sorted rows that has this id, or -1."""
    low, high, size = 0, count, ROW.size
    # Interpolation: each probe narrows to where a uniform id would be, and to one half at worst.
    target = int.from_bytes(id_[:8], "big")
    low_key, high_key = 0, 1 << 64
    while high - low > _LINEAR:
        guess = low + (target - low_key) * (high - low) // max(high_key - low_key, 1)
        middle = min(max(guess, low + (high - low) // 8), high - 1 - (high - low) // 8)
        key = bytes(rows[middle * size : middle * size + 32])
        if key == id_:
            return _first_of_equals(rows, middle, id_)
        if key < id_:
            low, low_key = middle + 1, int.from_bytes(key[:8], "big")
        else:
            high, high_key = middle, int.from_bytes(key[:8], "big")
    for number in range(low, high):
        if rows[number * size : number * size + 32] == id_:
            return number
    return -1


def _first_of_equals(rows: memoryview, number: int, id_: bytes) -> int:
    while number > 0 and rows[(number - 1) * ROW.size : (number - 1) * ROW.size + 32] == id_:
        number -= 1
    return number


class Index:
    """All segments of a repository, and what this run has added."""

    def __init__(self) -> None:
        self._segments: list[Segment] = []
        self._condemned: frozenset[str] = frozenset()
        self._aside: frozenset[PackId] = frozenset()

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

    def keep_only(self, names: Container[str]) -> None:
        """Drop the segments that are not among these; those that were made up stay."""
        self._segments = [
            segment for segment in self._segments if segment.name in names or not segment.stored
        ]

    def replace_made_up(self, segments: Iterable[Segment]) -> None:
        """Put segments that are not stored in the place of those that were there."""
        self._segments = [*(each for each in self._segments if each.stored), *segments]

    def set_aside(self, packs: Iterable[str]) -> None:
        """Find what lies in these packs last, and only where no other pack has it."""
        self._aside = frozenset(map(PackId.parse, packs))

    def pass_over(self, condemned: frozenset[str], sizes: Mapping[str, int]) -> None:
        """Find nothing any more in packs that are missing or have another size.

        What lies in condemned packs alone is still found, since a parent may need it, but is not ``stays``.
        """
        self._condemned = condemned
        for segment in self._segments:
            segment.pass_over(lambda pack, size: sizes.get(pack.name) != size)

    def stays(self, id_: bytes) -> bool:
        """Tell whether a blob lies where it will still be when this run commits."""
        return any(
            location.pack not in self._aside and location.pack.name not in self._condemned
            for location in self.find_all(id_)
        )

    def find(self, id_: bytes) -> Location | None:
        """Return where a blob lies, or None."""
        return next(self.find_all(id_), None)

    def find_all(self, id_: bytes) -> Iterator[Location]:
        """Yield every place where a blob lies, the best first."""
        doubtful = []
        for segment in reversed(self._segments):
            for location in segment.find_all(id_):
                if location.pack in self._aside:
                    doubtful.append(location)
                else:
                    yield location
        yield from doubtful
