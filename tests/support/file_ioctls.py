"""The ioctls of files that tests ask the kernel for: clones, dedupe, maps, the immutable attribute."""

from __future__ import annotations

import ctypes
import fcntl
import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

_FICLONE = 0x40049409
_FICLONERANGE = 0x4020940D
_FIDEDUPERANGE = 0xC0189436
_FIEMAP = 0xC020660B
_GET_FLAGS = 0x80086601
_SET_FLAGS = 0x40086602
_IMMUTABLE = 0x10
FIEMAP_SYNC = 1

KEEP_SIZE, PUNCH_HOLE, COLLAPSE, ZERO_RANGE, INSERT, UNSHARE = 1, 2, 8, 16, 32, 64

_HEADER = struct.Struct("=QQIIII")
_RECORD = struct.Struct("=QQQ16xI12x")
_LIBC = ctypes.CDLL(None, use_errno=True)


class MapRecord(NamedTuple):
    """One extent as FIEMAP tells it."""

    logical: int
    physical: int
    length: int
    flags: int


def clone_file(source: int, target: int) -> None:
    fcntl.ioctl(target, _FICLONE, source)


def clone_range(source: int, target: int, source_offset: int, length: int, offset: int) -> None:
    fcntl.ioctl(target, _FICLONERANGE, struct.pack("=qQQQ", source, source_offset, length, offset))


def dedupe_range(source: int, target: int, source_offset: int, length: int, offset: int) -> int:
    """Return how many bytes became shared."""
    request = bytearray(struct.pack("=QQHHIqQQiI", source_offset, length, 1, 0, 0, target, offset, 0, 0, 0))
    fcntl.ioctl(source, _FIDEDUPERANGE, request)
    done, status = struct.unpack_from("=Qi", request, 40)
    return int(done) if status == 0 else 0


def fallocate(fd: int, mode: int, offset: int, length: int) -> None:
    call = _LIBC.fallocate
    call.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
    if call(fd, mode, offset, length) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"fallocate: {os.strerror(number)}")


def read_map(fd: int, *, flags: int = FIEMAP_SYNC, offset: int = 0, length: int = 1 << 62) -> list[MapRecord]:
    """Return what one FIEMAP of up to 4096 records answers."""
    request = bytearray(_HEADER.size + 4096 * _RECORD.size)
    _HEADER.pack_into(request, 0, offset, length, flags, 0, 4096, 0)
    fcntl.ioctl(fd, _FIEMAP, request)
    count = _HEADER.unpack_from(request)[3]
    return [MapRecord(*_RECORD.unpack_from(request, _HEADER.size + n * _RECORD.size)) for n in range(count)]


def set_immutable(path: Path, *, immutable: bool) -> None:
    """Do what `chattr +i` or `chattr -i` does."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        flags = bytearray(8)
        fcntl.ioctl(fd, _GET_FLAGS, flags)
        (value,) = struct.unpack_from("=I", flags)
        value = value | _IMMUTABLE if immutable else value & ~_IMMUTABLE
        fcntl.ioctl(fd, _SET_FLAGS, struct.pack("=Q", value))
    finally:
        os.close(fd)


@contextmanager
def opened(path: Path, flags: int = os.O_RDONLY) -> Iterator[int]:
    fd = os.open(path, flags | os.O_CLOEXEC, 0o600)
    try:
        yield fd
    finally:
        os.close(fd)
