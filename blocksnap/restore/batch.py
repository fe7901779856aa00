"""What one thread of a restore has opened and not yet written."""

from __future__ import annotations

import mmap

from blocksnap.pipeline.flow import Geometry
from blocksnap.restore.targets import Target

_BATCH_BYTES = 1 << 20
"""What is opened before it is written, or one chunk."""


class Batch:
    """Chunks opened one behind the other into a buffer, and written in as few calls as their numbers allow.

    The buffer is a map of its own: aligned, so that it can be written past the page cache. Each thread
    has one for as long as it lives, because what decides throughput is page faults on fresh memory.
    """

    def __init__(self, geometry: Geometry, target: Target) -> None:
        self._geometry = geometry
        self._target = target
        self._buffer = memoryview(mmap.mmap(-1, max(_BATCH_BYTES, geometry.chunk_size)))
        self._used = 0
        self._chunks: list[tuple[int, int, int]] = []
        self.written = 0

    def room(self) -> memoryview:
        """Return where the next chunk goes."""
        if self._used + self._geometry.chunk_size > len(self._buffer):
            self.flush()
        return self._buffer[self._used :]

    def add(self, numbers: tuple[int, ...], length: int) -> None:
        """Take what was opened there."""
        self._chunks += [(number, self._used, length) for number in numbers]
        self._used += self._geometry.chunk_size

    def flush(self) -> None:
        """Write everything."""
        size = self._geometry.chunk_size
        # First by place in the buffer: chunks that follow each other there mostly do so in the volume too.
        chunks, begin = self._chunks, 0
        while begin < len(chunks):
            end = begin + 1
            while end < len(chunks) and self._follows(chunks[end - 1], chunks[end]):
                end += 1
            number, at, _ = chunks[begin]
            length = (end - begin - 1) * size + chunks[end - 1][2]
            self._target.write(number * size, self._buffer[at : at + length])
            self.written += length
            begin = end
        self._chunks, self._used = [], 0

    def _follows(self, one: tuple[int, int, int], other: tuple[int, int, int]) -> bool:
        return other[0] == one[0] + 1 and other[1] == one[1] + self._geometry.chunk_size
