"""What a file has beside its bytes and mode, by descriptor: inode flags, shared extents."""

from __future__ import annotations

import errno
import fcntl
import struct

# linux/fs.h
_GET_FLAGS = 0x80086601
_SET_FLAGS = 0x40086602
_CLONE_RANGE = 0x4020940D
_GET_EXTENDED, _SET_EXTENDED = 0x801C581F, 0x401C5820
_EXTENDED_BYTES = 28
SYNC, IMMUTABLE, APPEND, NODUMP, NOATIME = 0x8, 0x10, 0x20, 0x40, 0x80
COMPRESS, NO_COMPRESS, DIRSYNC, NO_COW = 0x4, 0x400, 0x10000, 0x800000
"""FS_*_FL; chattr(1) has their letters."""
_EXTENDED = {IMMUTABLE: 0x8, APPEND: 0x10, SYNC: 0x20, NOATIME: 0x40, NODUMP: 0x80}
"""FS_XFLAG_* of these."""
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
            if not _set_extended(fd, flag) and not _set_one(fd, flag):
                refused |= flag
        except OSError as err:
            if err.errno not in _CANNOT:
                raise
            refused |= flag
    return refused


def _set_one(fd: int, flag: int) -> bool:
    answer = bytearray(8)
    fcntl.ioctl(fd, _GET_FLAGS, answer)
    has = struct.unpack_from("<I", answer)[0]
    if not has & flag:
        fcntl.ioctl(fd, _SET_FLAGS, struct.pack("<Q", has | flag))
        fcntl.ioctl(fd, _GET_FLAGS, answer)
    return bool(struct.unpack_from("<I", answer)[0] & flag)


def _set_extended(fd: int, flag: int) -> bool:
    """Set a flag by FS_IOC_FSSETXATTR, where that knows it; tell whether it is set.

    FS_IOC_SETFLAGS sets all flags at once, and btrfs then chooses the compression of an inode that has `c`
    anew, whatever its property says.
    """
    extended = _EXTENDED.get(flag)
    if extended is None:
        return False
    answer = bytearray(_EXTENDED_BYTES)
    try:
        fcntl.ioctl(fd, _GET_EXTENDED, answer)
        struct.pack_into("<I", answer, 0, struct.unpack_from("<I", answer)[0] | extended)
        fcntl.ioctl(fd, _SET_EXTENDED, bytes(answer))
        fcntl.ioctl(fd, _GET_EXTENDED, answer)
    except OSError as err:
        if err.errno not in _CANNOT:
            raise
        return False
    return bool(struct.unpack_from("<I", answer)[0] & extended)


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
