"""Files and devices that track no changes: what holds data, and everything of it is compared by hash."""

from __future__ import annotations

from blocksnap.extents.changes import Changes, Parent
from blocksnap.extents.model import ExtentList


def scan_file(fd: int, size: int, parent: Parent | None) -> Changes:
    """Return what of a file holds data; holes are told by the file system (SEEK_DATA)."""
    from blocksnap._native import data_extents

    return compare_all(
        size, parent, allocated=ExtentList(data_extents(fd, 0, size)).clip(size), what="a file"
    )


def compare_all(
    size: int, parent: Parent | None, *, allocated: ExtentList | None = None, what: str = "a device"
) -> Changes:
    """Return the answer for a source that can only be read and compared."""
    allocated = ExtentList.whole(size) if allocated is None else allocated
    reason = f"{what} does not tell what changed" if parent else "first backup of this volume"
    return Changes(
        "compare", reason, inherits=False, allocated=allocated, changed=allocated, discarded=ExtentList()
    )
