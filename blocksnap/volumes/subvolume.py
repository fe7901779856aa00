"""btrfs subvolumes: a read-only snapshot in an instant, and the tree tells which inodes changed.

The snapshot stands in the top directory of the filesystem, reached by a mount that nobody else sees, so
that the subvolume itself is not touched by it. It is removed after the run: nothing is kept for the next one
(``extents.btrfs`` has the reason why that is enough). It has no tags; what tells whose it is are its name,
the journal, and the source that the kernel says it was taken of.
"""

from __future__ import annotations

import contextlib
import errno
import os
import threading
import time
from collections.abc import Mapping
from hashlib import blake2b
from typing import Literal
from uuid import UUID

from blocksnap.errors import BlocksnapError
from blocksnap.extents import btrfs_witnesses
from blocksnap.extents.btrfs import SubvolumeParent, find_subvolume_changes
from blocksnap.extents.btrfs_changes import SubvolumeChanges
from blocksnap.extents.btrfs_identity import BtrfsIdentity
from blocksnap.extents.changes import BasePolicy, Binding
from blocksnap.system import btrfs, mounts
from blocksnap.system.btrfs_places import (
    TOP_TREE,
    NotReachedError,
    nested_subvolumes,
    open_inode,
    open_top,
)
from blocksnap.volumes.base import Ledger, Level, SnapshotTiming, Trace, VolumeKind
from blocksnap.volumes.errors import NoSuchVolumeError, SnapshotLostError

TRACE = "btrfs"
"""Kind of the traces that a run leaves in the journal."""
PREFIX = ".blocksnap-"
_LOOKS = 3
_PAUSE_SECONDS = 0.02
Left = Literal["removed", "nothing", "unreachable", "foreign"]


class SubvolumeVolume:
    """A btrfs subvolume, by the path of its top directory."""

    kind: VolumeKind = "subvolume"

    def __init__(self, path: str, *, is_nested: bool = False) -> None:
        """Look it up; raises NoSubvolumeError, BtrfsError.

        ``is_nested``: it was found in another and not named.
        """
        self._is_nested = is_nested
        self._path = os.path.realpath(path)
        fd = btrfs.open_subvolume(self._path)
        try:
            self._filesystem = btrfs.filesystem_info(fd).uuid
            self._info = btrfs.subvolume_info(fd)
            self._device = os.fstat(fd).st_dev
            room = os.fstatvfs(fd)
        finally:
            os.close(fd)
        self._size = (room.f_blocks - room.f_bfree) * room.f_frsize

    @property
    def name(self) -> str:
        """The path of its top directory; bytes that are no text are shown escaped."""
        return os.fsencode(self._path).decode(errors="backslashreplace")

    @property
    def key(self) -> str:
        """The UUIDs of filesystem and subvolume, which survive renaming and mounting elsewhere."""
        return f"btrfs:{self._filesystem}/{self._info.uuid}"

    @property
    def size(self) -> int:
        """What the whole filesystem holds: btrfs does not say it of one subvolume."""
        return self._size

    @property
    def snapshot_device(self) -> int | None:
        """What stat calls the device of its files; no block device has that number."""
        return self._device

    @property
    def is_top(self) -> bool:
        """Whether it is the one that a filesystem was made with, in which our snapshots stand."""
        return self._info.tree_id == TOP_TREE

    @property
    def read_only(self) -> bool:
        """Whether it is a snapshot, or else somebody has made it read-only."""
        return self._info.read_only

    def nested(self) -> list[SubvolumeVolume]:
        """Return the subvolumes in it, and those in these, as far as they can be reached by their paths."""
        found: list[SubvolumeVolume] = []
        fd = self._open()
        try:
            paths = [os.path.join(self._path, os.fsdecode(each.path)) for each in nested_subvolumes(fd)]
        finally:
            os.close(fd)
        for path in sorted(paths):
            try:
                volume = SubvolumeVolume(path, is_nested=True)
                found += [volume, *volume.nested()]
            except (btrfs.NoSubvolumeError, NoSuchVolumeError):
                # Something may be mounted over it; it may just be deleted.
                continue
            except btrfs.BtrfsError as err:
                # That is what the kernel says of one that was deleted while it was open.
                if err.errno != errno.ENOENT:
                    raise
        return found

    def has_gone(self) -> bool:
        """Tell whether it was found in another, and has been deleted since: one that was renamed has not."""
        if not self._is_nested:
            return False
        try:
            with open_top(self._filesystem) as top:
                for _ in range(_LOOKS):
                    if btrfs.has_name(top, self._info.tree_id):
                        return False
                    # While it is renamed it has none.
                    time.sleep(_PAUSE_SECONDS)
        except BlocksnapError:
            return False
        return True

    def trace(self, run: str) -> Trace | None:
        """Return the name that the snapshot of a run will have, and of what it is."""
        return {
            "kind": TRACE,
            "filesystem": str(self._filesystem),
            "source": str(self._info.uuid),
            "name": snapshot_name(run, self._info.uuid),
            "run": run,
        }

    def prepare(self) -> None:
        """See that the place for the snapshot can be reached, and write out what it would wait for."""
        with open_top(self._filesystem):
            os.close(self._open())
        self.flush()

    def flush(self) -> None:
        """Write out what is dirty in its filesystem; raises CommandError."""
        mounts.flush(self._path)

    def take_snapshot(self, run: str, ledger: Ledger | None = None) -> SubvolumeSnapshot:  # noqa: ARG002 - protocol
        """Take a read-only snapshot; it is on disk when this returns."""
        name = snapshot_name(run, self._info.uuid)
        with contextlib.ExitStack() as stack:
            source = self._open()
            stack.callback(os.close, source)
            before = btrfs.last_snapshot(source, self._info.tree_id)
            with open_top(self._filesystem) as top:
                began = time.time()
                btrfs.create_snapshot(source, top, name)
                fd = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=top)
            stack.callback(os.close, fd)
            timing = SnapshotTiming(taken_at=began, freeze_seconds=0.0)
            return SubvolumeSnapshot(self, name, run, timing, os.dup(fd), os.dup(source), before)

    def _open(self) -> int:
        with contextlib.ExitStack() as stack:
            fd = btrfs.open_subvolume(self._path)
            stack.callback(os.close, fd)
            if btrfs.subvolume_info(fd).uuid != self._info.uuid:
                raise NoSuchVolumeError(self._path, "it was replaced in this very moment")
            stack.pop_all()
        return fd

    @property
    def filesystem(self) -> UUID:
        """UUID of the filesystem."""
        return self._filesystem

    @property
    def uuid(self) -> UUID:
        """UUID of the subvolume."""
        return self._info.uuid


class SubvolumeSnapshot:
    """A read-only snapshot of a subvolume, held open."""

    def __init__(
        self,
        volume: SubvolumeVolume,
        name: str,
        run: str,
        timing: SnapshotTiming,
        fd: int,
        source_fd: int,
        last_snapshot: int,
    ) -> None:
        self._volume = volume
        self._name = name
        self._run = run
        self._timing = timing
        self._fd = fd
        self._source_fd = source_fd
        self._last_snapshot = last_snapshot
        self._info = btrfs.subvolume_info(fd)
        self._witnesses: Binding = {}
        self._removed = False
        self._lock = threading.Lock()
        room = os.fstatvfs(fd)
        self._free = room.f_bavail * room.f_frsize

    @property
    def timing(self) -> SnapshotTiming:
        """When it was taken; writers wait for the commit it is part of, which nobody sees."""
        return self._timing

    @property
    def binding(self) -> Binding:
        """Identity of filesystem, subvolume and snapshot, and once changes were asked for its witnesses."""
        identity = BtrfsIdentity.of(btrfs.filesystem_info(self._fd), self._info)
        return {**identity.to_binding(), "path": self._volume.name, "run": self._run, **self._witnesses}

    def find_tree_changes(self, parent: SubvolumeParent | None) -> SubvolumeChanges:
        """Ask the tree which inodes differ from the parent, and what of them."""
        found = find_subvolume_changes(self._fd, parent, last_snapshot=self._last_snapshot)
        self._witnesses = btrfs_witnesses.to_binding(found.witnesses)
        return found

    def open_file(self, inode: int) -> int:
        """Open a regular file of the snapshot by its inode number; raises OSError."""
        return open_inode(self._fd, self._info.tree_id, inode)

    def flush_source(self) -> None:
        """Write out and commit what is dirty in the filesystem; raises CommandError."""
        # By the snapshot: the subvolume may be gone by now.
        mounts.flush(f"/proc/{os.getpid()}/fd/{self._fd}")

    def source_is_as_it_was(self) -> bool:
        """Tell whether nothing that was written out since the snapshot changed the subvolume.

        Where all was written out before, it is then a snapshot of any later instant too, up to that. The
        kernel tells the generation of the last commit, and a write to a file shows in it only when the data
        is on the disk. Of one that has been deleted since nothing has to fit to the others.
        """
        try:
            now = btrfs.subvolume_info(self._source_fd)
        except btrfs.BtrfsError as err:
            if err.errno != errno.ENOENT:
                raise
            return True
        return now.generation <= self._info.snapshot_transaction

    def check(self) -> None:
        """Make sure that it is still there, and still read-only."""
        try:
            now = btrfs.subvolume_info(self._fd)
        except BlocksnapError as err:
            raise SnapshotLostError(self._volume.name, "it is gone") from err
        if now.uuid != self._info.uuid or not now.read_only:
            raise SnapshotLostError(self._volume.name, "it was made writable")
        if now.parent_uuid != self._volume.uuid:
            raise SnapshotLostError(self._volume.name, "it was taken of another subvolume")

    def levels(self) -> tuple[Level, ...]:
        """Return how much of the room that was free is used up: a snapshot keeps what is replaced."""
        room = os.fstatvfs(self._fd)
        free = room.f_bavail * room.f_frsize
        used = max(self._free - free, 0)
        return (Level(f"the filesystem of {self._volume.name}", "filesystem", used, self._free),)

    def drop(self) -> None:
        """Remove the snapshot, though it may be being read: its files cannot be opened any more."""
        self._delete()

    def decide_base(self, policy: BasePolicy) -> None:
        """No base is kept: what is remembered of the inodes does as well."""

    def settle(self, owner: str, *, stays: bool) -> None:
        """No base is kept."""

    def remove(self) -> None:
        """Remove the snapshot."""
        self._delete()
        for fd in (self._fd, self._source_fd):
            if fd >= 0:
                os.close(fd)
        self._fd = self._source_fd = -1

    def _delete(self) -> None:
        with self._lock:
            if not self._removed:
                trace = self._volume.trace(self._run) or {}
                left = remove_trace(trace)
                if left in ("unreachable", "foreign"):
                    raise SnapshotLostError(self._volume.name, f"{self._name} is {left}")
                self._removed = True


def snapshot_name(run: str, subvolume: UUID) -> str:
    """Return the name of the snapshot that a run takes of a subvolume: of no other run or subvolume."""
    digest = blake2b(f"{run}/{subvolume}".encode(), digest_size=5).hexdigest()
    prefix = "".join(letter for letter in run if letter.isalnum())[:12]
    return f"{PREFIX}{prefix}-{digest}"


def remove_trace(trace: Mapping[str, str]) -> Left:
    """Remove the snapshot that a trace in the journal announced, if it came to be; raises VolumeError.

    ``foreign`` is what has its name and is no snapshot of that subvolume; it is left alone. A filesystem
    that is not mounted is ``unreachable``.
    """
    return _look_up(trace, remove=True)


def find_trace(trace: Mapping[str, str]) -> Left:
    """Say what ``remove_trace`` would do, and do nothing; raises VolumeError."""
    return _look_up(trace, remove=False)


def snapshots_on(filesystem: UUID) -> list[str]:
    """Return the names of the snapshots of ours, of whatever run, that stand on a filesystem.

    Raises VolumeError.
    """
    with open_top(filesystem) as top:
        return sorted(name for name in os.listdir(top) if name.startswith(PREFIX))


def _look_up(trace: Mapping[str, str], *, remove: bool) -> Left:
    filesystem, source, name = UUID(trace["filesystem"]), UUID(trace["source"]), trace["name"]
    try:
        with open_top(filesystem) as top:
            try:
                fd = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=top)
            except FileNotFoundError:
                return "nothing"
            except OSError:
                return "foreign"
            try:
                info = btrfs.subvolume_info(fd)
                is_ours = os.fstat(fd).st_ino == btrfs.TOP_DIRECTORY and info.parent_uuid == source
            finally:
                os.close(fd)
            if not is_ours or not name.startswith(PREFIX):
                return "foreign"
            if remove:
                btrfs.delete_snapshot(top, name)
            return "removed"
    except NotReachedError:
        return "unreachable"
