"""What tells one file of an XFS from all others, and one state of it from all others.

Asked of an open descriptor: XFS_IOC_FSGEOMETRY_V1 of fs/xfs/libxfs/xfs_fs.h, and what there is to ask of
files on any filesystem.
"""

from __future__ import annotations

import fcntl
import os
import stat
import uuid

from blocksnap.system.clones import ClonedFile, look_at_file

_GEOMETRY = 0x80705864
_GEOMETRY_SIZE = 112
_GEOMETRY_UUID = slice(64, 80)


class NotXfsError(Exception):
    """It is no regular file of an XFS; the message says what it is instead."""


def look_at(fd: int) -> ClonedFile:
    """Return what an open file is at this moment.

    Raises NotXfsError; OSError for a descriptor that is none.
    """
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        raise NotXfsError("it is not a regular file")
    geometry = bytearray(_GEOMETRY_SIZE)
    try:
        fcntl.ioctl(fd, _GEOMETRY, geometry)
        return look_at_file(fd, str(uuid.UUID(bytes=bytes(geometry[_GEOMETRY_UUID]))))
    except OSError as err:
        raise NotXfsError("it is not on XFS") from err
