"""The names in one directory, packed: a directory may have millions, and several are kept."""

from __future__ import annotations

from array import array
from bisect import bisect_left
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from blocksnap.repository.errors import DamagedObjectError
from blocksnap.repository.listings import DirectoryEntry

_ROW_BYTES = 25
"""Of each name beside its own bytes: end, inode, kind, hash with place."""
_PLACE_BITS = 32
_HASHES = (1 << 32) - 1


class Name(NamedTuple):
    """A name, the inode that it leads to, and what that is (a BTRFS_FT_* number)."""

    name: bytes
    inode: int
    kind: int


class Names:
    """Names in the order in which they were made, and found by a search of their hashes."""

    def __init__(self, entries: Iterable[DirectoryEntry], where: str) -> None:
        """Take them all; raises DamagedObjectError when a name comes twice, and what ``entries`` raises."""
        text, self._ends, self._inodes, kinds = bytearray(), array("Q"), array("Q"), bytearray()
        found = array("Q")
        for place, entry in enumerate(entries):
            text += entry.name
            self._ends.append(len(text))
            self._inodes.append(entry.inode)
            kinds.append(entry.kind)
            found.append(_key(entry.name) | place)
        self._text, self._kinds = bytes(text), bytes(kinds)
        del text, kinds
        self._found = array("Q", sorted(found))
        self._require_distinct(where)

    def __len__(self) -> int:
        return len(self._ends)

    def __iter__(self) -> Iterator[Name]:
        return map(self.__getitem__, range(len(self)))

    def __getitem__(self, place: int) -> Name:
        begin = self._ends[place - 1] if place else 0
        return Name(self._text[begin : self._ends[place]], self._inodes[place], self._kinds[place])

    @property
    def held_bytes(self) -> int:
        """How much memory it takes, nearly."""
        return len(self._text) + len(self) * _ROW_BYTES

    def find(self, name: bytes) -> Name | None:
        """Return what a name leads to, if it is there."""
        key = _key(name)
        for at in range(bisect_left(self._found, key), len(self)):
            if self._found[at] >> _PLACE_BITS != key >> _PLACE_BITS:
                break
            found = self[self._found[at] % (1 << _PLACE_BITS)]
            if found.name == name:
                return found
        return None

    def _require_distinct(self, where: str) -> None:
        hash_before, same = -1, set[bytes]()
        for key in self._found:
            found = key >> _PLACE_BITS
            if found != hash_before:
                hash_before, first = found, key
                same.clear()
                continue
            if not same:
                same.add(self[first % (1 << _PLACE_BITS)].name)
            name = self[key % (1 << _PLACE_BITS)].name
            if name in same:
                raise DamagedObjectError(where, "a directory has the same name twice")
            same.add(name)


def _key(name: bytes) -> int:
    """Return the hash of a name, with room below it for a place."""
    return (hash(name) & _HASHES) << _PLACE_BITS
