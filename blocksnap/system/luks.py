"""LUKS headers as they lie on a device: whose they are, and how long.

Sources: "LUKS On-Disk Format Specification" 1.2.3, "LUKS2 On-Disk Format Specification" 1.1.3 (both of the
cryptsetup project).
"""

from __future__ import annotations

import json
import re
import struct
from dataclasses import dataclass
from typing import BinaryIO

_MAGIC = b"LUKS\xba\xbe"
_LUKS1 = struct.Struct(">104xI60x40s")
"""Payload offset in sectors, UUID."""
_LUKS2 = struct.Struct(">8xQ152x40s")
"""Length of the first binary header with its JSON area in bytes, UUID."""
_BINARY_HEADER = 4096
_SECTOR = 512
_LARGEST_AREA = 4 << 20
"""Of a binary header with its JSON area: the sizes that LUKS2 allows end there."""
_LARGEST = (128 << 20) + 2 * _LARGEST_AREA
_UUID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")


@dataclass(frozen=True, slots=True)
class LuksHeader:
    """A header with its key slots: ``size`` bytes from the beginning of the device."""

    version: int
    uuid: str
    size: int


def read_header(file: BinaryIO) -> LuksHeader | None:
    """Return what header a device or file begins with; None where there is none that makes sense.

    Raises OSError.
    """
    file.seek(0)
    first = file.read(_BINARY_HEADER)
    if len(first) < _BINARY_HEADER or not first.startswith(_MAGIC):
        return None
    version = int.from_bytes(first[6:8], "big")
    if version == 1:
        sectors, uuid = _LUKS1.unpack_from(first)
        size = sectors * _SECTOR
    elif version == 2:
        area, uuid = _LUKS2.unpack_from(first)
        size = _size_of_second(file, area)
    else:
        return None
    text = uuid.rstrip(b"\0").decode("ascii", "replace")
    if not _BINARY_HEADER <= size <= _LARGEST or not _UUID.fullmatch(text):
        return None
    return LuksHeader(version, text, size)


def _size_of_second(file: BinaryIO, area: int) -> int:
    """Return the length of a LUKS2 header: both copies of the metadata, and the key slots; 0 for nonsense."""
    if not _BINARY_HEADER < area <= _LARGEST_AREA:
        return 0
    file.seek(_BINARY_HEADER)
    text = file.read(area - _BINARY_HEADER).partition(b"\0")[0]
    try:
        slots = json.loads(text)["config"]["keyslots_size"]
        return 2 * area + int(slots)
    except (ValueError, KeyError, TypeError, RecursionError):
        return 0
