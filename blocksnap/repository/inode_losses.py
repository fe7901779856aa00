"""Where in a subvolume's backup something is lost: which inodes, and which bytes of files."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator
from typing import NamedTuple

from blocksnap.errors import DamageError
from blocksnap.repository.blockmap import MapReader, MapRoot
from blocksnap.repository.inodes import PAGE_INODES, InodeRecord, decode_page

_ID = 32


class InodeRange(NamedTuple):
    """Bytes of a file, or, without a length, the inode's record or something that it refers to."""

    inode: int
    offset: int
    length: int


class InodeLosses:
    """Finds what of many backups is ``bad`` or below something that is, or that cannot be read.

    ``load`` returns a page of inode records by its id, or raises DamageError. Pages in which nothing is lost
    are remembered, so that the next backup that shares them costs nothing.
    """

    def __init__(
        self, reader: MapReader, load: Callable[[bytes], bytes | memoryview], bad: Container[bytes]
    ) -> None:
        self._reader = reader
        self._load = load
        self._bad = bad
        self._clean: set[bytes] = set()
        self._clean_nodes: set[bytes] = set()

    def find(self, root: MapRoot, pages: int, chunk_size: int) -> Iterator[InodeRange]:
        """Yield what is lost of one backup, ascending; of a lost page the first inode it could have."""
        unreadable: list[tuple[int, int]] = []

        def note(begin: int, end: int, _: DamageError) -> None:
            unreadable.append((begin, end))

        for number, _, entry in self._reader.runs(root, 0, pages, note):
            for begin, _end in unreadable:
                yield InodeRange(begin * PAGE_INODES, 0, 0)
            unreadable.clear()
            if len(entry) == _ID and entry not in self._clean:
                yield from self._of_page(number, entry, chunk_size)

    def _of_page(self, number: int, entry: bytes, chunk_size: int) -> Iterator[InodeRange]:
        if entry in self._bad:
            yield InodeRange(number * PAGE_INODES, 0, 0)
            return
        try:
            records = decode_page(self._load(entry), number, f"inode records {entry.hex()[:16]}")
        except DamageError:
            yield InodeRange(number * PAGE_INODES, 0, 0)
            return
        is_clean = True
        for record in records:
            for lost in self._of_record(record, chunk_size):
                is_clean = False
                yield lost
        if is_clean:
            self._clean.add(entry)

    def _of_record(self, record: InodeRecord, chunk_size: int) -> Iterator[InodeRange]:
        for value in (record.xattrs, record.detail):
            if next(self._lost_in(value.root, value.places), None):
                yield InodeRange(record.number, 0, 0)
                break
        begin = end = -1
        for first, last in self._lost_in(record.content, -(-record.size // chunk_size)):
            if first != end:
                if end > begin:
                    yield _bytes(record, begin, end, chunk_size)
                begin = first
            end = last
        if end > begin:
            yield _bytes(record, begin, end, chunk_size)

    def _lost_in(self, root: MapRoot, count: int) -> Iterator[tuple[int, int]]:
        return self._reader.losses(root, count, self._bad, self._clean_nodes)


def _bytes(record: InodeRecord, begin: int, end: int, chunk_size: int) -> InodeRange:
    offset = begin * chunk_size
    return InodeRange(record.number, offset, min(end * chunk_size, record.size) - offset)
