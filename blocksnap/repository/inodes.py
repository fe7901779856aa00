"""Inode records: what the leaves of a subvolume's map lead to (docs/design.md, "Inode maps").

A page holds the records of sixteen consecutive inode numbers. What of a record can be large is in a map of
its own, whose root stands in the record: a file's chunks, and long listings, states, targets and extended
attributes. Whoever follows maps has to follow these too: ``page_references`` names them, without knowing
what they are of.
"""

from __future__ import annotations

import stat
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

from blocksnap.repository.blockmap import HOLE, ZERO, MapRoot, levels_for
from blocksnap.repository.compact import fold, read_number, unfold, write_number
from blocksnap.repository.errors import DamagedObjectError, NewerFormatError
from blocksnap.repository.frame import FrameType

PAGE_INODES = 16
LONGEST_INLINE = 1024
"""Bytes that a record holds of a value; what is longer is stored in blocks."""
BLOCK_BYTES = 64 << 10
LISTING_SPAN = 256
"""How many directory indexes a block of a long listing is for."""
_VERSION = 1
_ID = 32
_KIND_ID = 2
_MOST_LEVELS = 10
_NUMBERS = 7
_TIME_BITS = 100
"""btrfs has 64 bits of seconds, and nanoseconds."""


class Reference(NamedTuple):
    """A map, or a single blob (no levels), that a record refers to, and what its leaves are.

    ``slot`` and ``part`` tell which of a page's references it is, so that two pages can be compared.
    """

    slot: int
    part: int
    root: MapRoot
    leaf: FrameType


@dataclass(frozen=True, slots=True)
class Value:
    """Some bytes: ``inline`` in the record, or, when there are more than ``LONGEST_INLINE``, under ``root``.

    ``places`` is how many leaves the map has room for; blocks of 64 KiB, but for listings.
    """

    length: int = 0
    inline: bytes = b""
    places: int = 0
    root: MapRoot = MapRoot(0, HOLE)  # noqa: RUF009 - immutable

    @classmethod
    def short(cls, data: bytes) -> Value:
        """Return the value of bytes that fit into a record."""
        if len(data) > LONGEST_INLINE:
            raise ValueError("a value that is too long for a record")
        return cls(len(data), data)

    @property
    def is_inline(self) -> bool:
        """Whether the record holds the bytes themselves."""
        return self.length <= LONGEST_INLINE


@dataclass(frozen=True, slots=True)
class InodeRecord:
    """One inode. Times are nanoseconds since the epoch; ``flags`` are btrfs's own; ``size`` is i_size.

    ``content`` is the map of a regular file's chunks. ``detail`` is the state of a regular file, the listing
    of a directory, the target of a symbolic link, empty for anything else.
    """

    number: int
    generation: int
    mode: int
    uid: int
    gid: int
    nlink: int
    flags: int
    size: int
    device: tuple[int, int]
    """Major and minor number of a device node."""
    mtime: int
    atime: int
    ctime: int
    otime: int
    xattrs: Value = Value()
    detail: Value = Value()
    content: MapRoot = MapRoot(0, HOLE)  # noqa: RUF009 - immutable

    @property
    def is_file(self) -> bool:
        """Whether it is a regular file."""
        return stat.S_ISREG(self.mode)

    @property
    def is_directory(self) -> bool:
        """Whether it is a directory."""
        return stat.S_ISDIR(self.mode)


def levels_of(places: int) -> int:
    """Return the levels of a map in a record: a map with one place is what stands there."""
    return 0 if places <= 1 else levels_for(places)


def encode_page(records: Iterable[InodeRecord]) -> bytes:
    """Return a page's plaintext from records of its inodes, ascending, at least one."""
    packed, before = bytearray([_VERSION, 0]), -1
    for record in records:
        if record.number <= before or (before >= 0 and record.number // PAGE_INODES != before // PAGE_INODES):
            raise ValueError(f"inode {record.number} does not follow {before} in one page")
        before = record.number
        body = _encode_record(record)
        packed.append(record.number % PAGE_INODES)
        packed += write_number(len(body)) + body
        packed[1] += 1
    return bytes(packed)


def decode_page(plain: bytes | memoryview, number: int, where: str) -> list[InodeRecord]:
    """Return the records of page ``number``, ascending.

    Raises DamagedObjectError when it is no page, NewerFormatError for a later version.
    """
    return [_Reader(body, where).record(number * PAGE_INODES + slot) for slot, body in _bodies(plain, where)]


def page_references(plain: bytes | memoryview, where: str) -> list[Reference]:
    """Return what the records of a page refer to; raises as ``decode_page``."""
    found = []
    for slot, body in _bodies(plain, where):
        record = _Reader(body, where).record(slot)
        found += [
            Reference(slot, part, root, leaf)
            for part, (root, leaf) in enumerate(record_references(record))
            if len(root.entry) == _ID
        ]
    return found


def record_references(record: InodeRecord) -> tuple[tuple[MapRoot, FrameType], ...]:
    """Return the maps of a record, always as many, with what their leaves are."""
    return (
        (record.content, FrameType.DATA),
        (record.xattrs.root, FrameType.ATTACHMENT),
        (record.detail.root, FrameType.ATTACHMENT),
    )


def encode_xattrs(xattrs: Iterable[tuple[bytes, bytes]]) -> bytes:
    """Return extended attributes as the bytes of a value."""
    return b"".join(
        write_number(len(name)) + name + write_number(len(value)) + value for name, value in sorted(xattrs)
    )


def decode_xattrs(data: bytes, where: str) -> list[tuple[bytes, bytes]]:
    """Return extended attributes, by name; raises DamagedObjectError."""
    reader, found = _Reader(data, where), []
    while not reader.is_at_end:
        name = reader.take(reader.number())
        if b"\0" in name:
            raise DamagedObjectError(where, f"{name!r} is no name of an extended attribute")
        found.append((name, reader.take(reader.number())))
    return found


def _bodies(plain: bytes | memoryview, where: str) -> Iterator[tuple[int, bytes]]:
    data = bytes(plain)
    if data and data[0] > _VERSION:
        raise NewerFormatError(where, f"inode records of version {data[0]}")
    reader = _Reader(data, where)
    version, count = reader.byte(), reader.byte()
    if version != _VERSION or not 0 < count <= PAGE_INODES:
        raise DamagedObjectError(where, "it is no page of inode records")
    before = -1
    for _ in range(count):
        slot = reader.byte()
        if not before < slot < PAGE_INODES:
            raise DamagedObjectError(where, "its inode records are out of order")
        before = slot
        yield slot, reader.take(reader.number())
    reader.require_end()


def _encode_record(record: InodeRecord) -> bytes:
    numbers = (
        record.generation, record.mode, record.uid, record.gid, record.nlink, record.flags, record.size,
        fold(record.mtime),
    )  # fmt: skip
    parts = [write_number(value) for value in numbers]
    parts += [write_number(fold(time - record.mtime)) for time in (record.atime, record.ctime, record.otime)]
    parts.append(_encode_value(record.xattrs))
    kind = stat.S_IFMT(record.mode)
    if kind in (stat.S_IFREG, stat.S_IFDIR, stat.S_IFLNK):
        parts.append(_encode_value(record.detail))
    if kind == stat.S_IFREG:
        parts.append(_encode_root(record.content))
    if kind in (stat.S_IFCHR, stat.S_IFBLK):
        parts += map(write_number, record.device)
    return b"".join(parts)


def _encode_value(value: Value) -> bytes:
    if value.is_inline:
        return write_number(value.length) + value.inline
    return write_number(value.length) + write_number(value.places) + _encode_root(value.root)


def _encode_root(root: MapRoot) -> bytes:
    is_id = len(root.entry) == _ID
    kind = _KIND_ID if is_id else root.entry[0]
    return bytes((kind + 4 * root.levels,)) + (root.entry if is_id else b"")


class _Reader:
    """Takes bytes apart that nobody vouches for; raises DamagedObjectError."""

    def __init__(self, data: bytes, where: str) -> None:
        self._data = data
        self._at = 0
        self._where = where

    @property
    def is_at_end(self) -> bool:
        return self._at == len(self._data)

    def require_end(self) -> None:
        if not self.is_at_end:
            raise self._damage()

    def byte(self) -> int:
        return self.take(1)[0]

    def take(self, length: int) -> bytes:
        end = self._at + length
        if end > len(self._data):
            raise self._damage()
        found = self._data[self._at : end]
        self._at = end
        return found

    def number(self, bits: int = 64) -> int:
        try:
            value, self._at = read_number(self._data, self._at, bits)
        except ValueError as err:
            raise self._damage() from err
        return value

    def record(self, number: int) -> InodeRecord:
        generation, mode, uid, gid, nlink, flags, size = (self.number() for _ in range(_NUMBERS))
        modified = unfold(self.number(_TIME_BITS))
        atime, ctime, otime = (modified + unfold(self.number(_TIME_BITS)) for _ in range(3))
        kind = stat.S_IFMT(mode)
        xattrs = self._value()
        detail = self._value() if kind in (stat.S_IFREG, stat.S_IFDIR, stat.S_IFLNK) else Value()
        content = self._root() if kind == stat.S_IFREG else MapRoot(0, HOLE)
        is_node = kind in (stat.S_IFCHR, stat.S_IFBLK)
        device = (self.number(), self.number()) if is_node else (0, 0)
        self.require_end()
        is_small = not ((uid | gid | nlink) >> 32 or (device[0] | device[1]) >> 31)
        if size >> 63 or mode >> 16 or not is_small:
            raise self._damage()
        return InodeRecord(
            number, generation, mode, uid, gid, nlink, flags, size, device, modified, atime, ctime, otime,
            xattrs, detail, content,
        )  # fmt: skip

    def _value(self) -> Value:
        length = self.number()
        if length <= LONGEST_INLINE:
            return Value(length, self.take(length))
        places = self.number()
        root = self._root()
        if root.levels != levels_of(places):
            raise self._damage()
        return Value(length, b"", places, root)

    def _root(self) -> MapRoot:
        levels, kind = divmod(self.byte(), 4)
        if levels > _MOST_LEVELS or kind > _KIND_ID:
            raise self._damage()
        return MapRoot(levels, self.take(_ID) if kind == _KIND_ID else (ZERO if kind else HOLE))

    def _damage(self) -> DamagedObjectError:
        return DamagedObjectError(self._where, "its inode records make no sense")
