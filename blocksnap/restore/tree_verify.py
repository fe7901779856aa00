"""Read a restored tree back and compare every file with the ids of its chunks."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator

from blocksnap.errors import TargetError
from blocksnap.repository.frame import FrameType
from blocksnap.repository.inode_map import InodeReader
from blocksnap.repository.inodes import InodeRecord
from blocksnap.repository.keys import KeyRing
from blocksnap.repository.listings import SUBVOLUME, DirectoryEntry
from blocksnap.restore.descent import Descent
from blocksnap.restore.naming import printable

_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_FILE = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
_ID = 32
_READ_BYTES = 1 << 20
_TOP = 256


class FileDiffersError(TargetError):
    """A restored file is not what was stored."""

    def __init__(self, path: str, offset: int) -> None:
        self.path, self.offset = path, offset
        super().__init__(
            f"{path} differs from the backup at byte {offset}: the storage does not hold what was written",
            resolution="look in the kernel log (dmesg), and restore to other storage",
        )


def verify_tree(
    reader: InodeReader, keys: KeyRing, top_fd: int, chunk_size: int, progress: Callable[[int], None]
) -> None:
    """Compare the content of every file; raises FileDiffersError, DamageError, OSError."""
    descent, stack, path = Descent(os.dup(top_fd)), [_names(reader, reader.find(_TOP))], b""
    try:
        while True:
            entry = next(stack[-1], None)
            if entry is None:
                stack.pop()
                if not stack:
                    return
                descent.leave()
                path = path.rpartition(b"/")[0]
                continue
            found = reader.find(entry.inode) if entry.kind != SUBVOLUME else None
            here = path + b"/" + entry.name if path else entry.name
            if found is not None and found.is_directory:
                descent.enter(os.open(entry.name, _FOLDER, dir_fd=descent.fd))
                stack.append(_names(reader, found))
                path = here
            elif found is not None and found.is_file:
                fd = os.open(entry.name, _FILE, dir_fd=descent.fd)
                try:
                    _verify_file(fd, printable(here), found, reader, keys, chunk_size, progress)
                finally:
                    os.close(fd)
    finally:
        descent.close()


def _names(reader: InodeReader, folder: InodeRecord | None) -> Iterator[DirectoryEntry]:
    return iter(reader.listing(folder) if folder is not None else ())


def _verify_file(
    fd: int,
    path: str,
    record: InodeRecord,
    reader: InodeReader,
    keys: KeyRing,
    chunk_size: int,
    progress: Callable[[int], None],
) -> None:
    # What is durable is read from the storage and not from memory.
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    if os.fstat(fd).st_size != record.size:
        raise FileDiffersError(path, min(os.fstat(fd).st_size, record.size))
    for number, count, entry in reader.maps.runs(record.content, 0, -(-record.size // chunk_size)):
        offset = number * chunk_size
        length = min(count * chunk_size, record.size - offset)
        if len(entry) != _ID:
            _require_zeros(fd, path, offset, offset + length)
        else:
            data = os.pread(fd, length, offset)
            if keys.identify(FrameType.DATA, data) != entry:
                raise FileDiffersError(path, offset)
        progress(length)


def _require_zeros(fd: int, path: str, begin: int, end: int) -> None:
    """Read what is no hole of a range that should read as zeros."""
    while begin < end:
        try:
            at = os.lseek(fd, begin, os.SEEK_DATA)
        except OSError as err:
            if err.errno != errno.ENXIO:
                raise
            return
        data = os.pread(fd, min(_READ_BYTES, end - at), at) if at < end else b""
        if any(data):
            raise FileDiffersError(path, at)
        begin = at + max(len(data), 1)
