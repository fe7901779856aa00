"""Look into the backup of a subvolume: records found by paths, from the map of inodes, as they are asked for.

What is kept is bounded, however many inodes there are: pages of records, nodes of maps, names of directories.
What the records say is believed no more than by a restore (``restore.tree``): no name leads outside, and no
directory is found below itself.
"""

from __future__ import annotations

import errno
import os
import stat
import threading
from collections import OrderedDict
from collections.abc import Iterator

from blocksnap.errors import DamageError
from blocksnap.pipeline.flow import Geometry
from blocksnap.repository.errors import DamagedObjectError
from blocksnap.repository.inode_map import BlobSource, InodeMap, InodeReader
from blocksnap.repository.inodes import InodeRecord, Value, decode_xattrs, levels_of
from blocksnap.repository.listings import SUBVOLUME
from blocksnap.restore.naming import printable
from blocksnap.restore.tree import ENTRY_KINDS, TOP
from blocksnap.restore.tree_layout import room_of
from blocksnap.restore.tree_names import Name, Names

STUB = 2
"""Inode number of the empty directory in the place of a nested subvolume, as the kernel shows one in a
snapshot (BTRFS_EMPTY_SUBVOL_DIR_OBJECTID)."""
_KEPT_FOLDERS = 4096
_KEPT_NAMES_BYTES = 8 << 20
_KEPT_ROOMS = 8192
_LONGEST_TARGET = 4095
"""Bytes of a symbolic link's target (PATH_MAX)."""
_LARGEST_VALUE = 64 << 20
"""Bytes of an inode's extended attributes or state: a hostile record says anything, one block can be many."""
_BLOCK, _SECTOR = 4096, 512


class TreeView:
    """One backup, for several threads. Raises DamageError, and what finding a path raises."""

    def __init__(self, source: BlobSource, inodes: InodeMap, chunk_size: int, taken_ns: int) -> None:
        self._reader = InodeReader(source, inodes)
        self._chunk_size = chunk_size
        self._taken = taken_ns
        self._lock = threading.RLock()
        self._folders: OrderedDict[bytes, tuple[InodeRecord, frozenset[int]]] = OrderedDict()
        self._names: OrderedDict[int, Names] = OrderedDict()
        self._names_bytes = 0
        self._rooms: OrderedDict[int, int] = OrderedDict()

    def find(self, path: bytes) -> InodeRecord:
        """Return what a path, without a slash at its ends, leads to, through directories only.

        Raises FileNotFoundError, NotADirectoryError.
        """
        with self._lock:
            above, _, name = path.rpartition(b"/")
            if not name:
                return self._folder(b"")[0]
            folder, ancestors = self._folder(above)
            found = self.names(folder).find(name)
            if found is None:
                raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), printable(path))
            return self._record(found, path, ancestors)

    def child(self, found: Name, path: bytes) -> InodeRecord:
        """Return the inode of a name, whose path is for what there is to say of damage."""
        with self._lock:
            return self._record(found, path, frozenset())

    def names(self, folder: InodeRecord) -> Names:
        """Return the names in a directory; there are none in the place of a nested subvolume."""
        with self._lock:
            if not folder.detail.length:
                # Not kept: a record may have the number of what has none.
                return Names((), f"directory {folder.number}")
            found = self._names.get(folder.number)
            if found is not None:
                self._names.move_to_end(folder.number)
                return found
            found = Names(self._reader.names(folder), f"directory {folder.number}")
            self._names[folder.number] = found
            self._names_bytes += found.held_bytes
            while self._names_bytes > _KEPT_NAMES_BYTES and len(self._names) > 1:
                self._names_bytes -= self._names.popitem(last=False)[1].held_bytes
            return found

    def target(self, link: InodeRecord) -> bytes:
        """Return where a symbolic link leads."""
        with self._lock:
            return self._value(link.detail, _LONGEST_TARGET, f"symbolic link {link.number}")

    def xattrs(self, record: InodeRecord) -> dict[bytes, bytes]:
        """Return extended attributes by their names."""
        with self._lock:
            where = f"inode {record.number}"
            return dict(decode_xattrs(self._value(record.xattrs, _LARGEST_VALUE, where), where))

    def room(self, file: InodeRecord) -> int:
        """Return how much room an inode had for what it holds, in bytes.

        Of a file that is in its layout; where none is known it is its size.
        """
        if not file.is_file:
            return file.size if stat.S_ISLNK(file.mode) else 0
        with self._lock:
            found = self._rooms.get(file.number)
            if found is not None:
                return found
            try:
                state = self._value(file.detail, _LARGEST_VALUE, f"inode {file.number}")
            except DamageError:
                # What it holds can be read all the same.
                state = b""
        # Nobody else waits for it: it takes long where there are a million extents.
        room = room_of(state)
        with self._lock:
            found = self._rooms[file.number] = file.size if room is None else room
            if len(self._rooms) > _KEPT_ROOMS:
                self._rooms.popitem(last=False)
        return found

    def geometry(self, file: InodeRecord) -> Geometry:
        """Return how a file is cut into chunks."""
        geometry = Geometry(file.size, self._chunk_size)
        if file.content.levels != levels_of(geometry.count):
            raise DamagedObjectError(f"inode {file.number}", "its content does not fit its size")
        return geometry

    def _folder(self, path: bytes) -> tuple[InodeRecord, frozenset[int]]:
        """Return a directory, and the numbers of all above it and its own."""
        known = self._folders.get(path)
        if known is not None:
            self._folders.move_to_end(path)
            return known
        at, above = b"", self._top()
        for end in _ends(path):
            at = path[:end]
            below = self._folders.get(at)
            if below is None:
                found = self.names(above[0]).find(at.rpartition(b"/")[2])
                if found is None:
                    raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), printable(at))
                record = self._record(found, at, above[1])
                if not record.is_directory:
                    raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), printable(at))
                below = self._keep(at, record, above[1] | {record.number})
            above = below
        return above

    def _top(self) -> tuple[InodeRecord, frozenset[int]]:
        known = self._folders.get(b"")
        if known is None:
            top = self._reader.find(TOP)
            if top is None or not top.is_directory:
                raise DamagedObjectError("the top directory", "it is no directory")
            known = self._keep(b"", top, frozenset({TOP}))
        return known

    def _keep(
        self, path: bytes, record: InodeRecord, numbers: frozenset[int]
    ) -> tuple[InodeRecord, frozenset[int]]:
        found = self._folders[path] = record, numbers
        if len(self._folders) > _KEPT_FOLDERS:
            self._folders.popitem(last=False)
        return found

    def _record(self, found: Name, path: bytes, ancestors: frozenset[int]) -> InodeRecord:
        if found.kind == SUBVOLUME:
            return InodeRecord(
                STUB, 0, stat.S_IFDIR | 0o755, 0, 0, 1, 0, 0, (0, 0),
                self._taken, self._taken, self._taken, self._taken,
            )  # fmt: skip
        record = self._reader.find(found.inode)
        if record is None:
            raise DamagedObjectError(printable(path), f"there is no inode {found.inode}")
        kind = stat.S_IFMT(record.mode)
        if ENTRY_KINDS.get(found.kind, kind) != kind:
            raise DamagedObjectError(printable(path), "its name and its inode are not of the same kind")
        if record.is_directory and record.number in ancestors:
            raise DamagedObjectError(printable(path), f"directory {record.number} is in two places")
        return record

    def _value(self, value: Value, most: int, where: str) -> bytes:
        if value.length > most:
            raise DamagedObjectError(where, f"{value.length} bytes are more than it can have")
        return self._reader.value(value)


def _ends(path: bytes) -> Iterator[int]:
    """Yield where the names of a path end."""
    at = path.find(b"/")
    while at >= 0:
        yield at
        at = path.find(b"/", at + 1)
    if path:
        yield len(path)


def blocks_of(room: int) -> int:
    """Return bytes in the unit of st_blocks, by whole blocks."""
    return -(-room // _BLOCK) * _BLOCK // _SECTOR
