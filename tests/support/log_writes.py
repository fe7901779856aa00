"""Devices put together by hand, and what dm-log-writes recorded of one (kernel: dm-log-writes.c)."""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from support.lvm_lab import tool

SECTOR = 512
_HEADER = struct.Struct("<QQQI")
_ENTRY = struct.Struct("<QQQQ")
_MAGIC = 0x6A736677736872
_FLUSH, _FUA, _DISCARD, _MARK = 1, 2, 4, 8


@contextmanager
def target(name: str, length: int, table: str) -> Iterator[str]:
    """A device-mapper device of one target."""
    name = f"blocksnap-test-{name}"
    tool("dmsetup", "create", name, "--table", f"0 {length // SECTOR} {table}")
    try:
        yield f"/dev/mapper/{name}"
    finally:
        tool("dmsetup", "remove", "--retry", name)


@dataclass(frozen=True)
class Entry:
    """A write at a byte offset, a discard of some length, or a mark, in the order of completion."""

    offset: int
    length: int
    flags: int
    data: bytes

    @property
    def mark(self) -> str | None:
        """What a mark says."""
        return self.data.decode() if self.flags & _MARK else None

    @property
    def discards(self) -> bool:
        return bool(self.flags & _DISCARD)

    @property
    def settles(self) -> bool:
        """Whether everything before is on the medium."""
        return bool(self.flags & (_FLUSH | _FUA))


def log_entries(path: str) -> Iterator[Entry]:
    """Read what a device of target log-writes has recorded."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        magic, version, count, unit = _HEADER.unpack(os.pread(fd, _HEADER.size, 0))
        assert (magic, version) == (_MAGIC, 1)
        at = unit
        for _ in range(count):
            head = os.pread(fd, unit, at)
            sector, sectors, flags, length = _ENTRY.unpack(head[: _ENTRY.size])
            at += unit
            if flags & _MARK:
                # What it says lies behind the entry, in its own sector.
                yield Entry(0, 0, flags, head[_ENTRY.size : _ENTRY.size + length])
                continue
            stored = 0 if flags & _DISCARD else sectors * unit
            yield Entry(sector * unit, sectors * unit, flags, os.pread(fd, stored, at))
            at += stored
    finally:
        os.close(fd)
