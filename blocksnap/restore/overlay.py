"""What is written over an image and thrown away: blocks in a file without a name, which dies with us."""

from __future__ import annotations

import os
import tempfile
import threading
from collections.abc import Callable, Iterator

BLOCK_BYTES = 4096
ReadBelow = Callable[[int, int], bytes]
"""Reads bytes at an offset of the image."""


class Overlay:
    """Reads and writes an image of ``size`` bytes, from several threads; the image itself stays as it is."""

    def __init__(self, size: int, read_below: ReadBelow) -> None:
        self._size = size
        self._read_below = read_below
        self._file = tempfile.TemporaryFile(dir=os.environ.get("TMPDIR") or "/var/tmp")  # noqa: S108, SIM115
        self._fd = self._file.fileno()
        self._written = bytearray(-(-size // BLOCK_BYTES) // 8 + 1)
        self._lock = threading.Lock()

    def read(self, offset: int, size: int) -> bytes:
        """Return ``size`` bytes, less at the end."""
        end = min(offset + size, self._size)
        parts = []
        for begin, until, is_written in self._runs(offset, end):
            length = until - begin
            parts.append(os.pread(self._fd, length, begin) if is_written else self._read_below(begin, length))
        return b"".join(parts)

    def write(self, offset: int, data: bytes) -> int:
        """Write bytes, none beyond the end; return how many."""
        data = data[: max(self._size - offset, 0)]
        if not data:
            return 0
        first, last = offset // BLOCK_BYTES, (offset + len(data) - 1) // BLOCK_BYTES
        with self._lock:
            # Blocks of which only a part is written get the rest from the image.
            for number in {first, last}:
                begin = number * BLOCK_BYTES
                whole = offset <= begin and offset + len(data) >= min(begin + BLOCK_BYTES, self._size)
                if not whole and not self._has(number):
                    below = self._read_below(begin, min(BLOCK_BYTES, self._size - begin))
                    os.pwrite(self._fd, below, begin)
            view, at = memoryview(data), offset
            while view:
                count = os.pwrite(self._fd, view, at)
                view, at = view[count:], at + count
            for number in range(first, last + 1):
                self._written[number >> 3] |= 1 << (number & 7)
        return len(data)

    def close(self) -> None:
        """Throw it away."""
        self._file.close()

    def _has(self, number: int) -> bool:
        return bool(self._written[number >> 3] >> (number & 7) & 1)

    def _runs(self, begin: int, end: int) -> Iterator[tuple[int, int, bool]]:
        """Yield the parts of a range that were written, or were not."""
        while begin < end:
            written = self._has(begin // BLOCK_BYTES)
            until = begin // BLOCK_BYTES + 1
            while until * BLOCK_BYTES < end and self._has(until) == written:
                until += 1
            yield begin, min(until * BLOCK_BYTES, end), written
            begin = until * BLOCK_BYTES
