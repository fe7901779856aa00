"""A descriptor against the parent's map: what holds data is read, and the chunks' ids tell what differs.

The way of everything that tracks no changes, and of everything else in doubt. Here it is decided what to
read; the pipeline reads, names the chunks, and takes over from the parent what has the same name.
"""

from __future__ import annotations

from blocksnap.extents.changes import Changes, Parent, neighbourhood
from blocksnap.extents.model import ExtentList


def scan_file(fd: int, size: int, parent: Parent | None) -> Changes:
    """Return what of a file holds data; holes are told by the file system (SEEK_DATA)."""
    return compare_all(size, parent, allocated=data_of(fd, size), what="a file")


def compare_all(
    size: int, parent: Parent | None, *, allocated: ExtentList | None = None, what: str = "a device"
) -> Changes:
    """Return the answer for a source that can only be read and compared."""
    allocated = ExtentList.whole(size) if allocated is None else allocated
    return read_all(
        allocated, f"{what} does not tell what changed" if parent else "first backup of this volume"
    )


def read_all(allocated: ExtentList, reason: str) -> Changes:
    """Return the answer that takes over nothing of a parent unread."""
    return Changes(
        "compare", reason, inherits=False, allocated=allocated, changed=allocated, discarded=ExtentList()
    )


def data_of(fd: int, size: int) -> ExtentList:
    """Return what of a file holds data (SEEK_DATA); of a block device, which cannot tell, everything."""
    from blocksnap._native import data_extents

    return ExtentList(data_extents(fd, 0, size)).clip(size)


def data_near(fd: int, discarded: ExtentList, *, size: int, parent_size: int) -> ExtentList:
    """Return what of a file holds data near what was discarded and near the ends (``Changes.allocated``)."""
    from blocksnap._native import data_extents

    windows = neighbourhood(discarded, size=size, parent_size=parent_size)
    return ExtentList(b"".join(data_extents(fd, offset, length) for offset, length in windows.pairs()))
