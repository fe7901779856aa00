"""Tables: the rows of many index segments in one sorted file of this host, so that a look-up is one look.

A table is made of segments that were checked, and is a cache: it says nothing that they do not say, and
whoever loses it makes it again. It is read with pread, a block at a time, and each block is proven when it is
read; so little has to be read, or hashed, to begin, and no page of it is held in memory.

    blocks    4096 each: 85 rows of 48 bytes, sorted by id, the last block filled up with zeros; 16s tag
              row: 32s id, u32 pack, u32 segment, u32 offset, u32 frame length | type << 24
    firsts    u64 of every block: the first 8 bytes, big endian, of its first id
    packs     56 each, as in a segment: 16s writer, 32s hash, u64 size
    segments  72 each: 64s name, padded with zeros, u64 rows
    trailer   "BSTABLE1", u32 version 1, u32 segments, u64 rows, u64 packs, 16s repository id, 16s nonce,
              32s check

The check is BLAKE3 of all behind the blocks, with the cache key. The tag is that of AES-256-GCM for no
plaintext, the rows as associated data and the number of the block as nonce, with a key of the table's own: so
a block proves its place in its table (docs/design.md, 3.15), three times as fast as by a hash.
"""

from __future__ import annotations

import os
import struct
import sys
import weakref
from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from blake3 import blake3

from blocksnap.errors import DamageError
from blocksnap.repository.index import MAX_FRAME, PACK
from blocksnap.repository.keys import KeyRing
from blocksnap.repository.pack import PackId

MAGIC = b"BSTABLE1"
BLOCK = 4096
ROW = struct.Struct("<32sIIII")
BLOCK_ROWS = 85
CHECK_SIZE = 32
SEGMENT = struct.Struct("<64sQ")
TRAILER = struct.Struct("<8sIIQQ16s16s")
_ROWS_SIZE = BLOCK_ROWS * ROW.size
_NONCE = struct.Struct("<Q4x")
_FIELDS = struct.Struct("<IIII")
_ID = 32
_BLOCKS_AT_ONCE = 64


class TornTableError(DamageError):
    """A table of the local cache is not what was written: it is thrown away and made again."""

    def __init__(self, reason: str) -> None:
        super().__init__(
            f"the local cache of the index is damaged: {reason}",
            resolution="remove the cache directory, or run with --no-cache",
        )


@dataclass(frozen=True, slots=True)
class Covered:
    """A segment whose rows a table has, and how many they are."""

    name: str
    rows: int


class TableRow(NamedTuple):
    """A row by its number; ``pack`` and ``segment`` are positions in the table's own lists.

    A tuple, because it is made in every look-up and a frozen dataclass takes four times as long to make.
    """

    number: int
    pack: int
    segment: int
    offset: int
    length: int
    type: int


class BlockSeal:
    """Makes and proves the tags of the blocks of one table, each of which is written once."""

    def __init__(self, keys: KeyRing, nonce: bytes) -> None:
        from cryptography.exceptions import InvalidTag
        from cryptography.hazmat.primitives.ciphers.aead import AESGCM

        self._cipher = AESGCM(blake3(nonce, key=keys.cache_key).digest())
        self._invalid = InvalidTag

    def tag(self, number: int, rows: bytes | memoryview) -> bytes:
        """Return the tag of a block."""
        return self._cipher.encrypt(_NONCE.pack(number), b"", rows)

    def prove(self, number: int, rows: bytes | memoryview, tag: bytes | memoryview) -> None:
        """Raise TornTableError unless this is what was written as this block."""
        try:
            self._cipher.decrypt(_NONCE.pack(number), tag, rows)
        except self._invalid as err:
            raise TornTableError(f"block {number} is not what was written") from err


class Table:
    """An open table; safe to use from several threads."""

    def __init__(self, fd: int, keys: KeyRing, name: str = "") -> None:
        """Take the descriptor over, and prove everything but the blocks; raises TornTableError."""
        self._fd = fd
        weakref.finalize(self, os.close, fd)
        self.name = name
        size = os.fstat(fd).st_size
        end = TRAILER.size + CHECK_SIZE
        trailer = self._pread(end, max(size - end, 0))
        magic, version, segments, rows, packs, repository, nonce = TRAILER.unpack_from(trailer)
        if (magic, version, repository) != (MAGIC, 1, keys.repository_id):
            raise TornTableError("it is no table of this repository")
        self.rows: int = rows
        self._blocks = -(-rows // BLOCK_ROWS)
        start = self._blocks * BLOCK
        if start + self._blocks * 8 + packs * PACK.size + segments * SEGMENT.size + end != size:
            raise TornTableError("it is cut short")
        tail = self._pread(size - start, start)
        if blake3(memoryview(tail)[:-CHECK_SIZE], key=keys.cache_key).digest() != tail[-CHECK_SIZE:]:
            raise TornTableError("its checksum is wrong")
        self._seal = BlockSeal(keys, nonce)
        self._last: tuple[int, bytes] = -1, b""
        self._firsts = array("Q", tail[: self._blocks * 8])
        if sys.byteorder == "big":
            self._firsts.byteswap()
        at = self._blocks * 8
        self._packs = tail[at : at + packs * PACK.size]
        at += len(self._packs)
        self.segments = tuple(
            Covered(name.rstrip(b"\0").decode(), count)
            for name, count in SEGMENT.iter_unpack(tail[at : at + segments * SEGMENT.size])
        )

    def __len__(self) -> int:
        return self.rows

    @property
    def memory_bytes(self) -> int:
        """What it holds in memory."""
        return len(self._firsts) * 8 + len(self._packs) + 100 * len(self.segments)

    @property
    def pack_count(self) -> int:
        """Number of packs that it knows."""
        return len(self._packs) // PACK.size

    def packed_pack(self, number: int) -> bytes:
        """Return a pack as a segment would have it."""
        return self._packs[number * PACK.size : (number + 1) * PACK.size]

    def pack(self, number: int) -> tuple[PackId, int]:
        """Return a pack and its size in bytes."""
        writer, digest, size = PACK.unpack_from(self._packs, number * PACK.size)
        return PackId(writer, digest), size

    def find(self, id_: bytes) -> list[TableRow]:
        """Return the rows that have this id."""
        prefix = int.from_bytes(id_[:8], "big")
        found = []
        end = bisect_right(self._firsts, prefix)
        for block in range(max(bisect_left(self._firsts, prefix, 0, end) - 1, 0), end):
            data = self._block(block)
            at = data.find(id_)
            while at >= 0:
                # What begins between two rows is chance.
                if at % ROW.size == 0:
                    found.append(self._row(block * BLOCK_ROWS + at // ROW.size, data, at))
                at = data.find(id_, at + 1)
        return found

    def row(self, number: int) -> tuple[bytes, TableRow]:
        """Return one row with its id."""
        block, slot = divmod(number, BLOCK_ROWS)
        data = self._block(block)
        return data[slot * ROW.size : slot * ROW.size + _ID], self._row(number, data, slot * ROW.size)

    def pieces(self) -> Iterator[bytes]:
        """Yield all rows as they are stored, in order, many at a time."""
        for block in range(0, self._blocks, _BLOCKS_AT_ONCE):
            yield self._read(block, min(_BLOCKS_AT_ONCE, self._blocks - block))

    def _row(self, number: int, data: bytes, at: int) -> TableRow:
        pack, segment, offset, packed = _FIELDS.unpack_from(data, at + _ID)
        return TableRow(number, pack, segment, offset, packed & MAX_FRAME, packed >> 24)

    def _block(self, number: int) -> bytes:
        """Return the rows of a block, proven; the last one is kept for who looks ids up in their order."""
        kept, rows = self._last
        if kept != number:
            rows = self._read(number, 1)
            self._last = number, rows
        return rows

    def _read(self, block: int, count: int) -> bytes:
        """Return the rows of some blocks, proven."""
        data = self._pread(count * BLOCK, block * BLOCK)
        parts = []
        for number in range(count):
            at = number * BLOCK
            rows = data[at : at + _ROWS_SIZE]
            self._seal.prove(block + number, rows, data[at + _ROWS_SIZE : at + BLOCK])
            parts.append(rows)
        joined = parts[0] if count == 1 else b"".join(parts)
        # The last block has room that is not used.
        return joined[: (self.rows - block * BLOCK_ROWS) * ROW.size]

    def _pread(self, length: int, offset: int) -> bytes:
        try:
            data = os.pread(self._fd, length, offset)
        except OSError as err:
            raise TornTableError(err.strerror or "it cannot be read") from err
        if len(data) != length:
            raise TornTableError("it is cut short")
        return data
