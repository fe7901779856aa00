"""Two descriptors, read side by side: what differs, without anybody's metadata.

The judge of the engines that do not read, and the way where both states are at hand but nothing tells
what changed. It reads both; where the parent is in a repository, ``scan`` reads one.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

from blocksnap.extents.changes import Changes
from blocksnap.extents.model import ExtentList
from blocksnap.extents.scan import data_near

_BLOCK_SIZE = 4096


def compare_descriptors(base_fd: int, fd: int, *, block_size: int = _BLOCK_SIZE) -> Changes:
    """Say in which blocks one file or block device differs from another, which holds what the parent read.

    A block is ``block_size`` bytes, a multiple of 4096. What differs and is a hole now was discarded; with
    holes told by SEEK_DATA, a block device has none. Raises OSError that names the file and the byte that
    cannot be read.
    """
    from blocksnap._native import compare_files

    size, base_size = (os.lseek(each, 0, os.SEEK_END) for each in (fd, base_fd))
    differing = ExtentList(compare_files(base_fd, fd, block_size)[0]).clip(size)
    changed = ExtentList.of(_data_in(fd, differing))
    discarded = ExtentList.of(_rest(differing, changed))
    return Changes(
        "compare",
        "all of it was read, and compared with the base",
        inherits=True,
        allocated=changed.union(data_near(fd, discarded, size=size, parent_size=base_size)),
        changed=changed,
        discarded=discarded,
    )


def _data_in(fd: int, extents: ExtentList) -> Iterator[tuple[int, int]]:
    from blocksnap._native import data_extents

    for offset, length in extents.pairs():
        yield from ExtentList(data_extents(fd, offset, length)).pairs()


def _rest(extents: ExtentList, taken: ExtentList) -> Iterator[tuple[int, int]]:
    """Yield what of some extents is not in others, all of which lie within them."""
    inner = iter(taken)
    cut = next(inner, None)
    for extent in extents:
        at = extent.offset
        while cut is not None and cut.offset < extent.end:
            yield at, cut.offset - at
            at = cut.end
            cut = next(inner, None)
        yield at, extent.end - at
