"""What changed in an image on btrfs, told by the extents of two clones.

The parent's clone was kept as the base, and the file was cloned again; ``btrfs.compare_files`` compares the
two by their EXTENT_DATA items. That the base holds what the parent backup read is proven as for XFS
(``fiemap``).

Without a base nothing is believed: unlike a snapshot of a subvolume, a clone that is gone leaves btrfs free
to write to the extents of a file without copy-on-write in place, with the same generation as before.
"""

from __future__ import annotations

import os

from blocksnap.errors import VolumeError
from blocksnap.extents.btrfs import compare_files
from blocksnap.extents.changes import Changes, Parent
from blocksnap.extents.clone_identity import doubt_about_base
from blocksnap.extents.scan import data_near, data_of, read_all
from blocksnap.system.btrfs import filesystem_info, subvolume_info
from blocksnap.system.clones import ClonedFile, look_at_file


def look_at(fd: int) -> ClonedFile:
    """Return what an open file of a btrfs is at this moment; raises BtrfsError, OSError."""
    return look_at_file(fd, f"{filesystem_info(fd).uuid}/{subvolume_info(fd).uuid}")


def find_clone_changes(base_fd: int | None, clone_fd: int, parent: Parent | None) -> Changes:
    """Say what of a clone to read.

    ``base_fd`` is the clone that was kept at the parent backup, if it is still there; ``clone_fd`` the new
    one, to which nobody writes. Raises VolumeError when somebody does, OSError when it cannot be looked at.
    """
    clone = look_at(clone_fd)
    found = _decide(base_fd, clone_fd, clone, parent)
    if isinstance(found, str):
        found = read_all(data_of(clone_fd, clone.size), found)
    if look_at(clone_fd) != clone:
        raise VolumeError(
            "the clone was written to, or its attributes changed, while its changes were looked for",
            resolution="run it again, and find out who works on the clones",
        )
    return found


def _decide(base_fd: int | None, clone_fd: int, clone: ClonedFile, parent: Parent | None) -> Changes | str:
    """Return the answer of the extents, or why there is none."""
    if parent is None:
        return "first backup of this volume"
    if base_fd is None:
        return "the parent's clone is not on this host any more"
    base = look_at(base_fd)
    doubt = doubt_about_base(base, clone, parent, "btrfs-clone")
    if doubt:
        return doubt
    try:
        found = compare_files(base_fd, os.fstat(base_fd).st_ino, clone_fd, clone.inode)
    except (OSError, VolumeError) as err:
        return f"the extents of the clones cannot be compared: {err}"
    if look_at(base_fd) != base:
        return "the base was changed while it was looked at"
    return Changes(
        "btrfs-tree",
        "the parent's clone was kept as base and nobody has touched it",
        inherits=True,
        allocated=found.changed.union(
            data_near(clone_fd, found.holes, size=clone.size, parent_size=parent.size)
        ),
        changed=found.changed,
        discarded=found.holes,
    )
