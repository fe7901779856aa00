"""The names in one directory, packed: a directory may have millions, and several are kept."""

from __future__ import annotations

from array import array
from bisect import bisect_left
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from blocksnap.repository.errors import DamagedObjectError
from blocksnap.repository.listings import DirectoryEntry

_ROW_BYTES = 29
"""Of each name beside its own bytes: end, inode, kind, hash, place."""


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
        hashes = array("q")
        for entry in entries:
            text += entry.name
            self._ends.append(len(text))
            self._inodes.append(entry.inode)
            kinds.append(entry.kind)
            hashes.append(hash(entry.name))
        self._text, self._kinds = bytes(text), bytes(kinds)
        self._places = array("I", sorted(range(len(hashes)), key=hashes.__getitem__))
        self._hashes = array("q", map(hashes.__getitem__, self._places))
        self._require_distinct(where)

    def __len__(self) -> int:
        return len(self._ends)

    def __iter__(self) -> Iterator[Name]:
        return map(self._at, range(len(self)))

    @property
    def held_bytes(self) -> int:
        """How much memory it takes, nearly."""
        return len(self._text) + len(self) * _ROW_BYTES

    def find(self, name: bytes) -> Name | None:
        """Return what a name leads to, if it is there."""
        wanted = hash(name)
        at = bisect_left(self._hashes, wanted)
        while at < len(self) and self._hashes[at] == wanted:
            found = self._at(self._places[at])
            if found.name == name:
                return found
            at += 1
        return None

    def _at(self, place: int) -> Name:
        begin = self._ends[place - 1] if place else 0
        return Name(self._text[begin : self._ends[place]], self._inodes[place], self._kinds[place])

    def _require_distinct(self, where: str) -> None:
        same: set[bytes] = set()
        for at, (one, other) in enumerate(zip(self._hashes, self._hashes[1:], strict=False)):
            if one != other:
                same.clear()
                continue
            same.add(self._at(self._places[at]).name)
            if self._at(self._places[at + 1]).name in same:
                raise DamagedObjectError(where, "a directory has the same name twice")
