"""Give a restored inode what its record says: owner, mode, extended attributes, times, flags.

In this order, because each of them undoes something of those behind it: a new owner takes capabilities away,
a mode changes an ACL, and everything changes a time; what is immutable takes nothing more. Nothing is opened
that is no regular file or directory, and no symbolic link is followed.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Iterable
from typing import Final

from blocksnap.repository.inodes import InodeRecord
from blocksnap.restore.unkept import Unkept
from blocksnap.system import file_attributes as flags

# linux/btrfs_tree.h: inode flags
_NODATACOW, _NOCOMPRESS, _SYNC, _IMMUTABLE, _APPEND = 2, 8, 32, 64, 128
_NODUMP, _NOATIME, _DIRSYNC, _COMPRESS = 256, 512, 1024, 2048
_NAMES: Final = (
    (_NODATACOW, flags.NO_COW, "nodatacow (chattr +C)"),
    (_COMPRESS, flags.COMPRESS, "compress (chattr +c)"),
    (_NOCOMPRESS, flags.NO_COMPRESS, "nocompress (chattr +m)"),
    (_SYNC, flags.SYNC, "sync (chattr +S)"),
    (_DIRSYNC, flags.DIRSYNC, "dirsync (chattr +D)"),
    (_NODUMP, flags.NODUMP, "nodump (chattr +d)"),
    (_NOATIME, flags.NOATIME, "noatime (chattr +A)"),
    (_APPEND, flags.APPEND, "append-only (chattr +a)"),
    (_IMMUTABLE, flags.IMMUTABLE, "immutable (chattr +i)"),
)
_EARLY = _NODATACOW | _COMPRESS | _NOCOMPRESS | _DIRSYNC
"""What only counts for data that is written afterwards, and what sets the compression anew."""
FINAL: Final = _APPEND | _IMMUTABLE
"""What forbids to change an inode, and to give it further names."""
_PROPERTIES = b"btrfs."
_CANNOT = frozenset({errno.EOPNOTSUPP, errno.EPERM, errno.EINVAL, errno.ENOSPC, errno.ERANGE, errno.E2BIG})
_LARGEST_TIME: Final = (1 << 63) - 1
Xattrs = Iterable[tuple[bytes, bytes]]


def prepare_file(fd: int, record: InodeRecord, xattrs: Xattrs, path: bytes, unkept: Unkept) -> None:
    """Set on an empty file what has to be there before its data; raises OSError."""
    if not record.flags & _NODATACOW:
        # A filesystem that is mounted so makes all files so.
        with contextlib.suppress(OSError):
            flags.clear_flags(fd, flags.NO_COW)
    _set_flags(fd, record.flags & _EARLY, path, unkept)
    for name, value in xattrs:
        if name.startswith(_PROPERTIES):
            _set_xattr(fd, name, value, path, unkept)


def finish_open(
    fd: int, record: InodeRecord, xattrs: Xattrs, path: bytes, unkept: Unkept, *, may_be_final: bool = True
) -> None:
    """Give a file or directory that is complete the rest; raises OSError."""
    is_owned = True
    try:
        os.fchown(fd, record.uid, record.gid)
    except OSError as err:
        _pass(err, "owner", path, unkept)
        is_owned = False
    os.fchmod(fd, _mode(record, path, unkept, is_owned=is_owned))
    if record.is_directory:
        # Before the property: chattr +c sets that to the algorithm of the mount.
        _set_flags(fd, record.flags & _EARLY, path, unkept)
    for name, value in xattrs:
        if record.is_directory or not name.startswith(_PROPERTIES):
            _set_xattr(fd, name, value, path, unkept)
    os.utime(fd, ns=_times(record, path, unkept))
    _see_time(os.stat(fd), record, path, unkept)
    late = record.flags & ~_EARLY
    _set_flags(fd, late if may_be_final else late & ~FINAL, path, unkept)


def set_final(fd: int, record: InodeRecord, path: bytes, unkept: Unkept) -> None:
    """Make an inode immutable or append-only, if it was; raises OSError."""
    _set_flags(fd, record.flags & FINAL, path, unkept)


def finish_by_name(
    folder: int, name: bytes, record: InodeRecord, xattrs: Xattrs, path: bytes, unkept: Unkept
) -> None:
    """Give a link, node, fifo or socket its attributes, without opening it; raises OSError."""
    is_owned = True
    try:
        os.chown(name, record.uid, record.gid, dir_fd=folder, follow_symlinks=False)
    except OSError as err:
        _pass(err, "owner", path, unkept)
        is_owned = False
    if not stat.S_ISLNK(record.mode):
        os.chmod(name, _mode(record, path, unkept, is_owned=is_owned), dir_fd=folder)
    place = b"/proc/self/fd/%d/%s" % (folder, name)
    for key, value in xattrs:
        try:
            os.setxattr(place, key, value, follow_symlinks=False)
        except OSError as err:
            _pass(err, f"extended attribute {os.fsdecode(key)}", path, unkept)
    os.utime(name, ns=_times(record, path, unkept), dir_fd=folder, follow_symlinks=False)
    _see_time(os.stat(name, dir_fd=folder, follow_symlinks=False), record, path, unkept)
    if record.flags & FINAL:
        unkept.note("flags of what is neither file nor directory", path)


def _mode(record: InodeRecord, path: bytes, unkept: Unkept, *, is_owned: bool) -> int:
    """Return the mode: what runs as its owner or group must not run as those of whoever restores it."""
    mode = stat.S_IMODE(record.mode)
    special = mode & (stat.S_ISUID | stat.S_ISGID)
    if special and not is_owned:
        unkept.note("set-user-ID or set-group-ID, without its owner", path)
        return mode & ~special
    return mode


def _set_xattr(fd: int, name: bytes, value: bytes, path: bytes, unkept: Unkept) -> None:
    try:
        os.setxattr(fd, name, value)
    except OSError as err:
        _pass(err, f"extended attribute {os.fsdecode(name)}", path, unkept)


def _set_flags(fd: int, wanted: int, path: bytes, unkept: Unkept) -> None:
    for own, flag, name in _NAMES:
        if not wanted & own:
            continue
        try:
            refused = flags.add_flags(fd, flag)
        except OSError as err:
            _pass(err, f"flag {name}", path, unkept)
            continue
        # btrfs sets nocompress itself on what it could not compress; elsewhere nothing is compressed anyway.
        if refused and own != _NOCOMPRESS:
            unkept.note(f"flag {name}", path)


def _times(record: InodeRecord, path: bytes, unkept: Unkept) -> tuple[int, int]:
    limit = _LARGEST_TIME
    found = (record.atime, record.mtime)
    if any(abs(time) > limit for time in found):
        unkept.note("time that is out of range", path)
    return max(min(found[0], limit), -limit), max(min(found[1], limit), -limit)


def _see_time(status: os.stat_result, record: InodeRecord, path: bytes, unkept: Unkept) -> None:
    """The kernel cuts a time that the filesystem has no room for, and says nothing."""
    if abs(record.mtime) < _LARGEST_TIME and status.st_mtime_ns != record.mtime:
        unkept.note("modification time to the nanosecond", path)


def _pass(err: OSError, what: str, path: bytes, unkept: Unkept) -> None:
    """What the filesystem cannot keep is noted; anything else ends the restore."""
    if err.errno not in _CANNOT:
        raise err
    unkept.note(what, path)
