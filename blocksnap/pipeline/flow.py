"""Read extents, cut them into chunks, name, compress and seal them, in bounded memory.

One reader, a few workers and the calling thread pass a fixed number of slots around. A slot owns
the buffers for about a MiB of chunks and their frames, for as long as the run lasts: what decides
throughput is page faults on fresh memory, so nothing of a chunk's size is allocated while it runs.
hashlib-sized work (reading, BLAKE3, zstd, AES) is done without the GIL. Results reach the caller in
the order of the volume.
"""

from __future__ import annotations

import mmap
import os
import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self

from blocksnap.errors import VolumeError
from blocksnap.pipeline.protocols import ChunkSink, Pace

SLOT_BYTES = 1 << 20
_ALIGNMENT = 4096


class VolumeEndedError(VolumeError):
    """The volume has fewer bytes than it had when the backup began."""

    def __init__(self, offset: int) -> None:
        self.offset = offset
        super().__init__(
            f"the volume ended at byte {offset} while it was being read",
            resolution="do not shrink a volume during its backup; run it again",
        )


class ReadFailedError(VolumeError):
    """The volume could not be read."""

    def __init__(self, offset: int, err: OSError) -> None:
        self.offset = offset
        super().__init__(
            f"cannot read the volume at byte {offset}: {err.strerror}",
            resolution="look for I/O errors in the kernel log (dmesg); no backup was stored",
        )


@dataclass(frozen=True, slots=True)
class ChunkResult:
    """One chunk that was read: its number, and its id, or None when it is all zeros."""

    number: int
    id: bytes | None
    length: int


@dataclass(slots=True)
class _Sealed:
    result: ChunkResult
    frame: memoryview | None


@dataclass(slots=True)
class Slot:
    """Buffers for about a MiB of chunks and their frames."""

    data: memoryview
    frames: memoryview
    sequence: int = 0
    chunks: list[tuple[int, int, int]] = field(default_factory=list)
    """(number, position in data, length)."""
    sealed: list[_Sealed] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Geometry:
    """How a volume is cut into chunks."""

    size: int
    chunk_size: int

    @property
    def count(self) -> int:
        """Number of chunks, the last of which may be short."""
        return -(-self.size // self.chunk_size)

    def length(self, number: int) -> int:
        """Length of one chunk in bytes."""
        return min(self.chunk_size, self.size - number * self.chunk_size)

    def numbers(self, offset: int, length: int) -> tuple[int, int]:
        """Return the range of chunks that an extent touches."""
        return offset // self.chunk_size, -(-(offset + length) // self.chunk_size)


class Flow:
    """One pass over the chunks of some extents; a context manager that ends its threads."""

    _chunks_per_slot = 1
    """At least so many have to fit."""

    def __init__(
        self,
        fd: int,
        geometry: Geometry,
        extents: Iterable[tuple[int, int]],
        sink: ChunkSink,
        *,
        workers: int = 2,
        pace: Pace | None = None,
    ) -> None:
        """Start reading.

        ``extents`` are (offset, length) pairs in ascending order, whole chunks (or up to the volume's end).
        Without a ``pace`` it goes as fast as it can.
        """
        self._pace = pace
        self._fd = fd
        self._geometry = geometry
        self._extents = extents
        self._sink = sink
        self._zeros = _zero_ids(geometry, sink)
        capacity = max(SLOT_BYTES, geometry.chunk_size)
        per_slot = max(capacity // geometry.chunk_size, self._chunks_per_slot)
        self._free: queue.SimpleQueue[Slot | None] = queue.SimpleQueue()
        self._work: queue.SimpleQueue[Slot | None] = queue.SimpleQueue()
        self._done: queue.SimpleQueue[Slot | BaseException | int] = queue.SimpleQueue()
        for _ in range(workers * 2 + 2):
            # A map of its own is aligned for O_DIRECT.
            data = memoryview(mmap.mmap(-1, capacity))
            self._free.put(Slot(data, memoryview(bytearray(capacity + per_slot * sink.overhead))))
        self._stopping = threading.Event()
        self._threads = [threading.Thread(target=self._guard, args=(self._read,), daemon=True)]
        self._threads += [
            threading.Thread(target=self._guard, args=(self._seal,), daemon=True) for _ in range(workers)
        ]
        self._workers = workers
        self.read_bytes = 0

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stopping.set()
        self._free.put(None)
        for _ in range(self._workers):
            self._work.put(None)
        for thread in self._threads:
            thread.join()

    def results(self) -> Iterator[ChunkResult]:
        """Store what is new, and yield every chunk in ascending order."""
        waiting: dict[int, Slot] = {}
        expected, last = 0, None
        while last is None or expected < last:
            item = self._done.get()
            if isinstance(item, BaseException):
                raise item
            if isinstance(item, int):
                last = item
                continue
            waiting[item.sequence] = item
            while expected in waiting:
                slot = waiting.pop(expected)
                expected += 1
                for sealed in slot.sealed:
                    if sealed.frame is not None and sealed.result.id is not None:
                        if self._pace:
                            self._pace.before_write(len(sealed.frame), self._stopping.wait)
                        self._sink.store(sealed.result.id, sealed.frame, sealed.result.length)
                    self.read_bytes += sealed.result.length
                    yield sealed.result
                slot.sealed.clear()
                self._free.put(slot)

    def _guard(self, work: Callable[[], None]) -> None:
        try:
            work()
        except BaseException as err:  # noqa: BLE001 - handed to the caller's thread, which raises it
            self._done.put(err)

    def _read(self) -> None:
        sequence = 0
        if self._pace:
            self._pace.begin_reading()
        for chunks in self._batches():
            slot = self._free.get()
            if slot is None or self._stopping.is_set():
                return
            slot.sequence, slot.chunks = sequence, chunks
            if self._pace:
                self._fill_at_pace(slot, self._pace)
            else:
                self._fill(slot)
            self._work.put(slot)
            sequence += 1
        self._done.put(sequence)

    def _batches(self) -> Iterator[list[tuple[int, int, int]]]:
        size = self._geometry.chunk_size
        most = max(SLOT_BYTES // size, 1)
        batch: list[tuple[int, int, int]] = []
        for offset, length in self._extents:
            first, last = self._geometry.numbers(offset, length)
            for number in range(first, last):
                batch.append((number, len(batch) * size, self._geometry.length(number)))
                if len(batch) == most:
                    yield batch
                    batch = []
        if batch:
            yield batch

    def _fill_at_pace(self, slot: Slot, pace: Pace) -> None:
        pace.before_read(sum(length for _, _, length in slot.chunks), self._stopping.wait)
        began = time.monotonic()
        self._fill(slot)
        pace.after_read(time.monotonic() - began)

    def _fill(self, slot: Slot) -> None:
        """Read the slot's chunks, neighbours in one call."""
        size = self._geometry.chunk_size
        begin = 0
        while begin < len(slot.chunks):
            end = begin + 1
            while end < len(slot.chunks) and slot.chunks[end][0] == slot.chunks[end - 1][0] + 1:
                end += 1
            _, position, _ = slot.chunks[begin]
            length = (end - begin - 1) * size + slot.chunks[end - 1][2]
            self._pread(slot.data[position:], slot.chunks[begin][0] * size, length)
            begin = end

    def _pread(self, buffer: memoryview, offset: int, length: int) -> None:
        done = 0
        while done < length:
            # O_DIRECT wants whole blocks; at the end of the volume the kernel returns less.
            wanted = -(-(length - done) // _ALIGNMENT) * _ALIGNMENT
            try:
                count = os.preadv(self._fd, [buffer[done : done + wanted]], offset + done)
            except OSError as err:
                raise ReadFailedError(offset + done, err) from err
            if not count:
                raise VolumeEndedError(offset + done)
            done += count

    def _seal(self) -> None:
        sealer = self._sink.new_sealer()
        while (slot := self._work.get()) is not None and not self._stopping.is_set():
            position = 0
            for number, at, length in slot.chunks:
                plain = slot.data[at : at + length]
                id_ = self._sink.identify(plain)
                frame = None
                if self._is_zeros(id_, plain):
                    slot.sealed.append(_Sealed(ChunkResult(number, None, length), None))
                    continue
                if self._sink.claim(id_):
                    end = position + sealer.seal_into(id_, plain, slot.frames[position:])
                    frame, position = slot.frames[position:end], end
                slot.sealed.append(_Sealed(ChunkResult(number, id_, length), frame))
            self._done.put(slot)

    def _is_zeros(self, id_: bytes, plain: memoryview) -> bool:
        return id_ == self._zeros.get(len(plain))


def _zero_ids(geometry: Geometry, sink: ChunkSink) -> dict[int, bytes]:
    """Return the ids of chunks of zeros by their length: a chunk is told to be zero by its name."""
    lengths = {geometry.chunk_size, geometry.length(geometry.count - 1)} if geometry.count else set()
    return {length: sink.identify(memoryview(bytes(length))) for length in lengths}
