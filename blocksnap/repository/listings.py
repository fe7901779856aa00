"""Names in directories, as the repository stores them (docs/design.md, "Inode maps" and 4.5).

What comes out of here may have been written by anybody with a key: a name is checked to be one, and no two
of a directory are the same, before anything is made of it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from blocksnap.repository.compact import fold, read_number, unfold, write_number
from blocksnap.repository.errors import DamagedObjectError

SUBVOLUME = 8
"""Kind of the entry of a nested subvolume; ``inode`` is then the id of its tree."""
_VERSION = 0x81
_KINDS = 9
_LONGEST = 255


@dataclass(frozen=True, slots=True)
class DirectoryEntry:
    """A name in a directory; ``kind`` is a BTRFS_FT_* number, ``index`` its place (DIR_INDEX)."""

    name: bytes
    inode: int
    kind: int
    index: int


def encode_listing(entries: Iterable[DirectoryEntry]) -> bytes:
    """Return the bytes of a listing, or of a block of one, from entries ascending by index."""
    packed = bytearray([_VERSION])
    index = inode = 0
    for entry in entries:
        packed += write_number(entry.index - index) + write_number(fold(entry.inode - inode))
        packed += bytes((entry.kind, len(entry.name))) + entry.name
        index, inode = entry.index, entry.inode
    return bytes(packed)


def decode_listing(data: bytes, where: str) -> Iterator[DirectoryEntry]:
    """Yield the entries of a listing, or of a block of one; raises DamagedObjectError."""
    if data[:1] != bytes((_VERSION,)):
        raise DamagedObjectError(where, "it is no listing of a directory")
    at, index, inode = 1, 0, 0
    while at < len(data):
        try:
            step, at = read_number(data, at)
            coded, at = read_number(data, at)
            kind, length = data[at : at + 2]
        except ValueError as err:
            raise DamagedObjectError(where, "the listing of a directory makes no sense") from err
        name = data[at + 2 : at + 2 + length]
        at += 2 + length
        index += step
        inode += unfold(coded)
        if not step or kind >= _KINDS or inode < 0 or inode >> 64 or len(name) != length or not is_name(name):
            raise DamagedObjectError(where, f"{name!r} is no name in a directory")
        yield DirectoryEntry(name, inode, kind, index)


def require_distinct(entries: Iterable[DirectoryEntry], where: str) -> list[DirectoryEntry]:
    """Return the entries of a whole directory; raises DamagedObjectError when a name comes twice."""
    found = list(entries)
    if len({entry.name for entry in found}) != len(found):
        raise DamagedObjectError(where, "a directory has the same name twice")
    return found


def is_name(name: bytes) -> bool:
    """Tell whether bytes can be one name in a directory: nothing that leads anywhere else."""
    return 0 < len(name) <= _LONGEST and name not in (b".", b"..") and b"/" not in name and b"\0" not in name
