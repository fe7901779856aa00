r"""Packs: files of many frames, each self-describing, with a sealed table of contents at the end.

    header   64 bytes  ``BSPACK1\\0``, u32 version 1, u32 zero, 16s repository id, 16s writer id, 16s random
    frames   one after another
    footer   one frame of type FOOTER, whose plaintext is the table: 48-byte rows
             32s id, u32 offset, u32 frame length, u32 plaintext length, u8 type, 3 zero bytes
    trailer  16 bytes  u64 offset of the footer, u32 length of the footer, ``BSPT``

A pack is named ``packs/<xx>/<wid>-<blake3>``, where blake3 is the hash of all its bytes and xx its first
two digits: it can be scrubbed without a key, and its random header makes the name unique forever.
"""

from __future__ import annotations

import errno
import os
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from blake3 import blake3

from blocksnap.backends.base import Backend
from blocksnap.backends.errors import BackendAwayError, BackendFailedError, ObjectMissingError
from blocksnap.errors import BlocksnapError
from blocksnap.repository.errors import DamagedObjectError, NewerFormatError
from blocksnap.repository.frame import HEADER as FRAME_HEADER
from blocksnap.repository.frame import FrameHeader, FrameType, Opener, Sealer
from blocksnap.repository.keys import KeyRing

MAGIC = b"BSPACK1\0"
HEADER = struct.Struct("<8sII16s16s16s")
ROW = struct.Struct("<32sIIIB3s")
TRAILER = struct.Struct("<QI4s")
TRAILER_MAGIC = b"BSPT"
MIN_TARGET, MAX_TARGET = 32 << 20, 128 << 20
_BLOCK = 4 << 20


@dataclass(frozen=True, slots=True)
class PackId:
    """A pack by its writer and the hash of its bytes."""

    writer: bytes
    hash: bytes

    @property
    def name(self) -> str:
        """Name of the object."""
        digest = self.hash.hex()
        return f"packs/{digest[:2]}/{self.writer.hex()}-{digest}"

    @classmethod
    def parse(cls, name: str) -> PackId:
        """Read an object's name; raises ValueError."""
        folder, _, last = name.removeprefix("packs/").partition("/")
        writer, _, digest = last.partition("-")
        if len(writer) != 32 or len(digest) != 64 or digest[:2] != folder:
            raise ValueError(f"not a pack: {name}")
        return cls(bytes.fromhex(writer), bytes.fromhex(digest))


@dataclass(frozen=True, slots=True)
class PackRow:
    """Where one frame lies in a pack; its type may be one that only a later version knows."""

    id: bytes
    offset: int
    length: int
    plain_length: int
    type: int


@dataclass(frozen=True, slots=True)
class SealedPack:
    """A pack that is published."""

    id: PackId
    size: int
    rows: tuple[PackRow, ...]


def pack_target(packs: int) -> int:
    """Return the size at which a pack is closed: it grows with the repository, so that packs stay few."""
    return max(MIN_TARGET, min(MAX_TARGET, int(MIN_TARGET * (packs / 50) ** 0.5)))


class PackWriter:
    """One pack while it grows; it streams to the backend and needs no memory for its frames."""

    def __init__(self, backend: Backend, keys: KeyRing, writer: bytes) -> None:
        self._writer = writer
        self._sealer = Sealer(keys)
        self._object = backend.open_writer()
        self._hash = blake3()
        self._rows: list[PackRow] = []
        self._size = 0
        self._append(HEADER.pack(MAGIC, 1, 0, keys.repository_id, writer, os.urandom(16)))

    @property
    def size(self) -> int:
        """Bytes written so far."""
        return self._size

    def add(self, frame: memoryview, *, id_: bytes, kind: FrameType, plain_length: int) -> None:
        """Append a sealed frame."""
        self._rows.append(PackRow(id_, self._size, len(frame), plain_length, kind))
        self._append(frame)

    def seal(self) -> SealedPack:
        """Write the footer and publish the pack; it is durable when this returns."""
        table = b"".join(
            ROW.pack(row.id, row.offset, row.length, row.plain_length, row.type, bytes(3))
            for row in self._rows
        )
        footer = self._sealer.seal(FrameType.FOOTER, table)
        offset = self._size
        self._append(footer)
        self._append(TRAILER.pack(offset, len(footer), TRAILER_MAGIC))
        pack = PackId(self._writer, self._hash.digest())
        self._object.publish(pack.name)
        return SealedPack(pack, self._size, tuple(self._rows))

    def abort(self) -> None:
        """Drop the pack."""
        self._object.abort()

    def _append(self, data: bytes | memoryview) -> None:
        self._object.write(data)
        self._hash.update(data)
        self._size += len(data)


def hash_pack(read_range: Callable[[str, int, memoryview], None], name: str, size: int) -> bool:
    """Tell whether a pack's bytes have the hash in its name."""
    # Read rather than mapped: a bad sector under a mapping would kill the process.
    buffer = memoryview(bytearray(min(size, _BLOCK)))
    hasher = blake3()
    for offset in range(0, size, _BLOCK):
        block = buffer[: min(_BLOCK, size - offset)]
        read_range(name, offset, block)
        hasher.update(block)
    return hasher.digest() == PackId.parse(name).hash


def read_footer(backend: Backend, keys: KeyRing, name: str, size: int) -> tuple[PackRow, ...]:
    """Return a pack's table of contents; raises DamagedObjectError."""
    if size < HEADER.size + TRAILER.size:
        raise DamagedObjectError(name, "cut short")
    trailer = bytearray(TRAILER.size)
    read_pack_range(backend, name, size - TRAILER.size, memoryview(trailer))
    offset, length, magic = TRAILER.unpack(trailer)
    if magic != TRAILER_MAGIC or offset + length + TRAILER.size != size:
        raise DamagedObjectError(name, "its trailer makes no sense")
    frame = bytearray(length)
    read_pack_range(backend, name, offset, memoryview(frame))
    table = Opener(keys).open(memoryview(frame), where=f"footer of {name}", kind=FrameType.FOOTER)
    return tuple(_parse_rows(table, name, limit=offset))


def _parse_rows(table: bytes | memoryview, name: str, *, limit: int) -> Iterator[PackRow]:
    if len(table) % ROW.size:
        raise DamagedObjectError(name, "its table is cut short")
    for id_, offset, length, plain, kind, _ in ROW.iter_unpack(table):
        if offset < HEADER.size or length < FRAME_HEADER.size or offset + length > limit:
            raise DamagedObjectError(name, "its table points outside")
        yield PackRow(id_, offset, length, plain, kind)


def read_pack_range(backend: Backend, name: str, offset: int, buffer: memoryview) -> None:
    """Fill a buffer from a pack; raises DamagedObjectError when the pack does not have these bytes."""
    try:
        backend.read_range_into(name, offset, buffer)
    except EOFError as err:
        raise DamagedObjectError(name, "cut short") from err
    except ObjectMissingError as err:
        raise DamagedObjectError(name, "the index lists it, but it is missing") from err
    except BackendFailedError as err:
        raise _damage_of(err, name, f"it cannot be read at {offset}") from err


def read_object(backend: Backend, name: str) -> bytes:
    """Return a whole object; raises ObjectMissingError, and DamagedObjectError when it cannot be read."""
    try:
        return backend.read(name)
    except BackendFailedError as err:
        raise _damage_of(err, name, "it cannot be read") from err


def _damage_of(err: BackendFailedError, name: str, what: str) -> BlocksnapError:
    """Return what a failed read says: a bad sector, and what is far too large, is damage; all else is not."""
    if err.errno not in (errno.EIO, errno.EFBIG) or isinstance(err, BackendAwayError):
        return err
    return DamagedObjectError(name, f"{what}: {os.strerror(err.errno)}")


def check_header(header: bytes, pack: PackId, repository_id: bytes) -> None:
    """Raise DamagedObjectError unless these 64 bytes begin this pack of this repository.

    Raises NewerFormatError for a later version: call it when the pack's hash has been found right.
    """
    if len(header) < HEADER.size:
        raise DamagedObjectError(pack.name, "cut short")
    magic, version, zero, repository, writer, _ = HEADER.unpack(header)
    if magic == MAGIC and version != 1:
        raise NewerFormatError(pack.name, f"packs of version {version}")
    if (magic, zero, repository, writer) != (MAGIC, 0, repository_id, pack.writer):
        raise DamagedObjectError(pack.name, "its header is not that of this pack")


def frame_at(data: memoryview, row: PackRow, name: str) -> FrameHeader:
    """Return the header of the frame that a row points to; raises when they disagree."""
    where = f"frame at {row.offset} of {name}"
    header = FrameHeader.parse(data, where=where)
    if (header.id, header.type, header.frame_length, header.plain_length) != (
        row.id,
        row.type,
        row.length,
        row.plain_length,
    ):
        raise DamagedObjectError(where, "the table of the pack says something else")
    return header
