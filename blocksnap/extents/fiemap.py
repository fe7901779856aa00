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

The same looks at both files before and after make sure that they are what was compared.
"""

from __future__ import annotations

import os

from blocksnap.errors import VolumeError
from blocksnap.extents.changes import Changes, Parent
from blocksnap.extents.clone_identity import doubt_about_base
from blocksnap.extents.model import ExtentList
from blocksnap.extents.scan import data_near, data_of, read_all
from blocksnap.system.clones import ClonedFile
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
    """Return the answer of the maps, or why there is none."""
    if parent is None:
        return "first backup of this volume"
    if base_fd is None:
        return "the parent's clone is not on this host any more"
    try:
        base = look_at(base_fd)
    except NotXfsError as err:
        return f"the base is not the parent's clone: {err}"
    doubt = doubt_about_base(base, clone, parent, "xfs-clone")
    if doubt:
        return doubt
    try:
        changed, discarded = compare_maps(base_fd, clone_fd)
    except (OSError, ValueError) as err:
        return f"the maps of the clones cannot be compared: {err}"
    if look_at(base_fd) != base:
        return "the base was changed while it was looked at"
    return Changes(
        "fiemap",
        "the parent's clone was kept as base and nobody has touched it",
        inherits=True,
        allocated=changed.union(
            data_near(clone_fd, discarded, size=clone.size, parent_size=parent.size),
        ),
        changed=changed,
        discarded=discarded,
    )


def compare_maps(base_fd: int, clone_fd: int) -> tuple[ExtentList, ExtentList]:
    """Return what is data in the clone and not at the same place in the base, and what only the base has.

    Raises ValueError when the maps cannot be compared, OSError when the kernel does not tell them.
    """
    from blocksnap._native import fiemap_diff

    changed, discarded, _, _ = fiemap_diff(base_fd, clone_fd)
    return ExtentList(changed), ExtentList(discarded)
