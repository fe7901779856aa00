"""The chunks of many files in one flow: read one after the other, in memory that no number of files changes.

The walk over what is to be read is done by the thread that reads, so that it overlaps with everything else.
What it yields comes out again in its order, each with the results of its chunks.
"""

from __future__ import annotations

import os
import queue
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from blocksnap.errors import VolumeError
from blocksnap.pipeline.flow import SLOT_BYTES, ChunkResult, Flow, Geometry, Slot
from blocksnap.pipeline.protocols import ChunkSink, Pace

_WAITING = 1024
"""Items that the walk may be ahead."""
_PATIENCE_SECONDS = 0.2


class ReadItem(Protocol):
    """Something with a file of which some chunks are to be read, or none."""

    @property
    def inode(self) -> int:
        """How the file is opened."""
        ...

    @property
    def size(self) -> int:
        """Its size in bytes."""
        ...

    @property
    def ranges(self) -> Sequence[tuple[int, int]]:
        """Ranges of chunks to read, ascending."""
        ...


_Item = TypeVar("_Item", bound=ReadItem)


class FileReadError(VolumeError):
    """A file of a snapshot could not be read."""

    def __init__(self, inode: int, offset: int, reason: str) -> None:
        self.inode, self.offset = inode, offset
        super().__init__(
            f"cannot read inode {inode} at byte {offset}: {reason}",
            details="find -inum tells its path",
            resolution="look for I/O errors in the kernel log (dmesg); no backup was stored",
        )


@dataclass(frozen=True, slots=True)
class _Place:
    inode: int
    offset: int


class FilesFlow(Flow, Generic[_Item]):
    """One pass over chunks of many files; a context manager that ends its threads."""

    _chunks_per_slot = 64

    def __init__(
        self,
        items: Iterable[_Item],
        open_file: Callable[[int], int],
        chunk_size: int,
        sink: ChunkSink,
        *,
        workers: int = 2,
        pace: Pace | None = None,
    ) -> None:
        """Start with ``items``; ``open_file`` returns a descriptor for an inode, or raises OSError."""
        super().__init__(-1, Geometry(chunk_size, chunk_size), (), sink, workers=workers, pace=pace)
        self._items = items
        self._open_file = open_file
        self._waiting: queue.Queue[_Item | None] = queue.Queue(_WAITING)
        self._places: list[_Place] = []
        self._open = _OpenFile(open_file)
        self._count = 0

    def walked(self) -> Iterator[tuple[_Item, Iterator[ChunkResult]]]:
        """Yield every item with the results of its chunks, which have to be taken before the next item.

        Raises what the walk and the reading raise.
        """
        results = self.results()
        while (item := self._waiting.get()) is not None:
            yield item, self._of_item(item, results)
        # What ended the walk, if it was not its end.
        for _ in results:
            raise ValueError("chunks that belong to nothing were read")

    def _of_item(self, item: _Item, results: Iterator[ChunkResult]) -> Iterator[ChunkResult]:
        for begin, end in item.ranges:
            for number in range(begin, end):
                found = next(results)
                yield ChunkResult(number, found.id, found.length)

    def _read(self) -> None:
        try:
            super()._read()
        finally:
            self._open.close()
            self._announce(None)

    def _batches(self) -> Iterator[list[tuple[int, int, int]]]:
        size = self._geometry.chunk_size
        batch: list[tuple[int, int, int]] = []
        places: list[_Place] = []
        used = 0
        for item in self._items:
            if self._waiting.full() and batch:
                # Whoever takes the items may be waiting for these.
                self._places = places
                yield batch
                batch, places, used = [], [], 0
            if not self._announce(item):
                return
            for begin, end in item.ranges:
                for number in range(begin, end):
                    length = min(size, item.size - number * size)
                    if used + length > max(SLOT_BYTES, size) or len(batch) == self._chunks_per_slot:
                        self._places = places
                        yield batch
                        batch, places, used = [], [], 0
                    batch.append((self._count, used, length))
                    places.append(_Place(item.inode, number * size))
                    used += length
                    self._count += 1
        self._places = places
        if batch:
            yield batch

    def _announce(self, item: _Item | None) -> bool:
        """Hand an item on; tell whether anybody is still there to take it."""
        while not self._stopping.is_set():
            try:
                self._waiting.put(item, timeout=_PATIENCE_SECONDS)
            except queue.Full:
                continue
            return True
        return False

    def _fill(self, slot: Slot) -> None:
        for (_, position, length), place in zip(slot.chunks, self._places, strict=True):
            self._open.read(place.inode, place.offset, slot.data[position : position + length])

    def _is_zeros(self, id_: bytes, plain: memoryview) -> bool:
        if plain[0] or plain[-1]:
            return False
        known = self._zeros.get(len(plain))
        if known is None:
            # Most files end in a chunk of a length of their own; few of these are zeros.
            known = self._sink.identify(memoryview(bytes(len(plain))))
        return id_ == known


class _OpenFile:
    """The file that is being read; its pages do not stay in the cache."""

    def __init__(self, open_file: Callable[[int], int]) -> None:
        self._open_file = open_file
        self._inode = 0
        self._fd = -1

    def read(self, inode: int, offset: int, buffer: memoryview) -> None:
        done = 0
        try:
            if inode != self._inode:
                self.close()
                self._fd = self._open_file(inode)
                self._inode = inode
            while done < len(buffer):
                count = os.preadv(self._fd, [buffer[done:]], offset + done)
                if not count:
                    raise FileReadError(inode, offset + done, "it ends there")
                done += count
        except OSError as err:
            raise FileReadError(inode, offset + done, err.strerror or str(err)) from err

    def close(self) -> None:
        if self._fd >= 0:
            os.posix_fadvise(self._fd, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(self._fd)
        self._fd, self._inode = -1, 0
