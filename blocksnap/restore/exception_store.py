"""The exception store of an instant restore on its volume: its size, empty at first, and taken up again.

    chunk 0      "SnAp", then as le32: whether it is valid, the version (1), the sectors of a chunk
    chunk 1      an area: pairs of le64, a chunk of the volume and the chunk of the store that has it, which
                 is never 0; the list ends at the first pair of zeros
    chunk 2...   what the area tells of; the next area is the 257th chunk after it

Source: drivers/md/dm-snap-persistent.c.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from itertools import islice

from blocksnap.errors import TargetError
from blocksnap.system import blockdev

_SECTOR = 512
CHUNK_SECTORS = 8
"""A block of most filesystems, so that a write of one copies nothing."""
_CHUNK = CHUNK_SECTORS * _SECTOR
_EXCEPTION = struct.Struct("<QQ")
_AREA_EXCEPTIONS = _CHUNK // _EXCEPTION.size
_HEADER = struct.Struct("<4sIII")
_MAGIC = b"SnAp"
_SPARE_BYTES = 1 << 20
_ZEROED_BYTES = 64 << 10


class StoreUnreadableError(TargetError):
    """The volume that has what was written meanwhile cannot be read, or written to."""

    def __init__(self, store: str, err: OSError) -> None:
        self.store = store
        self.errno = err.errno
        super().__init__(
            f"{store}, which has what was written meanwhile, fails: {os.strerror(err.errno or 0)}",
            resolution="see dmesg for why, mend that, and run the same command again; nothing was changed",
        )


def store_bytes(volume_bytes: int) -> int:
    """Return how large a store has to be that takes every chunk of a volume."""
    lists = -(-volume_bytes // _CHUNK) * _EXCEPTION.size
    return volume_bytes + lists + _SPARE_BYTES


def empty_store(node: str) -> None:
    """Make sure that nothing of what a volume held before is taken for the list of a store."""
    try:
        fd = os.open(node, os.O_WRONLY | os.O_CLOEXEC)
        try:
            os.pwrite(fd, bytes(_ZEROED_BYTES), 0)
            os.fsync(fd)
        finally:
            os.close(fd)
    except OSError as err:
        raise StoreUnreadableError(node, err) from err


def take_up_store(node: str) -> bool:
    """Have the kernel take a store again that it has called invalid; tell whether it had. Nobody may use it.

    When a write to a store fails the kernel gives all of it up, because an ordinary origin goes on changing
    without it. What lies below ours never changes, and a write is acknowledged when it is in the list and
    durable: so what the list says is all right, and only the mark is not. What was being added to the list
    when it failed was acknowledged to nobody, and may be in it in part: what follows its end is cleared,
    since the kernel would add to it and bring that back.

    Raises StoreUnreadableError.
    """
    try:
        fd = os.open(node, os.O_RDWR | os.O_CLOEXEC)
        try:
            # The kernel reads and writes it past the page cache.
            blockdev.drop_cache(fd)
            magic, valid, version, sectors = _HEADER.unpack(os.pread(fd, _HEADER.size, 0))
            if magic != _MAGIC or sectors != CHUNK_SECTORS:
                return False
            # Also where the mark could not be written.
            _end_list(fd)
            if valid:
                return False
            os.pwrite(fd, _HEADER.pack(magic, 1, version, sectors), 0)
            os.fsync(fd)
        finally:
            os.close(fd)
    except OSError as err:
        raise StoreUnreadableError(node, err) from err
    return True


def is_nearly_full(node: str) -> bool:
    """Tell by its list whether a store has hardly any room left; raises StoreUnreadableError.

    That it was full is forgotten with the device that said so. (dm-snap-persistent.c, read_exceptions: what
    is added goes behind the last chunk that the list names.)
    """
    try:
        fd = os.open(node, os.O_RDONLY | os.O_CLOEXEC)
        try:
            blockdev.drop_cache(fd)
            if os.pread(fd, len(_MAGIC), 0) != _MAGIC:
                return False
            last = 1
            for _, area, end in _areas(fd):
                last = max([last, *(place for _, place in islice(_EXCEPTION.iter_unpack(area), end))])
            return os.lseek(fd, 0, os.SEEK_END) - (last + 1) * _CHUNK < _SPARE_BYTES
        finally:
            os.close(fd)
    except OSError as err:
        raise StoreUnreadableError(node, err) from err


def _areas(fd: int) -> Iterator[tuple[int, bytes, int]]:
    """Yield the areas of the list: where each is, its bytes, and how many of its exceptions count."""
    offset, end = _CHUNK, _AREA_EXCEPTIONS
    while end == _AREA_EXCEPTIONS and len(area := os.pread(fd, _CHUNK, offset)) == _CHUNK:
        places = (place for _, place in _EXCEPTION.iter_unpack(area))
        end = next((n for n, place in enumerate(places) if not place), _AREA_EXCEPTIONS)
        yield offset, area, end
        offset += (1 + _AREA_EXCEPTIONS) * _CHUNK


def _end_list(fd: int) -> None:
    for offset, area, end in _areas(fd):
        if any(area[end * _EXCEPTION.size :]):
            os.pwrite(fd, area[: end * _EXCEPTION.size].ljust(_CHUNK, b"\0"), offset)
            os.fsync(fd)
