"""From what an engine says of an inode to what the repository keeps of it, and back."""

from __future__ import annotations

import os
import tempfile
from array import array
from collections.abc import Iterator, Mapping, Sequence

from blocksnap.extents.btrfs_changes import Attributes, Entry, EntryKind, InodeChange, RememberedInode
from blocksnap.extents.btrfs_records import read_listing, write_listing
from blocksnap.repository.blockmap import HOLE, MapRoot
from blocksnap.repository.inode_map import BlobStore, InodeReader, store_listing, store_value
from blocksnap.repository.inodes import PAGE_INODES, InodeRecord, decode_page, encode_page, encode_xattrs
from blocksnap.repository.listings import DirectoryEntry

_KINDS: tuple[EntryKind, ...] = (
    "unknown", "file", "directory", "character", "block", "fifo", "socket", "symlink", "subvolume",
)  # fmt: skip
_MEMORY_BYTES = 16 << 20


def make_record(store: BlobStore, change: InodeChange, content: MapRoot = MapRoot(0, HOLE)) -> InodeRecord:  # noqa: B008 - immutable
    """Return the record of an inode, with what is long of it stored."""
    found: Attributes = change.attributes
    if change.is_directory:
        entries = (
            DirectoryEntry(entry.name, entry.inode, _KINDS.index(entry.kind), entry.index)
            for entry in (read_listing(change.state) if change.state else ())
        )
        detail = store_listing(store, entries)
    else:
        detail = store_value(store, change.state if change.is_file else change.target)
    return InodeRecord(
        number=change.number,
        generation=change.generation,
        mode=found.mode,
        uid=found.uid,
        gid=found.gid,
        nlink=found.nlink,
        flags=found.flags,
        size=found.size,
        device=(os.major(found.rdev), os.minor(found.rdev)),
        mtime=found.mtime,
        atime=found.atime,
        ctime=found.ctime,
        otime=found.otime,
        xattrs=store_value(store, encode_xattrs(change.xattrs)),
        detail=detail,
        content=content,
    )


class ParentMemory:
    """What the parent backup remembers of inodes (extents.InodeMemory)."""

    def __init__(self, reader: InodeReader) -> None:
        self._reader = reader

    def recall(self, numbers: Sequence[int]) -> Mapping[int, RememberedInode]:
        """Return what is known of some inodes; raises DamageError."""
        found = ((number, self._reader.find(number)) for number in numbers)
        return {number: self._remembered(record) for number, record in found if record is not None}

    def _remembered(self, record: InodeRecord) -> RememberedInode:
        state: bytes | None = None
        if record.is_directory:
            listed = self._reader.listing(record)
            state = write_listing(Entry(e.name, e.inode, _KINDS[e.kind], e.index) for e in listed)
        elif record.is_file:
            state = self._reader.value(record.detail) or None
        return RememberedInode(record.generation, record.size, state, record.ctime)


class RecordShelf:
    """Records that have to wait for others, ascending; in a file without a name when there are many."""

    def __init__(self) -> None:
        self._file = tempfile.SpooledTemporaryFile(_MEMORY_BYTES)  # noqa: SIM115 - closed by close
        self._numbers, self._lengths = array("Q"), array("Q")

    def add(self, record: InodeRecord) -> None:
        """Take one."""
        packed = encode_page([record])
        self._numbers.append(record.number)
        self._lengths.append(len(packed))
        self._file.write(packed)

    def __iter__(self) -> Iterator[InodeRecord]:
        self._file.seek(0)
        for number, length in zip(self._numbers, self._lengths, strict=True):
            yield decode_page(self._file.read(length), number // PAGE_INODES, "a record of this run")[0]

    def close(self) -> None:
        """Forget them."""
        self._file.close()
