"""The system calls that Python has no function for, as tests of btrfs use them.

Numbers and layouts are those of include/uapi/linux/fs.h, fsverity.h and btrfs.h.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import struct

FICLONE = 0x40049409
FICLONERANGE = 0x4020940D
FIDEDUPERANGE = 0xC0189436
FS_IOC_GETFLAGS = 0x80086601
FS_IOC_SETFLAGS = 0x40086602
FS_IOC_GETVERSION = 0x80087601
BTRFS_IOC_SYNC = 0x9408
BTRFS_IOC_SNAP_DESTROY = 0x5000940F
BTRFS_IOC_DEFRAG_RANGE = 0x40309410
BTRFS_IOC_SNAP_CREATE_V2 = 0x50009417
BTRFS_IOC_SUBVOL_CREATE_V2 = 0x50009418
BTRFS_IOC_SUBVOL_SETFLAGS = 0x4008941A

SUBVOL_RDONLY = 2

FALLOC_KEEP_SIZE = 1
FALLOC_PUNCH_HOLE = 2
FALLOC_ZERO_RANGE = 16

RENAME_NOREPLACE = 1
RENAME_EXCHANGE = 2
RENAME_WHITEOUT = 4

FLAG_SYNC = 0x8
FLAG_IMMUTABLE = 0x10
FLAG_APPEND = 0x20
FLAG_NODUMP = 0x40
FLAG_NOATIME = 0x80
FLAG_COMPRESS = 0x4
FLAG_NOCOMPRESS = 0x400
FLAG_DIRSYNC = 0x10000
FLAG_NODATACOW = 0x800000
FLAG_VERITY = 0x100000

_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]
_AT_FDCWD = -100


def _checked(result: int) -> None:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def fallocate(fd: int, mode: int, offset: int, length: int) -> None:
    """Punch, zero or preallocate a range, as ``mode`` says."""
    _checked(_libc.fallocate(fd, mode, offset, length))


def rename_with(flags: int, old: str, new: str) -> None:
    """Rename otherwise: exchange two names, leave a whiteout, or do not replace."""
    _checked(_libc.renameat2(_AT_FDCWD, os.fsencode(old), _AT_FDCWD, os.fsencode(new), flags))


def clone(source: int, target: int) -> None:
    """Let one file share all of the other's extents."""
    fcntl.ioctl(target, FICLONE, source)


def clone_range(source: int, offset: int, length: int, target: int, target_offset: int) -> None:
    """Let a range of one file share the other's extents; length 0 means up to the end."""
    fcntl.ioctl(target, FICLONERANGE, struct.pack("<qQQQ", source, offset, length, target_offset))


def dedupe_range(source: int, offset: int, length: int, target: int, target_offset: int) -> int:
    """Share a range of equal content; return 0, 1 when it differs, or -errno."""
    request = bytearray(struct.pack("<QQHHI qQQiI", offset, length, 1, 0, 0, target, target_offset, 0, 0, 0))
    fcntl.ioctl(source, FIDEDUPERANGE, request)
    status: int = struct.unpack_from("<i", request, 48)[0]
    return status


def inode_flags(fd: int) -> int:
    """Return the flags that lsattr shows."""
    answer = bytearray(8)
    fcntl.ioctl(fd, FS_IOC_GETFLAGS, answer)
    return int.from_bytes(answer[:4], "little")


def set_inode_flags(fd: int, flags: int) -> None:
    """Set the flags that chattr sets, all of them."""
    fcntl.ioctl(fd, FS_IOC_SETFLAGS, flags.to_bytes(8, "little"))


def inode_generation(fd: int) -> int:
    """Return the low 32 bits of the transaction in which the inode was made."""
    answer = bytearray(8)
    fcntl.ioctl(fd, FS_IOC_GETVERSION, answer)
    return int.from_bytes(answer[:4], "little")


def defragment(fd: int, offset: int, length: int, *, compression: int = 0) -> None:
    """Rewrite a range of a file; compression is 0 (none asked for), 1 zlib, 2 lzo or 3 zstd."""
    start_io, compress = 2, 1
    flags = start_io | (compress if compression else 0)
    fcntl.ioctl(
        fd,
        BTRFS_IOC_DEFRAG_RANGE,
        struct.pack("<QQQII4I", offset, length, flags, 1 << 18, compression, *[0] * 4),
    )


def sync_filesystem(fd: int) -> None:
    """Commit the filesystem's running transaction."""
    fcntl.ioctl(fd, BTRFS_IOC_SYNC)


def _subvolume_arguments(fd: int, name: str, flags: int) -> bytearray:
    return bytearray(struct.pack("<qQQ32s4040s", fd, 0, flags, b"", os.fsencode(name)))


def create_subvolume(path: str) -> None:
    """Make an empty subvolume."""
    with _Folder(os.path.dirname(path)) as parent:
        fcntl.ioctl(parent, BTRFS_IOC_SUBVOL_CREATE_V2, _subvolume_arguments(0, os.path.basename(path), 0))


def snapshot(source: str, path: str, *, read_only: bool = True) -> None:
    """Make a snapshot of the subvolume at ``source``, named ``path``."""
    with _Folder(source) as fd, _Folder(os.path.dirname(path)) as parent:
        flags = SUBVOL_RDONLY if read_only else 0
        fcntl.ioctl(parent, BTRFS_IOC_SNAP_CREATE_V2, _subvolume_arguments(fd, os.path.basename(path), flags))


def delete_subvolume(path: str) -> None:
    """Delete a subvolume or snapshot; its blocks are given back later, in the background."""
    with _Folder(os.path.dirname(path)) as parent:
        request = bytearray(struct.pack("<q4088s", 0, os.fsencode(os.path.basename(path))))
        fcntl.ioctl(parent, BTRFS_IOC_SNAP_DESTROY, request)


def set_read_only(path: str, *, read_only: bool) -> None:
    """Make a subvolume read-only or writable."""
    with _Folder(path) as fd:
        fcntl.ioctl(fd, BTRFS_IOC_SUBVOL_SETFLAGS, (SUBVOL_RDONLY if read_only else 0).to_bytes(8, "little"))


class _Folder:
    """A directory, open as long as it is used."""

    def __init__(self, path: str) -> None:
        self._fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)

    def __enter__(self) -> int:
        return self._fd

    def __exit__(self, *_: object) -> None:
        os.close(self._fd)
