"""What an inode has beside its content, read within the bounds of what a kernel can have.

A hostile record claims any length, of one block many times.
"""

from __future__ import annotations

from typing import Final

from blocksnap.repository.errors import DamagedObjectError
from blocksnap.repository.inode_map import InodeReader
from blocksnap.repository.inodes import InodeRecord, Value, decode_xattrs

LONGEST_TARGET: Final = 4095
"""Bytes of a symbolic link's target (linux/limits.h, PATH_MAX, which counts the zero byte)."""
LARGEST_XATTR: Final = 65536
"""Bytes of one extended attribute (linux/limits.h, XATTR_SIZE_MAX)."""
LONGEST_XATTR_NAME: Final = 255
"""(linux/limits.h, XATTR_NAME_MAX)"""
LARGEST_VALUE = 64 << 20
"""Bytes of all extended attributes of an inode, and of the state of a file: four million extents or so."""


def link_target(reader: InodeReader, link: InodeRecord) -> bytes:
    """Return where a symbolic link leads; raises DamageError."""
    return _within(reader, link.detail, LONGEST_TARGET, f"symbolic link {link.number}")


def xattrs_of(reader: InodeReader, record: InodeRecord) -> list[tuple[bytes, bytes]]:
    """Return extended attributes, by name; raises DamageError."""
    where = f"inode {record.number}"
    found = decode_xattrs(_within(reader, record.xattrs, LARGEST_VALUE, where), where)
    for name, value in found:
        if len(name) > LONGEST_XATTR_NAME:
            raise DamagedObjectError(where, f"it has an extended attribute with a name of {len(name)} bytes")
        if len(value) > LARGEST_XATTR:
            raise DamagedObjectError(where, f"its extended attribute {name!r} has {len(value)} bytes")
    return found


def state_of(reader: InodeReader, file: InodeRecord) -> bytes:
    """Return what was known of a file's extents; raises DamageError."""
    return _within(reader, file.detail, LARGEST_VALUE, f"inode {file.number}")


def _within(reader: InodeReader, value: Value, most: int, where: str) -> bytes:
    if value.length > most:
        raise DamagedObjectError(where, f"{value.length} bytes are more than it can have")
    return reader.value(value)
