"""Find the frames in a pack without its table: each tells where it begins, and proves itself.

Used where a pack is damaged. A frame counts when it opens and its content has its id; so wherever it lies,
and whatever lies beside it, it is what somebody stored.
"""

from __future__ import annotations

from collections.abc import Iterator

from blocksnap.errors import DamageError
from blocksnap.repository.errors import NewerFormatError
from blocksnap.repository.frame import HEADER, MAGIC, TAG_SIZE, FrameHeader, FrameType
from blocksnap.repository.keys import Right
from blocksnap.repository.pack import PackRow
from blocksnap.repository.repository import Repository

_WINDOW = 8 << 20
_LONGEST = 5 << 20
"""Longer than the frame of the largest chunk, and of any node."""
_STEPS = (64 << 10, 4 << 10)
"""In what pieces a range is read that cannot be read whole: a bad sector costs no more than the last."""


def scan_frames(repository: Repository, name: str, size: int) -> Iterator[PackRow]:
    """Yield the frames of a pack that are unharmed, in order, as rows of its table.

    Of data chunks only where the keys may read them: others prove nothing. Raises StorageError.
    """
    window = _Window(repository, name, size)
    may_read = repository.keys.may(Right.READ)
    at = window.find(0)
    while at >= 0:
        header = _header_at(window, at)
        if header is not None and header.frame_length <= min(size - at, _LONGEST):
            frame = window.at(at, header.frame_length)
            wanted = header.type != FrameType.DATA or may_read
            if wanted and _is_proven(repository, header, frame, name):
                if header.type != FrameType.FOOTER:
                    yield PackRow(header.id, at, header.frame_length, header.plain_length, header.type)
                at = window.find(at + header.frame_length)
                continue
        at = window.find(at + 1)


def _header_at(window: _Window, at: int) -> FrameHeader | None:
    try:
        return FrameHeader.parse(window.at(at, HEADER.size), where="")
    except DamageError:
        return None


def _is_proven(repository: Repository, header: FrameHeader, frame: memoryview, name: str) -> bool:
    try:
        repository.opener().open(frame, where=name, kind=header.type, id_=header.id)
    except DamageError:
        return False
    except NewerFormatError:
        # It has passed authentication: a later version wrote it.
        return True
    return True


class _Window:
    """A part of the pack in memory; what the storage cannot read of it is zeros."""

    def __init__(self, repository: Repository, name: str, size: int) -> None:
        self._repository, self._name, self._size = repository, name, size
        self._buffer = bytearray(min(_WINDOW, size))
        self._begin = self._end = 0

    def at(self, offset: int, length: int) -> memoryview:
        """Return bytes of the pack, fewer at its end; valid until the next call."""
        length = min(length, self._size - offset)
        if not self._begin <= offset <= offset + length <= self._end:
            self._begin, self._end = offset, min(offset + len(self._buffer), self._size)
            self._fill(offset, memoryview(self._buffer)[: self._end - offset], _STEPS)
        return memoryview(self._buffer)[offset - self._begin : offset - self._begin + length]

    def find(self, offset: int) -> int:
        """Return where the magic of a frame comes next, at ``offset`` or behind it, or -1."""
        while offset + HEADER.size + TAG_SIZE <= self._size:
            self.at(offset, HEADER.size)
            found = self._buffer.find(MAGIC, offset - self._begin, self._end - self._begin)
            if found >= 0:
                return self._begin + found
            if self._end == self._size:
                return -1
            offset = self._end - len(MAGIC) + 1
        return -1

    def _fill(self, offset: int, buffer: memoryview, steps: tuple[int, ...]) -> None:
        try:
            self._repository.read_range(self._name, offset, buffer)
        except DamageError:
            if not steps or len(buffer) <= steps[-1]:
                buffer[:] = bytes(len(buffer))
                return
            for begin in range(0, len(buffer), steps[0]):
                self._fill(offset + begin, buffer[begin : begin + steps[0]], steps[1:])
