"""The protocols that every kind of volume meets.

A ``Volume`` is what the administrator protects; its ``Snapshot`` is the kernel's frozen view of it.
A kind of volume is one module here and, where it tracks changes, one in ``extents``. Volumes make
and remove snapshots but never decide when: that is the controller's part, which journals
``Volume.trace`` before ``take_snapshot`` so that a crash leaves nothing behind that nobody knows.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol, TypeGuard, cast

from blocksnap.extents.changes import BaseDecision, BasePolicy, Binding, Changes, Parent
from blocksnap.volumes.errors import NoImageError

if TYPE_CHECKING:
    from blocksnap.extents.btrfs import SubvolumeParent
    from blocksnap.extents.btrfs_changes import SubvolumeChanges

VolumeKind = Literal["thin", "classic", "subvolume", "image", "device", "file", "luks-header"]
Trace = dict[str, str]
"""What a snapshot will be called on the host, enough to find and remove it after a crash."""


@dataclass(frozen=True, slots=True)
class SnapshotTiming:
    """When a snapshot was taken and how long the volume's writers stood still for it.

    ``taken_at`` is seconds of CLOCK_REALTIME at the instant the snapshot holds, as near as it can
    be told; ``freeze_seconds`` the observed suspension.
    """

    taken_at: float
    freeze_seconds: float


@dataclass(frozen=True, slots=True)
class VolumeLimits:
    """What a job says of the snapshots of its volumes, as far as it concerns taking them."""

    pool_data_percent: float = 95.0
    """No snapshot is taken in a thin pool that is fuller than this."""
    pool_metadata_percent: float = 90.0
    store_percent: float = 15.0
    """Of a classic volume, for the exception store of its snapshot; more where more is written."""
    quiet_files: bool = False
    """Files of which no clone can be made are read although somebody has them open for writing."""


FillingPart = Literal["pool data", "pool metadata", "store", "filesystem"]


@dataclass(frozen=True, slots=True)
class Level:
    """How full something is that a snapshot fills: of which thing, which part, and in which units."""

    of: str
    part: FillingPart
    used: int
    total: int


class Ledger(Protocol):
    """Where a snapshot writes down what it leaves on the host for a while, beside itself."""

    def add(self, trace: Trace) -> None:
        """Write it down, durably, before it comes to be."""
        ...

    def strike(self, trace: Trace) -> None:
        """It is gone."""
        ...


class Snapshot(Protocol):
    """A point-in-time view of one volume."""

    @property
    def timing(self) -> SnapshotTiming:
        """When it was taken."""
        ...

    @property
    def binding(self) -> Binding:
        """Identity of the source at this instant, for the manifest."""
        ...

    def check(self) -> None:
        """Raise VolumeError when the snapshot cannot be trusted; called at first and before the commit."""
        ...

    def levels(self) -> Sequence[Level]:
        """Return how full is what the snapshot fills; called all the time, from another thread.

        Raises VolumeError when that is in a state in which nobody can write to it any more.
        """
        ...

    def drop(self) -> None:
        """Remove the snapshot at once, from another thread, though it may be being read: reads end there.

        Raises BlocksnapError. ``remove`` may be called afterwards.
        """
        ...

    def decide_base(self, policy: BasePolicy) -> BaseDecision | None:
        """Decide, right before the commit, whether to stay as the base of the next backup.

        None for a kind that has no use for a base. Raises BlocksnapError, which means that it does not stay.
        """
        ...

    def settle(self, owner: str, *, stays: bool) -> None:
        """Once the backup is committed: become a base of ``owner``, or not, and remove its bases before.

        A snapshot that stays is not removed by ``remove`` any more. Raises BlocksnapError.
        """
        ...

    def remove(self) -> None:
        """Remove the snapshot from the host; a second call does nothing."""
        ...


class ImageSnapshot(Snapshot, Protocol):
    """A snapshot that is a row of bytes."""

    @property
    def size(self) -> int:
        """Size in bytes."""
        ...

    def find_changes(self, parent: Parent | None) -> Changes:
        """Say what to read; ``parent`` None asks for everything allocated."""
        ...

    def open_reader(self) -> AbstractContextManager[int]:
        """Make the content readable and yield a descriptor, opened read-only.

        The descriptor bypasses the page cache (O_DIRECT) when it is a block device: offsets, lengths and
        buffers are to be multiples of 4096 (the tail of a device that is no such multiple is read buffered).
        The snapshot is active only inside the ``with`` block.
        """
        ...


class TreeSnapshot(Snapshot, Protocol):
    """A snapshot that is a tree of files."""

    def find_tree_changes(self, parent: SubvolumeParent | None) -> SubvolumeChanges:
        """Say which inodes to read, and what of them; ``parent`` None asks for everything."""
        ...

    def open_file(self, inode: int) -> int:
        """Open a regular file by its inode number; raises OSError."""
        ...

    def flush_source(self) -> None:
        """Write out what is dirty in the filesystem of the volume; raises BlocksnapError."""
        ...

    def source_is_as_it_was(self) -> bool:
        """Tell whether nothing that was written out since the snapshot changed the volume."""
        ...


def as_image(snapshot: Snapshot) -> ImageSnapshot:
    """Return a snapshot that is a row of bytes; raises NoImageError for any other."""
    if is_tree(snapshot):
        raise NoImageError
    return cast("ImageSnapshot", snapshot)


def is_tree(snapshot: Snapshot) -> TypeGuard[TreeSnapshot]:
    """Tell whether a snapshot is a tree of files."""
    return hasattr(snapshot, "find_tree_changes")


def holds_snapshots(volume: Volume) -> bool:
    """Tell whether snapshots of other volumes are made in it: taking them changes it, so it comes last."""
    return bool(getattr(volume, "is_top", False))


def has_gone(volume: Volume) -> bool:
    """Tell whether a volume that nobody named, but that is in one that was named, is not there any more."""
    asked = getattr(volume, "has_gone", None)
    return asked is not None and bool(asked())


class Volume(Protocol):
    """Something that can be backed up."""

    @property
    def name(self) -> str:
        """How people call it: ``vg0/postgres``, ``/srv/disk.img``."""
        ...

    @property
    def key(self) -> str:
        """What stays the same from backup to backup and belongs to no other volume.

        ``lvm:VGUUID/LVUUID``, ``btrfs:FSUUID/UUID``, ``luks:UUID`` or ``HOSTID:path``; parents are
        looked up by it.
        """
        ...

    @property
    def kind(self) -> VolumeKind:
        """Which kind it is."""
        ...

    @property
    def size(self) -> int:
        """Current size in bytes."""
        ...

    @property
    def snapshot_device(self) -> int | None:
        """Number of the device that a snapshot is taken of, None where none is: it is read as it is."""
        ...

    def trace(self, run: str) -> Trace | None:
        """Return what ``take_snapshot`` will leave on the host for run ``run``; None when nothing."""
        ...

    def prepare(self) -> None:
        """Look whether a snapshot can be taken; called for all volumes of a run before the first snapshot.

        Raises VolumeError (exit code 14) when the volume is not in a state to be backed up.
        """
        ...

    def take_snapshot(self, run: str, ledger: Ledger) -> Snapshot:
        """Take a snapshot that carries the tags ``blocksnap`` and ``blocksnap.<run>``.

        ``ledger`` is for what has to be left on the host while the snapshot is looked at.

        Raises VolumeError (exit code 14) when the volume is not in a state to be backed up.
        """
        ...
