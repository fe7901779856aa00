"""Where things are on a btrfs: the top of a filesystem, nested subvolumes, a file by its inode number.

The top is reached by a mount of its own that has no place in the tree of files: nobody else sees it, and
the kernel takes it away with the last descriptor, however the process ends (fsopen(2), Linux 5.2).
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final
from uuid import UUID

from blocksnap.errors import VolumeError
from blocksnap.system import sysfs
from blocksnap.system.btrfs import BtrfsError, filesystem_info, inode_generation
from blocksnap.system.mounts import mounts_of, read_mounts

# asm/unistd.h (the same everywhere since Linux 5), linux/mount.h
_SYS_FSOPEN, _SYS_FSCONFIG, _SYS_FSMOUNT = 430, 431, 432
_CLOEXEC: Final = 1
_SET_STRING, _CMD_CREATE = 1, 6
_NOSUID, _NODEV, _NOEXEC = 2, 4, 8
TOP_TREE: Final = 5
"""Id of the subvolume that a filesystem was made with (BTRFS_FS_TREE_OBJECTID)."""
# linux/btrfs.h
_SUBVOL_CREATE_V2 = 0x50009418
_GET_SUBVOL_ROOTREF = 0xD000943D
_INO_LOOKUP_USER = 0xD000943E
_VOLUME_ARGUMENTS = struct.Struct("<qQQ32s4040s")
_ROOT_REFS = 255
_LOOKUP_USER = struct.Struct("<QQ256s3824s")
# fs/btrfs/export.h, linux/exportfs.h: FILEID_BTRFS_WITHOUT_PARENT
_HANDLE = struct.Struct("<IiQQI")
_HANDLE_TYPE: Final = 0x4D
_HANDLE_BYTES: Final = 20
_SYSFS = Path("/sys/fs/btrfs")


class NotReachedError(VolumeError):
    """The top of a btrfs filesystem cannot be reached."""

    def __init__(self, filesystem: UUID, reason: str) -> None:
        self.filesystem = filesystem
        super().__init__(
            f"cannot reach the top of btrfs filesystem {filesystem}: {reason}",
            resolution="it has to be mounted for writing; run it as root, outside of a user namespace",
        )


@dataclass(frozen=True, slots=True)
class NestedSubvolume:
    """A subvolume that has its name in another: ``path`` is below that one's top directory."""

    tree_id: int
    path: bytes


@contextmanager
def open_top(filesystem: UUID) -> Iterator[int]:
    """Yield a descriptor of the top directory of a mounted filesystem, writable; raises NotReachedError.

    One that is mounted read-only is left so: until 6.8 a second mount for writing makes the kernel write to
    the filesystem under the first one too, and go on with a balance (fs/btrfs/super.c, btrfs_mount).
    """
    problem = "no device of it is known to the kernel"
    devices = list(_devices(filesystem))
    if _is_read_only(devices):
        raise NotReachedError(filesystem, "it is mounted read-only")
    for device in devices:
        try:
            fd = _mount_top(device)
        except OSError as err:
            problem = os.strerror(err.errno or 0)
            continue
        try:
            # The device may have become another's between the two looks.
            if filesystem_info(fd).uuid == filesystem:
                yield fd
                return
        finally:
            os.close(fd)
    raise NotReachedError(filesystem, problem)


def open_inode(subvolume_fd: int, tree_id: int, inode: int) -> int:
    """Open a regular file of a subvolume for reading, by its number, whatever its path; raises OSError.

    Needs CAP_DAC_READ_SEARCH (open_by_handle_at(2)) and CAP_SYS_ADMIN. Newer kernels take 0 for any
    generation, Linux 6.1 does not.
    """
    generation = inode_generation(subvolume_fd, tree_id, inode)
    handle = _HANDLE.pack(_HANDLE_BYTES, _HANDLE_TYPE, inode, tree_id, generation)
    flags = os.O_RDONLY | os.O_NOATIME | os.O_CLOEXEC | os.O_NONBLOCK
    return _answer(_libc().open_by_handle_at(subvolume_fd, ctypes.create_string_buffer(handle), flags))


def create_subvolume(folder_fd: int, name: str) -> None:
    """Make an empty subvolume and name it in a directory; raises BtrfsError."""
    arguments = _VOLUME_ARGUMENTS.pack(0, 0, 0, b"", os.fsencode(name))
    try:
        fcntl.ioctl(folder_fd, _SUBVOL_CREATE_V2, bytearray(arguments))
    except OSError as err:
        raise BtrfsError(f"make the subvolume {name}", err) from err


def nested_subvolumes(fd: int) -> list[NestedSubvolume]:
    """Return the subvolumes whose names are in the one that ``fd`` is in, not those in these."""
    found: list[NestedSubvolume] = []
    lowest = 0
    while True:
        answer = bytearray(4096)
        struct.pack_into("<Q", answer, 0, lowest)
        more = False
        try:
            fcntl.ioctl(fd, _GET_SUBVOL_ROOTREF, answer)
        except OSError as err:
            # More than fit into an answer.
            more = err.errno == errno.EOVERFLOW
            if not more:
                raise BtrfsError("list nested subvolumes", err) from err
        count = answer[8 + _ROOT_REFS * 16]
        for at in range(count):
            tree_id, directory = struct.unpack_from("<QQ", answer, 8 + at * 16)
            path = _nested_path(fd, tree_id, directory)
            if path is not None:
                found.append(NestedSubvolume(tree_id, path))
            lowest = tree_id + 1
        if not more or not count:
            return found


def _nested_path(fd: int, tree_id: int, directory: int) -> bytes | None:
    answer = bytearray(_LOOKUP_USER.pack(directory, tree_id, b"", b""))
    try:
        fcntl.ioctl(fd, _INO_LOOKUP_USER, answer)
    except OSError as err:
        if err.errno == errno.ENOENT:
            return None
        raise BtrfsError("find a nested subvolume", err) from err
    _, _, name, path = _LOOKUP_USER.unpack(answer)
    folder = bytes(path).partition(b"\0")[0]
    return folder + bytes(name).partition(b"\0")[0]


def _devices(filesystem: UUID) -> Iterator[str]:
    for found in sysfs.find(_SYSFS, f"{filesystem}/devices/*"):
        # A device mapper's has a link to it; the names in sysfs have ! for /.
        yield "/dev/" + found.name.replace("!", "/")


def _is_read_only(devices: list[str]) -> bool:
    """Whether a filesystem is mounted, as far as we see, and by nobody for writing."""
    table, found = read_mounts(), []
    for device in devices:
        with contextlib.suppress(OSError):
            found += mounts_of(os.stat(device).st_rdev, table)
    return bool(found) and all(mount.read_only for mount in found)


def _mount_top(device: str) -> int:
    libc = _libc()
    context = _answer(libc.syscall(_SYS_FSOPEN, b"btrfs", _CLOEXEC))
    try:
        for key, value in ((b"source", os.fsencode(device)), (b"subvolid", b"%d" % TOP_TREE)):
            _answer(libc.syscall(_SYS_FSCONFIG, context, _SET_STRING, key, value, 0))
        _answer(libc.syscall(_SYS_FSCONFIG, context, _CMD_CREATE, None, None, 0))
        mount = _answer(libc.syscall(_SYS_FSMOUNT, context, _CLOEXEC, _NOSUID | _NODEV | _NOEXEC))
    finally:
        os.close(context)
    try:
        return os.open(".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=mount)
    finally:
        os.close(mount)


def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def _answer(result: int) -> int:
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return result
