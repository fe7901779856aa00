"""Look into the backup of a subvolume: records found by paths, from the map of inodes, as they are asked for.

What is kept is bounded, however many inodes there are: pages of records, nodes of maps, names of directories.
What the records say is believed no more than by a restore (``restore.tree``): no name leads outside, and no
directory is found in two places (``restore.tree_places``), so not below itself either.
"""

from __future__ import annotations

import errno
import os
import stat
import threading
from collections import OrderedDict

from blocksnap.errors import DamageError
from blocksnap.pipeline.flow import Geometry
from blocksnap.repository.errors import DamagedObjectError
from blocksnap.repository.inode_map import BlobSource, InodeMap, InodeReader
from blocksnap.repository.inodes import InodeRecord, levels_of
from blocksnap.repository.listings import SUBVOLUME
from blocksnap.restore.inode_values import link_target, state_of, xattrs_of
from blocksnap.restore.naming import printable
from blocksnap.restore.tree import ENTRY_KINDS, TOP
from blocksnap.restore.tree_layout import room_of
from blocksnap.restore.tree_names import Name, Names
from blocksnap.restore.tree_places import Places

STUB = 2
"""Inode number of the empty directory in the place of a nested subvolume, as the kernel shows one in a
snapshot (BTRFS_EMPTY_SUBVOL_DIR_OBJECTID)."""
_KEPT_FOLDERS = 4096
_KEPT_PATHS_BYTES = 8 << 20
"""Of their paths, which are long where directories are deep."""
_KEPT_NAMES_BYTES = 8 << 20
_KEPT_ROOMS = 8192
_BLOCK, _SECTOR = 4096, 512


class TreeView:
    """One backup, for several threads. Raises DamageError, PlacesFailedError, and what finding a path raises.

    ``places`` is for all backups that are looked at together, of which this is number ``ordinal``.
    """

    def __init__(
        self,
        source: BlobSource,
        inodes: InodeMap,
        chunk_size: int,
        taken_ns: int,
        places: Places,
        ordinal: int = 0,
    ) -> None:
        self._reader = InodeReader(source, inodes)
        self._places, self._ordinal = places, ordinal
        self._chunk_size = chunk_size
        self._taken = taken_ns
        self._lock = threading.RLock()
        self._folders: OrderedDict[bytes, InodeRecord] = OrderedDict()
        self._paths_bytes = 0
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
                return self._folder(b"")
            return self._below(self._folder(above), name, path)

    def child(self, found: Name, path: bytes) -> InodeRecord:
        """Return the inode of a name in a directory that was found, by its path: a directory has one."""
        with self._lock:
            record = self._record(found, path)
            is_folder = record.is_directory and found.kind != SUBVOLUME
            if is_folder and not self._places.is_its_own(self._ordinal, record.number, path):
                raise DamagedObjectError(printable(path), f"directory {record.number} is in two places")
            return record

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
            return link_target(self._reader, link)

    def xattrs(self, record: InodeRecord) -> dict[bytes, bytes]:
        """Return extended attributes by their names."""
        with self._lock:
            return dict(xattrs_of(self._reader, record))

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
                state = state_of(self._reader, file)
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

    def _folder(self, path: bytes) -> InodeRecord:
        """Return a directory, found through all above it."""
        ends = [len(path)]
        while (above := self._folders.get(path[: ends[-1]])) is None and ends[-1]:
            ends.append(max(path.rfind(b"/", 0, ends[-1]), 0))
        if above is None:
            above = self._top()
        self._folders.move_to_end(path[: ends.pop()])
        for end in reversed(ends):
            at = path[:end]
            record = self._below(above, at.rpartition(b"/")[2], at)
            if not record.is_directory:
                raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), printable(at))
            above = self._keep(at, record)
        return above

    def _top(self) -> InodeRecord:
        top = self._reader.find(TOP)
        if top is None or not top.is_directory:
            raise DamagedObjectError("the top directory", "it is no directory")
        self._places.is_its_own(self._ordinal, TOP, b"")
        return self._keep(b"", top)

    def _keep(self, path: bytes, found: InodeRecord) -> InodeRecord:
        self._folders[path] = found
        self._paths_bytes += len(path)
        while len(self._folders) > _KEPT_FOLDERS or self._paths_bytes > _KEPT_PATHS_BYTES:
            self._paths_bytes -= len(self._folders.popitem(last=False)[0])
        return found

    def _below(self, folder: InodeRecord, name: bytes, path: bytes) -> InodeRecord:
        """Return what a name in a directory leads to, and the path."""
        found = self.names(folder).find(name)
        if found is None:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), printable(path))
        return self.child(found, path)

    def _record(self, found: Name, path: bytes) -> InodeRecord:
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
        return record


def blocks_of(room: int) -> int:
    """Return bytes in the unit of st_blocks, by whole blocks."""
    return -(-room // _BLOCK) * _BLOCK // _SECTOR
