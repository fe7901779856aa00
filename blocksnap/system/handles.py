"""Directories by the handles of their filesystem (name_to_handle_at(2)), which outlive renaming."""

from __future__ import annotations

import ctypes
import os
import struct

_HEADER = struct.Struct("=Ii")
_LONGEST = 128
_AT_CURRENT = -100


def handle_of(path: str) -> str | None:
    """Return the handle of a file or directory as hex; None where its filesystem gives none."""
    buffer = ctypes.create_string_buffer(_HEADER.pack(_LONGEST, 0), _HEADER.size + _LONGEST)
    mount = ctypes.c_int()
    library = ctypes.CDLL(None, use_errno=True)
    if library.name_to_handle_at(_AT_CURRENT, os.fsencode(path), buffer, ctypes.byref(mount), 0):
        return None
    length, _ = _HEADER.unpack_from(buffer)
    return buffer.raw[: _HEADER.size + length].hex()


def open_directory(mount: int, handle: str) -> int:
    """Open a directory of the filesystem that ``mount`` is open on; raises OSError, ESTALE where it has none.

    Another filesystem may have a directory with the same handle. Needs CAP_DAC_READ_SEARCH.
    """
    library = ctypes.CDLL(None, use_errno=True)
    flags = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
    fd: int = library.open_by_handle_at(mount, ctypes.create_string_buffer(_bytes_of(handle)), flags)
    if fd < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return fd


def _bytes_of(handle: str) -> bytes:
    """Return a handle whose length is what it says, whatever was written down."""
    try:
        found = bytes.fromhex(handle)
        length, kind = _HEADER.unpack_from(found)
    except (ValueError, struct.error):
        length, kind, found = 0, 0, b""
    return (
        _HEADER.pack(min(length, max(len(found) - _HEADER.size, 0), _LONGEST), kind) + found[_HEADER.size :]
    )
