"""Show what the engines for files see: fiemap, and compare for devices too."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager

from blocksnap.errors import BlocksnapError, UsageError
from blocksnap.extents.model import ExtentList
from blocksnap.operations.inspection import Inspection, Stopwatch, open_to_read
from blocksnap.system.xfs import NotXfsError, look_at


class FilesUnreadableError(BlocksnapError):
    """The kernel would not tell, or not let us read."""

    def __init__(self, err: OSError) -> None:
        super().__init__(str(err.args[-1]), resolution="look for I/O errors in the kernel log (dmesg)")


def inspect_fiemap_diff(base: str, later: str) -> Inspection:
    """Compare where the bytes of two files of one XFS lie.

    Raises UsageError when they are not that, or not only places on the device.
    """
    from blocksnap._native import fiemap_diff

    with open_to_read(base) as base_fd, open_to_read(later) as fd:
        _require_xfs(base, base_fd)
        _require_xfs(later, fd)
        watch = Stopwatch()
        with _converted(f"cannot compare the maps of {base} and {later}"):
            changed, discarded, base_records, records = fiemap_diff(base_fd, fd)
        seconds = watch.seconds
    written, gone = ExtentList(changed), ExtentList(discarded)
    facts = {
        "written_bytes": written.total,
        "discarded_bytes": gone.total,
        "discarded_count": len(gone),
        "base_records": base_records,
        "records": records,
    }
    return Inspection("fiemap", "the maps of two files compared", written.union(gone), seconds, facts)


def inspect_compare(base: str, later: str, *, block_size: int, direct: bool) -> Inspection:
    """Read two files or devices and compare them.

    Raises UsageError when they are neither, FilesUnreadableError when they cannot be read.
    """
    from blocksnap._native import compare_files

    with open_to_read(base, direct=direct) as base_fd, open_to_read(later, direct=direct) as fd:
        watch = Stopwatch()
        with _converted(f"cannot compare {base} and {later}"):
            changed, base_bytes, later_bytes = compare_files(base_fd, fd, block_size)
        seconds = watch.seconds
    facts = {"block_size": block_size, "base_read_bytes": base_bytes, "read_bytes": later_bytes}
    return Inspection("compare", "both were read and compared", ExtentList(changed), seconds, facts)


def _require_xfs(path: str, fd: int) -> None:
    try:
        look_at(fd)
    except NotXfsError as err:
        raise UsageError(
            f"the map of {path} says nothing about its bytes: {err}",
            resolution="blocksnap debug compare reads both files instead",
        ) from err


@contextmanager
def _converted(what: str) -> Iterator[None]:
    try:
        yield
    except ValueError as err:
        raise UsageError(f"{what}: {err}") from err
    except OSError as err:
        if err.errno == errno.ENOTBLK:
            raise UsageError(f"{what}: not both are regular files or block devices") from err
        raise FilesUnreadableError(err) from err
