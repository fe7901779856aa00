# SPDX-License-Identifier: Apache-2.0
"""Exception stores of classic snapshots, built and read in plain Python.

Written from the description of the format (kernel, drivers/md/dm-snap-persistent.c), not from the C core.
"""

from __future__ import annotations

import itertools
import mmap
import os
import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

MAGIC = int.from_bytes(b"SnAp", "little")
ENTRY = struct.Struct("<QQ")
HEADER = struct.Struct("<4I")


def area_chunk(area: int, chunk_size: int) -> int:
    """The chunk of the store in which an area of the list is."""
    return 1 + area * (chunk_size // ENTRY.size + 1)


@dataclass
class CowStore:
    """A store with the chunks of the origin that are in its list, in the order in which they were written.

    ``places`` are the chunks of the store that hold their old content; as the kernel gives them away, if
    none are given. ``stale`` is what is behind the list from earlier use of the device. Only what belongs to
    the list is kept: what was copied lies in holes.
    """

    changed: Sequence[int]
    chunk_size: int = 4096
    chunks: int | None = None
    places: Sequence[int] | None = None
    stale: bytes = b"\0"
    valid: int = 1
    version: int = 1
    magic: int = MAGIC
    size: int = field(init=False)
    _pieces: dict[int, bytearray] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        last = area_chunk(self.areas - 1, self.chunk_size)
        self.size = (self.chunks or last + self.per_area + 1) * self.chunk_size
        self._pieces = {
            0: self._piece(HEADER.pack(self.magic, self.valid, self.version, self.chunk_size // 512))
        }
        for area in range(self.areas):
            self._pieces[area_chunk(area, self.chunk_size)] = self._piece(b"")
        for area in range(self.areas, self.areas + 3):
            self._pieces[area_chunk(area, self.chunk_size)] = self._piece(self.stale * self.chunk_size)
        for index, chunk in enumerate(self.changed):
            self.set_entry(index, chunk, self.place(index))

    @property
    def per_area(self) -> int:
        """Entries of one area."""
        return self.chunk_size // ENTRY.size

    @property
    def areas(self) -> int:
        """Areas up to and with the one in which the list ends: a full one is followed by another."""
        return len(self.changed) // self.per_area + 1

    @property
    def allocated(self) -> int:
        """Chunks below the next free one, as the kernel's status counts them."""
        free = max((self.place(index) + 1 for index in range(len(self.changed))), default=2)
        return free + 1 if free % (self.per_area + 1) == 1 else free

    def place(self, index: int) -> int:
        """The chunk of the store that an entry points to."""
        if self.places is not None:
            return self.places[index]
        return area_chunk(index // self.per_area, self.chunk_size) + 1 + index % self.per_area

    def entry_offset(self, index: int) -> int:
        """Where an entry of the list is on the device."""
        area, slot = divmod(index, self.per_area)
        return area_chunk(area, self.chunk_size) * self.chunk_size + slot * ENTRY.size

    def set_entry(self, index: int, old: int, new: int) -> None:
        """Overwrite one entry of the list."""
        self.put(self.entry_offset(index), ENTRY.pack(old, new))

    def put(self, offset: int, data: bytes) -> None:
        """Overwrite bytes of the header or of an area."""
        chunk, begin = divmod(offset, self.chunk_size)
        self._pieces[chunk][begin : begin + len(data)] = data

    def get(self, offset: int, length: int) -> bytes:
        """Return bytes of the header or of an area."""
        chunk, begin = divmod(offset, self.chunk_size)
        return bytes(self._pieces[chunk][begin : begin + length])

    def write(self, fd: int) -> None:
        """Write it to an empty file, with holes where it has nothing."""
        os.ftruncate(fd, self.size)
        for chunk, piece in self._pieces.items():
            offset = chunk * self.chunk_size
            os.pwrite(fd, piece[: max(0, self.size - offset)], offset)

    def _piece(self, content: bytes) -> bytearray:
        return bytearray(content[: self.chunk_size].ljust(self.chunk_size, b"\0"))


@contextmanager
def in_memory(store: CowStore) -> Iterator[int]:
    """A descriptor of a store in memory."""
    fd = os.memfd_create("store")
    try:
        store.write(fd)
        yield fd
    finally:
        os.close(fd)


def read_entries(fd: int) -> Iterator[tuple[int, int]]:
    """Walk the list of a store that is sound: pairs of a chunk of the origin and one of the store.

    Buffered or with O_DIRECT, as ``fd`` was opened.
    """
    chunk_size = HEADER.unpack(_read(fd, 0, 4096)[: HEADER.size])[3] * 512
    for area in itertools.count():
        content = _read(fd, area_chunk(area, chunk_size) * chunk_size, chunk_size)
        for old, new in ENTRY.iter_unpack(content):
            if new == 0:
                return
            yield old, new


def _read(fd: int, offset: int, length: int) -> bytes:
    buffer = mmap.mmap(-1, length)
    assert os.preadv(fd, [buffer], offset) == length
    return bytes(buffer)
