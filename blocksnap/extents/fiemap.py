"""What changed in an image on XFS, told by where the bytes of two clones lie.

The parent's clone was kept as the base, and the file was cloned again. Where both clones have the same
place of the device, the bytes are the same: as long as the base exists, a place of its is neither
overwritten nor given away (native/fiemap.h has the rule and its traps). Nothing has to be remembered of the
base but what it is, and nothing of the history has to be believed: two clones that both exist are compared
as they are. So all that has to be proven is that the base holds what the parent backup read.

* It is the same file: UUID of the filesystem, inode number, generation. A base that was removed and made
  anew has another generation.
* Nobody wrote to it: size, mtime and ctime are as remembered. Times alone move in ticks of some milliseconds,
  so the base is immutable (chattr +i) before it is remembered, and still is: nobody can write to it without
  taking that away, and that changes ctime. So does renaming, so it is remembered under its last name.
"""

from __future__ import annotations

import os

from blocksnap.extents.changes import Changes, Parent
from blocksnap.extents.clone_changes import CloneEngine, find_clone_changes
from blocksnap.extents.model import ExtentList
from blocksnap.extents.scan import data_of, read_all
from blocksnap.system.xfs import NotXfsError, look_at


def find_fiemap_changes(base_fd: int | None, clone_fd: int, parent: Parent | None) -> Changes:
    """Say what of a clone to read.

    ``base_fd`` is the clone that was kept at the parent backup, if it is still there; ``clone_fd`` the new
    one, to which nobody writes. Raises VolumeError when somebody does, OSError when it cannot be looked at.
    """
    try:
        clone = look_at(clone_fd)
    except NotXfsError as err:
        size = os.fstat(clone_fd).st_size
        return read_all(data_of(clone_fd, size), f"the clone's map cannot be believed: {err}")
    engine = CloneEngine("fiemap", "xfs-clone", "maps", look_at, NotXfsError, compare_maps)
    return find_clone_changes(engine, base_fd, clone_fd, clone, parent)


def compare_maps(base_fd: int, clone_fd: int) -> tuple[ExtentList, ExtentList]:
    """Return what is data in the clone and not at the same place in the base, and what only the base has.

    Raises ValueError when the maps cannot be compared, OSError when the kernel does not tell them.
    """
    from blocksnap._native import fiemap_diff

    changed, discarded, _, _ = fiemap_diff(base_fd, clone_fd)
    return ExtentList(changed), ExtentList(discarded)
