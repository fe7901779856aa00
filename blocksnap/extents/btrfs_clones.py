"""What changed in an image on btrfs, told by the extents of two clones.

The parent's clone was kept as the base, and the file was cloned again; ``btrfs.compare_files`` compares the
two by their EXTENT_DATA items. That the base holds what the parent backup read is proven as for XFS
(``fiemap``).

Without a base nothing is believed: unlike a snapshot of a subvolume, a clone that is gone leaves btrfs free
to write to the extents of a file without copy-on-write in place, with the same generation as before.
"""

from __future__ import annotations

import os

from blocksnap.extents.btrfs import compare_files
from blocksnap.extents.changes import Changes, Parent
from blocksnap.extents.clone_changes import CloneEngine, find_clone_changes
from blocksnap.extents.model import ExtentList
from blocksnap.system.btrfs import BtrfsError, filesystem_info, subvolume_info
from blocksnap.system.clones import ClonedFile, look_at_file


def look_at(fd: int) -> ClonedFile:
    """Return what an open file of a btrfs is at this moment; raises BtrfsError, OSError."""
    return look_at_file(fd, f"{filesystem_info(fd).uuid}/{subvolume_info(fd).uuid}")


def find_btrfs_clone_changes(base_fd: int | None, clone_fd: int, parent: Parent | None) -> Changes:
    """Say what of a clone to read.

    ``base_fd`` is the clone that was kept at the parent backup, if it is still there; ``clone_fd`` the new
    one, to which nobody writes. Raises VolumeError when somebody does, OSError when it cannot be looked at.
    """
    engine = CloneEngine("btrfs-tree", "btrfs-clone", "extents", look_at, BtrfsError, _compare)
    return find_clone_changes(engine, base_fd, clone_fd, look_at(clone_fd), parent)


def _compare(base_fd: int, clone_fd: int) -> tuple[ExtentList, ExtentList]:
    found = compare_files(base_fd, os.fstat(base_fd).st_ino, clone_fd, os.fstat(clone_fd).st_ino)
    return found.changed, found.holes
