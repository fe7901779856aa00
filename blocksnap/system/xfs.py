"""What tells one file of an XFS from all others, and one state of it from all others.

Asked of an open descriptor: fstat(2), and XFS_IOC_FSGEOMETRY_V1, FS_IOC_FSGETXATTR and FS_IOC_GETVERSION of
fs/xfs/libxfs/xfs_fs.h and include/uapi/linux/fs.h.
"""

from __future__ import annotations

import fcntl
import os
import stat
import struct
import uuid
from dataclasses import dataclass

_GEOMETRY = 0x80705864
_GET_ATTRIBUTES = 0x801C581F
_GET_VERSION = 0x80087601
_GEOMETRY_SIZE = 112
_GEOMETRY_UUID = slice(64, 80)
_ATTRIBUTES_SIZE = 28
_IMMUTABLE = 0x8
_UINT = struct.Struct("=I")


class NotXfsError(Exception):
    """It is no regular file of an XFS; the message says what it is instead."""


@dataclass(frozen=True, slots=True)
class XfsFile:
    """One file in one state.

    ``filesystem`` is the filesystem's UUID. ``generation`` is drawn anew each time an inode number is
    given away, so that ``inode`` and it are never those of another file. ``immutable``: nobody, not
    even root, can write to it, rename or remove it until the attribute is taken away, which changes ctime.
    """

    filesystem: str
    inode: int
    generation: int
    size: int
    modified_ns: int
    changed_ns: int
    immutable: bool


def look_at(fd: int) -> XfsFile:
    """Return what an open file is at this moment.

    Raises NotXfsError; OSError for a descriptor that is none.
    """
    status = os.fstat(fd)
    if not stat.S_ISREG(status.st_mode):
        raise NotXfsError("it is not a regular file")
    geometry, attributes, version = bytearray(_GEOMETRY_SIZE), bytearray(_ATTRIBUTES_SIZE), bytearray(8)
    try:
        fcntl.ioctl(fd, _GEOMETRY, geometry)
        fcntl.ioctl(fd, _GET_ATTRIBUTES, attributes)
        fcntl.ioctl(fd, _GET_VERSION, version)
    except OSError as err:
        raise NotXfsError("it is not on XFS") from err
    return XfsFile(
        filesystem=str(uuid.UUID(bytes=bytes(geometry[_GEOMETRY_UUID]))),
        inode=status.st_ino,
        generation=_UINT.unpack_from(version)[0],
        size=status.st_size,
        modified_ns=status.st_mtime_ns,
        changed_ns=status.st_ctime_ns,
        immutable=bool(_UINT.unpack_from(attributes)[0] & _IMMUTABLE),
    )
