"""What a file has beside its bytes and mode, by descriptor: inode flags, shared extents."""

from __future__ import annotations

import errno
import fcntl
import struct

# linux/fs.h
_GET_FLAGS = 0x80086601
_SET_FLAGS = 0x40086602
_CLONE_RANGE = 0x4020940D
SYNC, IMMUTABLE, APPEND, NODUMP, NOATIME = 0x8, 0x10, 0x20, 0x40, 0x80
COMPRESS, NO_COMPRESS, DIRSYNC, NO_COW = 0x4, 0x400, 0x10000, 0x800000
SETTABLE = SYNC | IMMUTABLE | APPEND | NODUMP | NOATIME | COMPRESS | NO_COMPRESS | DIRSYNC | NO_COW
"""The flags that are known here (FS_*_FL); chattr(1) has their letters."""
_CANNOT = frozenset({errno.EOPNOTSUPP, errno.ENOTTY, errno.EINVAL, errno.EXDEV, errno.ENOSYS})


def add_flags(fd: int, flags: int) -> int:
    """Set flags of an inode beside those that it has; return those that the filesystem does not have.

    Raises OSError.
    """
    refused = 0
    for bit in range(32):
        flag = flags & 1 << bit
        if not flag:
            continue
        try:
            answer = bytearray(8)
            fcntl.ioctl(fd, _GET_FLAGS, answer)
            has = struct.unpack_from("<I", answer)[0]
            if not has & flag:
                fcntl.ioctl(fd, _SET_FLAGS, struct.pack("<Q", has | flag))
                fcntl.ioctl(fd, _GET_FLAGS, answer)
                if not struct.unpack_from("<I", answer)[0] & flag:
                    refused |= flag
        except OSError as err:
            if err.errno not in _CANNOT:
                raise
            refused |= flag
    return refused


def clear_flags(fd: int, flags: int) -> None:
    """Take flags of an inode away, where it has any; raises OSError."""
    answer = bytearray(8)
    fcntl.ioctl(fd, _GET_FLAGS, answer)
    has = struct.unpack_from("<I", answer)[0]
    if has & flags:
        fcntl.ioctl(fd, _SET_FLAGS, struct.pack("<Q", has & ~flags))


def clone_range(source: int, offset: int, length: int, target: int, place: int) -> bool:
    """Let a file share a range of another (FICLONERANGE); False where that is not possible.

    The ends are on blocks of the filesystem, or both files end there. Raises OSError.
    """
    try:
        fcntl.ioctl(target, _CLONE_RANGE, struct.pack("<qQQQ", source, offset, length, place))
    except OSError as err:
        if err.errno in _CANNOT:
            return False
        raise
    return True
