"""The map of a subvolume: from inode number to inode record, sixteen records a page.

Written in ascending order from the parent's map, in memory that does not depend on how many inodes there
are; only pages in which something changed are read and stored, so an incremental backup stores its touched
inodes and the paths to them.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby
from typing import Protocol

from blocksnap.errors import DamageError
from blocksnap.repository.blockmap import FANOUT, HOLE, Entry, MapReader, MapRoot, MapWriter
from blocksnap.repository.errors import DamagedObjectError
from blocksnap.repository.frame import FrameType
from blocksnap.repository.inodes import (
    BLOCK_BYTES,
    LISTING_SPAN,
    LONGEST_INLINE,
    PAGE_INODES,
    InodeRecord,
    Value,
    decode_page,
    encode_page,
    levels_of,
)
from blocksnap.repository.listings import DirectoryEntry, decode_listing, encode_listing, require_distinct

_ID = 32
_CACHED_PAGES = 512
_INODES = "the map of inodes"
_MOST_HOLES = 2 * (FANOUT - 1)
"""In a row, for each level of a map of which every node leads to something."""


@dataclass(frozen=True, slots=True)
class InodeMap:
    """A map of inodes: its root, the pages it has room for, how many inodes, and the bytes of all files."""

    root: MapRoot
    pages: int
    count: int
    file_bytes: int


class BlobSource(Protocol):
    """Where blobs come from: a repository."""

    def load(self, kind: FrameType, id_: bytes) -> bytes:
        """Return a blob; raises DamageError."""
        ...


class BlobStore(Protocol):
    """Where blobs go: a writer of a repository."""

    def store_blob(self, kind: FrameType, plain: bytes) -> bytes:
        """Store a blob unless it is there already, and return its id."""
        ...


class InodeReader:
    """Reads the inodes of one backup; keeps recently used pages. Raises DamageError."""

    def __init__(self, source: BlobSource, found: InodeMap) -> None:
        self._source = source
        self._map = found
        self.maps = MapReader(lambda id_: source.load(FrameType.NODE, id_))
        self._pages: OrderedDict[int, dict[int, InodeRecord]] = OrderedDict()

    def find(self, number: int) -> InodeRecord | None:
        """Return the record of an inode, if there is one."""
        return self.page(number // PAGE_INODES).get(number)

    def page(self, number: int) -> dict[int, InodeRecord]:
        """Return the records of a page by their numbers."""
        found = self._pages.get(number)
        if found is None:
            entry = self.maps.entry(self._map.root, number) if number < self._map.pages else HOLE
            found = self._pages[number] = {record.number: record for record in self._decode(number, entry)}
            if len(self._pages) > _CACHED_PAGES:
                self._pages.popitem(last=False)
        else:
            self._pages.move_to_end(number)
        return found

    def pages(self, on_damage: Callable[[int, int, DamageError], None]) -> Iterator[int]:
        """Yield the numbers of the pages there are, ascending; what is lost is told as ranges of them."""
        for number, _ in _ids(self.maps, self._map.root, self._map.pages, _INODES, on_damage):
            yield number

    def records(self) -> Iterator[InodeRecord]:
        """Yield all records in ascending order, and no more than the manifest says there are."""
        left = self._map.count
        for number, entry in _ids(self.maps, self._map.root, self._map.pages, _INODES):
            records = self._decode(number, entry)
            left -= len(records)
            if left < 0:
                raise DamagedObjectError(_INODES, f"it has more than {self._map.count}")
            yield from records

    def value(self, value: Value) -> bytes:
        """Return the bytes of a value that is no listing."""
        if value.is_inline:
            return value.inline
        blocks, length = [], 0
        if value.places != -(-value.length // BLOCK_BYTES):
            fault = f"{value.length} bytes in {value.places} blocks"
            raise DamagedObjectError("a value of an inode record", fault)
        for number, count, entry in self.maps.runs(value.root, 0, value.places):
            block = self._source.load(FrameType.ATTACHMENT, entry) if len(entry) == _ID else b""
            length += len(block)
            expected = BLOCK_BYTES if number + 1 < value.places else value.length - number * BLOCK_BYTES
            if count != 1 or len(block) != expected:
                break
            blocks.append(block)
        if length != value.length:
            raise DamagedObjectError("a value of an inode record", f"it has {length} bytes")
        return b"".join(blocks)

    def listing(self, record: InodeRecord) -> list[DirectoryEntry]:
        """Return the names in a directory, ascending by index; no two are the same."""
        where = f"directory {record.number}"
        return require_distinct(self.names(record), where)

    def names(self, record: InodeRecord) -> Iterator[DirectoryEntry]:
        """Yield the names in a directory, ascending by index, without holding them; some may be the same."""
        return self._listed(record.detail, f"directory {record.number}")

    def _listed(self, value: Value, where: str) -> Iterator[DirectoryEntry]:
        if value.is_inline:
            if value.length:
                yield from decode_listing(value.inline, where)
            return
        for number, entry in _ids(self.maps, value.root, value.places, where):
            at = -1
            for found in decode_listing(self._source.load(FrameType.ATTACHMENT, entry), where):
                at = found.index // LISTING_SPAN
                if at != number:
                    raise DamagedObjectError(where, f"{found.name!r} is in the wrong place")
                yield found
            if at < 0:
                raise DamagedObjectError(where, "its listing has a block without names")

    def _decode(self, number: int, entry: Entry) -> list[InodeRecord]:
        if len(entry) != _ID:
            return []
        plain = self._source.load(FrameType.INODES, entry)
        return decode_page(plain, number, f"inode records {entry.hex()[:16]}")


def _ids(
    maps: MapReader,
    root: MapRoot,
    places: int,
    where: str,
    on_damage: Callable[[int, int, DamageError], None] | None = None,
) -> Iterator[tuple[int, bytes]]:
    """Yield what a map without zeros leads to, ascending.

    A node that leads to nothing, which is never stored, could stand in the place of any number of others.
    Raises DamagedObjectError where there is one, and, without ``on_damage``, what loading nodes raises.
    """
    empty, most = 0, _MOST_HOLES * root.levels + 1

    def lose(begin: int, end: int, err: DamageError) -> None:
        nonlocal empty
        if on_damage is None:
            raise err
        empty = 0
        on_damage(begin, end, err)

    for number, _, entry in maps.runs(root, 0, places, lose):
        if len(entry) == _ID:
            empty = 0
            yield number, entry
            continue
        empty += 1
        if empty > most:
            raise DamagedObjectError(where, "it has nodes that lead to nothing")


def store_value(store: BlobStore, data: bytes) -> Value:
    """Return bytes as a value of a record, what is long stored in blocks."""
    if len(data) <= LONGEST_INLINE:
        return Value.short(data)
    blocks = (data[at : at + BLOCK_BYTES] for at in range(0, len(data), BLOCK_BYTES))
    places = -(-len(data) // BLOCK_BYTES)
    entries = ((number, store.store_blob(FrameType.ATTACHMENT, block)) for number, block in enumerate(blocks))
    return Value(len(data), b"", places, store_map(store, entries, places))


def store_listing(store: BlobStore, entries: Iterable[DirectoryEntry]) -> Value:
    """Return the names of a directory, ascending by index, as a value of its record.

    A block of a long one holds the names of a fixed range of indexes: one name changes one.
    """
    listed = list(entries)
    whole = encode_listing(listed)
    if len(whole) <= LONGEST_INLINE:
        return Value.short(whole)
    places = listed[-1].index // LISTING_SPAN + 1
    blocks = (
        (number, store.store_blob(FrameType.ATTACHMENT, encode_listing(group)))
        for number, group in groupby(listed, key=lambda entry: entry.index // LISTING_SPAN)
    )
    return Value(len(whole), b"", places, store_map(store, blocks, places))


def store_map(store: BlobStore, entries: Iterable[tuple[int, Entry]], places: int) -> MapRoot:
    """Store a map, as a record refers to one, of entries in ascending order; what is left out is a hole."""
    if places <= 1:
        return MapRoot(0, next((entry for _, entry in entries), HOLE))
    builder = MapWriter(MapReader(_load_nothing), None, places, _node_store(store))
    for number, entry in entries:
        builder.set(number, entry)
    return builder.finish()


class ContentWriter:
    """Builds the map of a file's chunks from that of the parent's file, in ascending order."""

    def __init__(self, reader: MapReader, store: BlobStore, parent: MapRoot | None, places: int) -> None:
        self._entry: Entry = HOLE
        self._builder: MapWriter | None = None
        if places > 1:
            self._builder = MapWriter(reader, parent, places, _node_store(store))
        elif places and parent is not None:
            self._entry = reader.entry(parent, 0)

    def set(self, number: int, entry: Entry) -> bool:
        """Set one chunk; tell whether that differs from the parent."""
        if self._builder is not None:
            return self._builder.set(number, entry)
        differs, self._entry = self._entry != entry, entry
        return differs

    def fill(self, begin: int, end: int) -> None:
        """Make holes of the chunks ``[begin, end)``."""
        if self._builder is not None:
            self._builder.fill(begin, end, HOLE)
        elif begin < end:
            self._entry = HOLE

    def finish(self) -> MapRoot:
        """Store what is open and return the map."""
        return self._builder.finish() if self._builder is not None else MapRoot(0, self._entry)


class InodeMapWriter:
    """Builds a map of inodes from the parent's, if there is one, out of what changed in it.

    ``reader`` reads the parent. Changes come in ascending order of inode numbers, each once.
    """

    def __init__(self, store: BlobStore, reader: InodeReader | None, parent: InodeMap | None) -> None:
        self._store = store
        self._reader = reader
        self._maps = reader.maps if reader is not None else MapReader(_load_nothing)
        self._parent = parent or InodeMap(MapRoot(1, HOLE), 1, 0, 0)
        self._pages = self._parent.pages
        self._builder = self._new_builder(self._parent.root)
        self._count, self._file_bytes = self._parent.count, self._parent.file_bytes
        self._open = -1
        self._records: dict[int, InodeRecord] = {}

    def put(self, record: InodeRecord) -> None:
        """Take a new or changed inode."""
        self._enter(record.number)
        self._forget(record.number)
        self._records[record.number] = record
        self._count += 1
        self._file_bytes += _file_bytes(record)

    def remove(self, number: int) -> None:
        """Leave an inode out that the parent may have."""
        self._enter(number)
        self._forget(number)

    def finish(self) -> InodeMap:
        """Store what is open and return the map."""
        self._close()
        return InodeMap(self._builder.finish(), self._pages, self._count, self._file_bytes)

    def _forget(self, number: int) -> None:
        before = self._records.pop(number, None)
        if before is not None:
            self._count -= 1
            self._file_bytes -= _file_bytes(before)

    def _enter(self, number: int) -> None:
        page = number // PAGE_INODES
        if page == self._open:
            return
        if page < self._open:
            raise ValueError(f"inode {number} comes after page {self._open}")
        self._close()
        self._open = page
        self._records = dict(self._reader.page(page)) if self._reader is not None else {}

    def _close(self) -> None:
        if self._open < 0:
            return
        entry = HOLE
        if self._records:
            plain = encode_page(record for _, record in sorted(self._records.items()))
            entry = self._store.store_blob(FrameType.INODES, plain)
        if self._open >= self._pages:
            self._grow(self._open + 1)
        self._builder.set(self._open, entry)

    def _grow(self, pages: int) -> None:
        """Make room; levels are added above, and what stands below is not looked at again."""
        levels = levels_of(pages)
        self._pages = pages
        if levels > self._builder_levels:
            self._builder = self._new_builder(self._builder.finish())

    def _new_builder(self, root: MapRoot) -> MapWriter:
        self._builder_levels = max(levels_of(self._pages), 1)
        room = FANOUT**self._builder_levels
        return MapWriter(self._maps, root, room, _node_store(self._store))


def _file_bytes(record: InodeRecord) -> int:
    return record.size if record.is_file else 0


def _node_store(store: BlobStore) -> Callable[[bytes], bytes]:
    return lambda plain: store.store_blob(FrameType.NODE, plain)


def _load_nothing(id_: bytes) -> bytes:
    raise DamagedObjectError(f"map node {id_.hex()[:16]}", "it is not to be read here")
