"""What changed in a btrfs subvolume, told by the kernel's own comparison: ``btrfs-send``.

BTRFS_IOC_SEND walks the trees of two read-only snapshots side by side and leaves out what they share. It
needs no common history, so it compares snapshots that ``btrfs-tree`` may not, such as those from before and
after a rollback; and as it decides in another way, each is the other's test. Which inodes differ, and which
bytes of files, comes from the stream; the rest of the records is read from the inodes' items, complete, so it
does not matter that a stream carries no inode flags in version 1 and no birth times.
"""

from __future__ import annotations

import errno
import os
import stat
from array import array
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from blocksnap.errors import VolumeError
from blocksnap.extents.btrfs_changes import (
    Change,
    InodeChange,
    InodeRemoval,
    SubvolumeChanges,
)
from blocksnap.extents.btrfs_records import read_records
from blocksnap.extents.btrfs_replay import Node, Replay, changed_ranges
from blocksnap.extents.model import ExtentList
from blocksnap.system.btrfs import BtrfsError, filesystem_info, subvolume_info

_BATCH = 1024
"""Inodes whose items are read at a time."""
_RECORDS = 4 << 20
"""Bytes of records after which a batch is cut."""
_ATTEMPTS = 5
_VERSIONS = Path("/sys/fs/btrfs/features/send_stream_version")
_NEWEST = 2


@dataclass(slots=True)
class _Touched:
    """What the stream did under one inode number: to the inode the parent had, and to a new one."""

    size: int | None = None
    """Of the parent's, in bytes; None when it had none."""
    before: list[Node] = field(default_factory=list)
    new: list[Node] = field(default_factory=list)
    is_directory: bool = False
    """Of the new one if there is one."""

    @property
    def may_be_gone(self) -> bool:
        """Whether a name was removed and nothing new has the number."""
        return not self.new and any(node.lost_a_name for node in self.before)


def stream_version() -> int:
    """Return the newest version of the send stream that this kernel writes and we read.

    The kernel tells in /sys/fs/btrfs/features/send_stream_version; one that does not knows only version 1.
    """
    try:
        return min(int(_VERSIONS.read_text()), _NEWEST)
    except (OSError, ValueError):
        return 1


def compare_by_send(
    fd: int, base_fd: int, *, remember: bool = False, version: int | None = None
) -> SubvolumeChanges:
    """Say how a read-only snapshot differs from an earlier one on the same filesystem.

    The kernel's comparison is over when this returns; the records are read while they are walked. With
    ``remember`` they have the states that a run without a base needs next time. ``version`` is that of the
    stream, by default the newest.

    Raises VolumeError when the two are not such a pair, when one of them is in use by a deduplication, or
    when the stream makes no sense.
    """
    filesystem, base = filesystem_info(fd), subvolume_info(base_fd)
    if filesystem.uuid != filesystem_info(base_fd).uuid:
        raise VolumeError(
            "the snapshots are on different filesystems, and btrfs compares only those of one",
            resolution="compare the volume in full",
        )
    if not (base.read_only and subvolume_info(fd).read_only):
        raise VolumeError(
            "only read-only snapshots can be compared",
            resolution="take read-only snapshots: btrfs subvolume snapshot -r",
        )
    used = version or stream_version()
    touched = _follow(fd, base_fd, base.tree_id, used)
    reason = f"the kernel compared it with the snapshot of transaction {base.snapshot_transaction}"
    walk = _Walk(fd, base_fd, filesystem.sector_size, touched, remember=remember).run()
    return SubvolumeChanges("btrfs-send", f"{reason} (send stream {used})", inherits=True, walk=walk)


def _follow(fd: int, base_fd: int, base_tree: int, version: int) -> dict[int, _Touched]:
    """Let the kernel compare, and return what was touched by inode number."""
    from blocksnap._native import btrfs_send

    try:
        return _by_number(Replay().follow(btrfs_send(fd, base_tree, version)), base_fd)
    except ValueError as err:
        raise VolumeError(
            f"the kernel's comparison of two btrfs snapshots makes no sense: {err}",
            resolution="compare the volume in full, and report this with the version of the kernel",
        ) from err
    except OSError as err:
        raise _refused(err) from err


def _refused(err: OSError) -> VolumeError:
    brief = "btrfs cannot compare the two snapshots"
    match err.errno:
        case errno.EAGAIN:
            return VolumeError(
                f"{brief} while files of one of them are being deduplicated",
                resolution="run it again when the deduplication is over",
            )
        case errno.EPERM:
            return VolumeError(
                f"{brief}: not permitted, or one was made writable",
                resolution="run it as root, outside of a user namespace, on read-only snapshots",
            )
        case errno.ENOENT:
            return VolumeError(f"{brief}: one of them was deleted", resolution="compare the volume in full")
    return VolumeError(f"{brief}: {err.strerror}", resolution="the kernel log may say more")


def _by_number(nodes: Sequence[Node], base_fd: int) -> dict[int, _Touched]:
    """Sort nodes by inode number, of which the parent's tree knows those of what it has.

    Raises ValueError when it has no such path, and VolumeError when something else is in its place.
    """
    device = os.fstat(base_fd).st_dev
    touched: dict[int, _Touched] = {}
    for node in nodes:
        if node.base is None:
            continue
        try:
            status = os.lstat(node.base, dir_fd=base_fd) if node.base else os.fstat(base_fd)
        except (FileNotFoundError, NotADirectoryError) as err:
            raise ValueError(f"{node.base!r} is named in a send stream, and the parent has none") from err
        if status.st_dev != device:
            raise VolumeError(
                f"something is mounted in the earlier snapshot, at or above {os.fsdecode(node.base)!r}",
                resolution="unmount it; nothing should be mounted in a snapshot",
            )
        inode = touched.setdefault(status.st_ino, _Touched())
        inode.size, inode.is_directory = status.st_size, stat.S_ISDIR(status.st_mode)
        inode.before.append(node)
    for node in (node for node in nodes if node.base is None):
        inode = touched.setdefault(node.number, _Touched())
        inode.is_directory = node.is_directory
        inode.new.append(node)
    return touched


class _Walk:
    """The answer: touched directories, what was removed, everything else."""

    def __init__(
        self, fd: int, base_fd: int, sector_size: int, touched: Mapping[int, _Touched], *, remember: bool
    ) -> None:
        self._fd = fd
        self._base_fd = base_fd
        self._sector_size = sector_size
        self._touched = touched
        self._remember = remember

    def run(self) -> Iterator[Change]:
        directories, others, doubtful = array("Q"), array("Q"), array("Q")
        for number, inode in sorted(self._touched.items()):
            (directories if inode.is_directory else others).append(number)
            if inode.may_be_gone and not inode.is_directory:
                doubtful.append(number)
        gone = yield from self._directories(directories)
        left = {record.number for record in self._records(doubtful)}
        gone |= {number for number in doubtful if number not in left}
        yield from map(InodeRemoval, sorted(gone))
        yield from self._others(array("Q", (number for number in others if number not in gone)))
        _require_unchanged(self._fd)

    def _directories(self, numbers: array[int]) -> Generator[Change, None, set[int]]:
        """Yield those that the snapshot has, and return the others."""
        gone = set(numbers)
        for record in self._records(numbers):
            gone.discard(record.number)
            yield record
        for number in gone:
            if not self._touched[number].may_be_gone:
                raise _missing(number)
        return gone

    def _others(self, numbers: array[int]) -> Iterator[InodeChange]:
        awaited = iter(numbers)
        for record in self._records(numbers):
            expected = next(awaited)
            if record.number != expected:
                raise _missing(expected)
            yield self._with_ranges(record) if record.is_file else record
        for number in awaited:
            raise _missing(number)

    def _with_ranges(self, record: InodeChange) -> InodeChange:
        """Put the stream's ranges in place of those that the items tell."""
        inode = self._touched[record.number]
        if record.is_new:
            changed, _ = changed_ranges(inode.new, record.attributes.size, None)
            return replace(record, changed=changed, holes=ExtentList())
        end = None if inode.size is None else (self._sector_size, inode.size)
        changed, holes = changed_ranges(inode.before, record.attributes.size, end)
        return replace(record, changed=changed, holes=holes)

    def _records(self, numbers: array[int]) -> Iterator[InodeChange]:
        """Read the items of some inodes; those that have no name any more are left out."""
        at = 0
        while at < len(numbers):
            records, done = self._read(numbers[at : at + _BATCH].tobytes())
            at += done
            for record in read_records(records):
                if record.attributes.nlink:
                    yield record

    def _read(self, packed: bytes) -> tuple[bytes, int]:
        """Read a batch, more than once if it is moved by a balance meanwhile."""
        from blocksnap._native import btrfs_diff

        problem = ""
        for _ in range(_ATTEMPTS):
            try:
                return btrfs_diff(
                    self._fd, self._base_fd, packed, b"", self._sector_size, self._remember, _RECORDS
                )
            except ValueError as err:
                problem = str(err)
            except OSError as err:
                raise VolumeError(f"cannot read the tree of a btrfs snapshot: {err.strerror}") from err
        raise VolumeError(
            f"the tree of a btrfs snapshot makes no sense: {problem}",
            resolution="run it again; if it stays so, look at the filesystem: btrfs scrub, kernel log",
        )


def _require_unchanged(fd: int) -> None:
    """Raise VolumeError when a snapshot has become writable: it may have been written to."""
    try:
        read_only = subvolume_info(fd).read_only
    except BtrfsError as err:
        # Deleted while it is open, which keeps its tree as it is.
        read_only = err.errno == errno.ENOENT
    if not read_only:
        raise VolumeError(
            "the snapshot was made writable while its changes were read",
            resolution="run it again, and find out who else works on the snapshots of this subvolume",
        )


def _missing(number: int) -> VolumeError:
    return VolumeError(
        f"the kernel's comparison of two btrfs snapshots names inode {number}, which is not there",
        resolution="compare the volume in full, and report this with the version of the kernel",
    )
