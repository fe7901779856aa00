"""btrfs by descriptor: what a subvolume is, its snapshots, and what the filesystem is doing.

A path is used once, to open. Layouts and numbers of the ioctls are those of linux/btrfs.h; none of them
needs a privilege that root in the initial user namespace does not have.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Final
from uuid import UUID

from blocksnap.errors import VolumeError
from blocksnap.system import sysfs

# linux/btrfs.h; the magic of all is 0x94, and the upper half-word is direction and size.
_SNAP_CREATE_V2 = 0x50009417
_TREE_SEARCH = 0xD0009411
_INO_LOOKUP = 0xD0009412
_WAIT_SYNC = 0x40089416
_START_SYNC = 0x80089418
_FS_INFO = 0x8400941F
_GET_SUBVOL_INFO = 0x81F8943C
_SNAP_DESTROY_V2 = 0x5000943F

_READ_ONLY: Final = 2
_BY_NUMBER: Final = 1 << 4
_ROOT_READ_ONLY: Final = 1
_VOLUME_ARGUMENTS = struct.Struct("<qQQ32s4040s")
_SUBVOLUME_INFO = struct.Struct("<Q256sQQQQ16s16s16sQQQQ64s64s")
_INO_LOOKUP_ARGUMENTS = struct.Struct("<QQ4080s")
_FILESYSTEM_INFO = struct.Struct("<QQ16sIII")
_SEARCH_KEY = struct.Struct("<7Q4I32x")
_SEARCH_BYTES = 4096
_SEARCH_HEADER = struct.Struct("<3Q2I")
# linux/btrfs_tree.h
_ROOT_TREE, _DATA_RELOCATION_TREE = 1, (1 << 64) - 9
_INODE_ITEM, _INODE_REF, _ROOT_ITEM, _ROOT_BACKREF = 1, 12, 132, 144
_INODE_STAMP = struct.Struct("<QQ36xI68xqI")
_ROOT_GENERATION_AT, _ROOT_LAST_SNAPSHOT_AT = 160, 200
NEVER_TOLD: Final = (1 << 64) - 1
"""Later than every transaction."""
_LONGEST_NAME = 255
TOP_DIRECTORY: Final = 256
"""Inode number of the top directory of every subvolume."""
_SYSFS = Path("/sys/fs/btrfs")
_FOREIGN = frozenset({errno.ENOTTY, errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS})


class BtrfsError(VolumeError):
    """A btrfs filesystem refused something."""

    def __init__(self, action: str, err: OSError) -> None:
        self.errno = err.errno
        missing = err.errno in (errno.EPERM, errno.EACCES)
        super().__init__(
            f"cannot {action}: {os.strerror(err.errno or 0)}",
            resolution="run it as root, outside of a user namespace" if missing else None,
        )


class NoSubvolumeError(VolumeError):
    """What was named is no btrfs subvolume."""

    def __init__(self, name: str) -> None:
        self.name = name
        super().__init__(
            f"{name} is no btrfs subvolume",
            resolution="name the top directory of a subvolume: btrfs subvolume list shows them",
        )


@dataclass(frozen=True, slots=True)
class SubvolumeInfo:
    """What the kernel knows of a subvolume or snapshot (BTRFS_IOC_GET_SUBVOL_INFO).

    ``parent_uuid`` is that of the subvolume a snapshot was taken of, ``snapshot_transaction`` (otransid)
    when: the source changes only in later ones. ``generation`` is the transaction that last wrote to its
    tree, which for a read-only one means moving blocks.
    """

    tree_id: int
    name: str
    generation: int
    read_only: bool
    uuid: UUID
    parent_uuid: UUID
    received_uuid: UUID
    changed_transaction: int
    snapshot_transaction: int


@dataclass(frozen=True, slots=True)
class FilesystemInfo:
    """What identifies a btrfs filesystem, and its smallest unit in bytes."""

    uuid: UUID
    sector_size: int


@dataclass(frozen=True, slots=True)
class InodeStamp:
    """What tells an inode and its last change: generation, transid, and ctime in nanoseconds."""

    generation: int
    transaction: int
    changed_at: int
    is_directory: bool


def open_subvolume(path: str) -> int:
    """Open the top directory of a subvolume; raises NoSubvolumeError, also for what is not there."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as err:
        raise NoSubvolumeError(path) from err
    try:
        if os.fstat(fd).st_ino != TOP_DIRECTORY:
            raise NoSubvolumeError(path)
        filesystem_info(fd, path)
    except BaseException:
        os.close(fd)
        raise
    return fd


def filesystem_info(fd: int, name: str = "it") -> FilesystemInfo:
    """Return what filesystem a descriptor is on; raises NoSubvolumeError when it is not btrfs."""
    answer = bytearray(1024)
    try:
        fcntl.ioctl(fd, _FS_INFO, answer)
    except OSError as err:
        if err.errno in _FOREIGN:
            raise NoSubvolumeError(name) from err
        raise BtrfsError("ask btrfs about itself", err) from err
    _, _, uuid, _, sector_size, _ = _FILESYSTEM_INFO.unpack_from(answer)
    return FilesystemInfo(UUID(bytes=uuid), sector_size)


def subvolume_info(fd: int) -> SubvolumeInfo:
    """Return what the kernel knows of the subvolume that a descriptor is in."""
    answer = bytearray(504)
    try:
        fcntl.ioctl(fd, _GET_SUBVOL_INFO, answer)
    except OSError as err:
        raise BtrfsError("ask btrfs about a subvolume", err) from err
    (
        tree_id, name, _, _, generation, flags, uuid, parent_uuid, received_uuid,
        changed_transaction, snapshot_transaction, _, _, _, _,
    ) = _SUBVOLUME_INFO.unpack_from(answer)  # fmt: skip
    return SubvolumeInfo(
        tree_id=tree_id,
        name=os.fsdecode(name.rstrip(b"\0")),
        generation=generation,
        read_only=bool(flags & _ROOT_READ_ONLY),
        uuid=UUID(bytes=uuid),
        parent_uuid=UUID(bytes=parent_uuid),
        received_uuid=UUID(bytes=received_uuid),
        changed_transaction=changed_transaction,
        snapshot_transaction=snapshot_transaction,
    )


def create_snapshot(source_fd: int, folder_fd: int, name: str) -> None:
    """Take a read-only snapshot of a subvolume and name it in a directory of the same filesystem.

    Whatever was written before, synced or not, is in it, and it is on disk when this returns.
    """
    arguments = _VOLUME_ARGUMENTS.pack(source_fd, 0, _READ_ONLY, b"", _plain(name))
    try:
        fcntl.ioctl(folder_fd, _SNAP_CREATE_V2, bytearray(arguments))
    except OSError as err:
        raise BtrfsError(f"take the snapshot {name}", err) from err


def delete_snapshot(folder_fd: int, name: str) -> None:
    """Delete a snapshot by its name in a directory; its blocks are given back later."""
    arguments = _VOLUME_ARGUMENTS.pack(0, 0, 0, b"", _plain(name))
    try:
        fcntl.ioctl(folder_fd, _SNAP_DESTROY_V2, bytearray(arguments))
    except OSError as err:
        raise BtrfsError(f"delete the snapshot {name}", err) from err


def delete_subvolume(folder_fd: int, fd: int) -> None:
    """Delete the subvolume that is open, whatever it is called by now, by a directory of its filesystem."""
    number = struct.pack("<Q", subvolume_info(fd).tree_id)
    arguments = _VOLUME_ARGUMENTS.pack(0, 0, _BY_NUMBER, b"", number)
    try:
        fcntl.ioctl(folder_fd, _SNAP_DESTROY_V2, bytearray(arguments))
    except OSError as err:
        raise BtrfsError("delete a subvolume", err) from err


def commit(fd: int) -> None:
    """Commit the running transaction of a filesystem and wait for it; dirty data is left alone.

    Until then the tree of a writable subvolume does not tell what its inodes are: their items are written
    late.
    """
    answer = bytearray(8)
    try:
        fcntl.ioctl(fd, _START_SYNC, answer)
        fcntl.ioctl(fd, _WAIT_SYNC, answer)
    except OSError as err:
        raise BtrfsError("commit the transaction of the filesystem", err) from err


def exclusive_operation(filesystem: UUID) -> str:
    """Return what a filesystem is busy with: ``none``, ``balance``, ``device remove`` ...

    ``none`` too where the kernel does not say (before 5.10).
    """
    try:
        return sysfs.exact_text(_SYSFS / str(filesystem) / "exclusive_operation").strip()
    except FileNotFoundError:
        return "none"


def last_relocation(fd: int) -> int:
    """Return the transaction in which the filesystem last found a new place for data that it moves.

    Whatever moves data (balance, shrinking, removing a device, reclaiming block groups) first writes it to an
    inode of the data relocation tree, commits, and only then lets files point there; so who reads an extent
    at a new place finds the move here. ``NEVER_TOLD`` where there is no such tree. Needs CAP_SYS_ADMIN.
    (kernel: fs/btrfs/relocation.c, create_reloc_inode, prepare_to_relocate)
    """
    generation = _root_field(
        fd, _DATA_RELOCATION_TREE, _ROOT_GENERATION_AT, "ask btrfs when it last moved data"
    )
    return NEVER_TOLD if generation is None else generation


def last_snapshot(fd: int, tree_id: int) -> int:
    """Return the transaction of the last snapshot that was taken of a subvolume, whether it still exists.

    It never goes back (a balance may set it to a later one); 0 where there is none. Needs CAP_SYS_ADMIN.
    (kernel: fs/btrfs/transaction.c, create_pending_snapshot; relocation.c, create_reloc_root)
    """
    return _root_field(fd, tree_id, _ROOT_LAST_SNAPSHOT_AT, "ask btrfs when a snapshot was taken") or 0


def has_name(fd: int, tree_id: int) -> bool:
    """Tell whether a subvolume has a name in another; one that is deleted loses it at once.

    Raises BtrfsError. Needs CAP_SYS_ADMIN. (kernel: fs/btrfs/inode.c, btrfs_unlink_subvol)
    """
    try:
        return _search(fd, _ROOT_TREE, tree_id, _ROOT_BACKREF) is not None
    except OSError as err:
        raise BtrfsError("look for a subvolume", err) from err


def inode_stamp(fd: int, tree_id: int, inode: int) -> InodeStamp | None:
    """Return what a tree has of an inode, None where it has none of that number; raises BtrfsError."""
    try:
        found = _search(fd, tree_id, inode, _INODE_ITEM)
    except OSError as err:
        raise BtrfsError(f"find inode {inode} of the subvolume", err) from err
    if found is None:
        return None
    generation, transaction, mode, seconds, nanoseconds = _INODE_STAMP.unpack_from(found.content)
    changed_at = seconds * 1_000_000_000 + nanoseconds
    return InodeStamp(generation, transaction, changed_at, is_directory=stat.S_ISDIR(mode))


def inode_directory(fd: int, tree_id: int, inode: int) -> int | None:
    """Return the number of a directory in which an inode has a name; None where that is not simply told.

    Raises BtrfsError.
    """
    try:
        found = _search(fd, tree_id, inode, _INODE_REF)
    except OSError as err:
        raise BtrfsError(f"find a name of inode {inode} of the subvolume", err) from err
    return None if found is None else found.offset


def inode_generation(fd: int, tree_id: int, inode: int) -> int:
    """Return the generation of an inode as the kernel shows it, in 32 bits.

    Raises OSError, ESTALE where there is no such inode. Needs CAP_SYS_ADMIN.
    """
    found = _search(fd, tree_id, inode, _INODE_ITEM)
    if found is None:
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
    return int(struct.unpack_from("<I", found.content)[0])


def _root_field(fd: int, tree_id: int, at: int, action: str) -> int | None:
    """Return a number of the ROOT_ITEM of a tree; None when there is no such tree."""
    try:
        found = _search(fd, _ROOT_TREE, tree_id, _ROOT_ITEM)
    except OSError as err:
        raise BtrfsError(action, err) from err
    return None if found is None else int(struct.unpack_from("<Q", found.content, at)[0])


@dataclass(frozen=True, slots=True)
class _Item:
    offset: int
    content: memoryview


def _search(fd: int, tree: int, number: int, kind: int) -> _Item | None:
    """Return the first item of a kind that a number has in a tree, None without one; raises OSError."""
    answer = bytearray(_SEARCH_BYTES)
    last = (1 << 64) - 1
    _SEARCH_KEY.pack_into(answer, 0, tree, number, number, 0, last, 0, last, kind, kind, 1, 0)
    fcntl.ioctl(fd, _TREE_SEARCH, answer)
    if not _SEARCH_KEY.unpack_from(answer)[9]:
        return None
    _, _, offset, _, _ = _SEARCH_HEADER.unpack_from(answer, _SEARCH_KEY.size)
    return _Item(offset, memoryview(answer)[_SEARCH_KEY.size + _SEARCH_HEADER.size :])


def directory_path(fd: int, inode: int) -> bytes:
    """Return the path of a directory below the top of the subvolume that ``fd`` is in.

    It has no slash at either end. Raises BtrfsError, with ENAMETOOLONG where the path has more than 4,000
    bytes. Needs CAP_SYS_ADMIN.
    """
    answer = bytearray(_INO_LOOKUP_ARGUMENTS.pack(0, inode, b""))
    try:
        fcntl.ioctl(fd, _INO_LOOKUP, answer)
    except OSError as err:
        raise BtrfsError(f"find inode {inode} of the subvolume", err) from err
    path: bytes = _INO_LOOKUP_ARGUMENTS.unpack(answer)[2]
    return path.partition(b"\0")[0].strip(b"/")


def _plain(name: str) -> bytes:
    encoded = os.fsencode(name)
    if not encoded or len(encoded) > _LONGEST_NAME or b"/" in encoded or b"\0" in encoded:
        raise ValueError(f"{name!r} is no file name")
    return encoded
