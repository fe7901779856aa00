"""Where in a subvolume's backup something is lost: which inodes, and which bytes of files."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator
from typing import NamedTuple

from blocksnap.errors import DamageError
from blocksnap.repository.blockmap import FANOUT, Entry, MapReader, MapRoot
from blocksnap.repository.errors import NewerFormatError
from blocksnap.repository.inodes import PAGE_INODES, InodeRecord, decode_page
from blocksnap.repository.map_losses import MapLosses

_ID = 32


class InodeRange(NamedTuple):
    """Bytes of a file, or, without a length, the inode's record or something that it refers to."""

    inode: int
    offset: int
    length: int


class _Sum(NamedTuple):
    """How many ranges, and how many bytes of files are in them."""

    ranges: int = 0
    size_bytes: int = 0


_NOTHING = _Sum()
_A_RECORD = _Sum(1)


class InodeLosses:
    """Finds what of many backups, of one ``chunk_size``, is ``lost``, below something that is, or unreadable.

    ``load`` returns a page of inode records by its id, or raises DamageError. What is lost of a page, and
    below a node, is reckoned once, wherever it stands.
    """

    def __init__(
        self,
        reader: MapReader,
        load: Callable[[bytes], bytes | memoryview],
        lost: Container[bytes],
        chunk_size: int,
    ) -> None:
        self.chunk_size = chunk_size
        self._reader = reader
        self._load = load
        self._lost = lost
        self._maps = MapLosses(reader, lost, lost)
        self._known: dict[int, dict[Entry, _Sum]] = {}

    def measure(self, root: MapRoot, pages: int) -> tuple[int, int]:
        """Return how many ranges ``find`` would yield, and the sum of their lengths."""
        return self._measure(root.entry, root.levels, 0, pages)

    def find(self, root: MapRoot, pages: int) -> Iterator[InodeRange]:
        """Yield what is lost of one backup, ascending; of a lost page the first inode it could have."""
        return self._find(root.entry, root.levels, 0, pages)

    def _measure(self, entry: Entry, level: int, at: int, pages: int) -> _Sum:
        if at >= pages or len(entry) != _ID:
            return _NOTHING
        known = self._known.setdefault(level, {}) if at + FANOUT**level <= pages else None
        if known is not None and (found := known.get(entry)) is not None:
            return found
        below = self._below(entry, level)
        if below is None:
            found = _A_RECORD
        elif not level:
            found = self._measure_page(entry)
        else:
            span = FANOUT ** (level - 1)
            parts = [self._measure(child, level - 1, at + n * span, pages) for n, child in enumerate(below)]
            found = _summed(parts)
        if known is not None:
            known[entry] = found
        return found

    def _find(self, entry: Entry, level: int, at: int, pages: int) -> Iterator[InodeRange]:
        if not self._measure(entry, level, at, pages).ranges:
            return
        below = self._below(entry, level)
        if below is None:
            yield InodeRange(at * PAGE_INODES, 0, 0)
        elif not level:
            yield from self._of_page(at, entry)
        else:
            span = FANOUT ** (level - 1)
            for slot, child in enumerate(below):
                yield from self._find(child, level - 1, at + slot * span, pages)

    def _below(self, entry: Entry, level: int) -> list[Entry] | None:
        """Return the entries of a node, none of a page; None for what is lost."""
        if entry in self._lost:
            return None
        try:
            return self._reader.node(entry, level - 1) if level else []
        except DamageError:
            return None
        except NewerFormatError:
            return []

    def _records(self, number: int, entry: Entry) -> list[InodeRecord] | None:
        try:
            return decode_page(self._load(entry), number, f"inode records {entry.hex()[:16]}")
        except DamageError:
            return None
        except NewerFormatError:
            return []

    def _measure_page(self, entry: Entry) -> _Sum:
        records = self._records(0, entry)
        return _A_RECORD if records is None else _summed([self._measure_record(each) for each in records])

    def _of_page(self, number: int, entry: Entry) -> Iterator[InodeRange]:
        records = self._records(number, entry)
        if records is None:
            yield InodeRange(number * PAGE_INODES, 0, 0)
        for record in records or ():
            if self._has_lost_value(record):
                yield InodeRange(record.number, 0, 0)
            for begin, end in self._maps.ranges(record.content, 0, self._places(record)):
                offset = begin * self.chunk_size
                length = min(end * self.chunk_size, record.size) - offset
                yield InodeRange(record.number, offset, length)

    def _measure_record(self, record: InodeRecord) -> _Sum:
        found = self._maps.measure(record.content, 0, self._places(record))
        size = found.chunks * self.chunk_size - max(found.end * self.chunk_size - record.size, 0)
        return _Sum(found.ranges + self._has_lost_value(record), size)

    def _has_lost_value(self, record: InodeRecord) -> bool:
        values = (record.xattrs, record.detail)
        return any(self._maps.measure(value.root, 0, value.places).chunks for value in values)

    def _places(self, record: InodeRecord) -> int:
        return -(-record.size // self.chunk_size)


def _summed(parts: list[_Sum]) -> _Sum:
    ranges = sum(part.ranges for part in parts)
    return _Sum(ranges, sum(part.size_bytes for part in parts)) if ranges else _NOTHING
