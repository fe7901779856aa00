"""The records that the C core writes of inodes, as values, and what is remembered of them for it to read.

native/btrfs_diff.h has the layout of a record; the bytes of a state are in docs/design.md, section 4.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterable, Iterator, Mapping

from blocksnap.extents.btrfs_changes import (
    Attributes,
    Entry,
    EntryKind,
    InodeChange,
    Link,
    RememberedInode,
)
from blocksnap.extents.model import ExtentList

_HEAD = struct.Struct("<5Q4q4I5I8Q")
_NAME = struct.Struct("<QQBB")
_LINK = struct.Struct("<QH")
_XATTR = struct.Struct("<HH")
_MEMORY = struct.Struct("<QQQQ")
_NO_STATE = (1 << 64) - 1
LISTING = 0x81
"""First byte of the state of a directory."""
_KINDS: tuple[EntryKind, ...] = (
    "unknown", "file", "directory", "character", "block", "fifo", "socket", "symlink", "subvolume",
)  # fmt: skip
_MINOR_BITS = 20
_SECOND = 10**9


def read_records(packed: bytes) -> Iterator[InodeChange]:
    """Take records apart."""
    at = 0
    while at < len(packed):
        head = _HEAD.unpack_from(packed, at)
        at += _HEAD.size
        parts = []
        for length in head[18:]:
            parts.append(packed[at : at + length])
            at += length
        changed, holes, added, removed, links, xattrs, target, state = parts
        yield InodeChange(
            number=head[0],
            generation=head[1],
            is_new=bool(head[17]),
            attributes=_attributes(head),
            links=tuple(_links(links)),
            xattrs=tuple(_xattrs(xattrs)),
            changed=ExtentList(changed),
            holes=ExtentList(holes),
            added=tuple(_entries(added)),
            removed=tuple(_entries(removed)),
            target=target,
            state=state,
        )


def _attributes(head: tuple[int, ...]) -> Attributes:
    atime, ctime, mtime, otime = (
        seconds * _SECOND + part for seconds, part in zip(head[5:9], head[9:13], strict=True)
    )
    device = head[3]
    return Attributes(
        mode=head[13],
        uid=head[14],
        gid=head[15],
        nlink=head[16],
        rdev=os.makedev(device >> _MINOR_BITS, device & ((1 << _MINOR_BITS) - 1)),
        flags=head[4],
        size=head[2],
        atime=atime,
        mtime=mtime,
        ctime=ctime,
        otime=otime,
    )


def _entries(packed: bytes) -> Iterator[Entry]:
    at = 0
    while at < len(packed):
        index, inode, kind, length = _NAME.unpack_from(packed, at)
        at += _NAME.size
        yield Entry(packed[at : at + length], inode, _KINDS[kind], index)
        at += length


def _links(packed: bytes) -> Iterator[Link]:
    at = 0
    while at < len(packed):
        parent, length = _LINK.unpack_from(packed, at)
        at += _LINK.size
        yield Link(parent, packed[at : at + length])
        at += length


def _xattrs(packed: bytes) -> Iterator[tuple[bytes, bytes]]:
    at = 0
    while at < len(packed):
        name_length, length = _XATTR.unpack_from(packed, at)
        at += _XATTR.size
        middle = at + name_length
        yield packed[at:middle], packed[middle : middle + length]
        at = middle + length


def write_memory(known: Mapping[int, RememberedInode]) -> bytes:
    """Put together what is remembered of some inodes, as ``btrfs_diff`` wants it."""
    parts: list[bytes] = []
    for number in sorted(known):
        inode = known[number]
        length = _NO_STATE if inode.state is None else len(inode.state)
        parts.append(_MEMORY.pack(number, inode.generation, inode.size, length))
        parts.append(inode.state or b"")
    return b"".join(parts)


def write_listing(entries: Iterable[Entry]) -> bytes:
    """Write the state of a directory from its names, given in any order."""
    packed = bytearray([LISTING])
    index = inode = 0
    for entry in sorted(entries, key=lambda entry: entry.index):
        if not 0 < len(entry.name) < 256:
            raise ValueError(f"{entry.name!r} is no name in a directory")
        packed += _varint(entry.index - index) + _varint(_zigzag(entry.inode - inode))
        packed += bytes((_KINDS.index(entry.kind), len(entry.name))) + entry.name
        index, inode = entry.index, entry.inode
    return bytes(packed)


def read_listing(state: bytes) -> Iterator[Entry]:
    """Read the state of a directory; raises ValueError when it is none."""
    if state[:1] != bytes((LISTING,)):
        raise ValueError("what was remembered of a directory is no listing")
    at, index, inode = 1, 0, 0
    while at < len(state):
        try:
            step, at = _read_varint(state, at)
            coded, at = _read_varint(state, at)
            kind, length = state[at], state[at + 1]
            entry_kind = _KINDS[kind]
        except IndexError as err:
            raise ValueError("what was remembered of a directory makes no sense") from err
        name = state[at + 2 : at + 2 + length]
        if len(name) != length or not length or not step:
            raise ValueError("what was remembered of a directory makes no sense")
        at += 2 + length
        index += step
        inode += coded >> 1 ^ -(coded & 1)
        yield Entry(name, inode, entry_kind, index)


def _zigzag(difference: int) -> int:
    return difference << 1 if difference >= 0 else (-difference << 1) - 1


def _varint(value: int) -> bytes:
    coded = bytearray()
    while value > 0x7F:
        coded.append(value & 0x7F | 0x80)
        value >>= 7
    coded.append(value)
    return bytes(coded)


def _read_varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        shift += 7
        if byte < 0x80:
            return value, at
        if shift > 63:
            raise ValueError("a number that is too long")
