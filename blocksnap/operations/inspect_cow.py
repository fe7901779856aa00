"""Show what the engine for classic snapshots sees, on the store of an active one or on an image."""

from __future__ import annotations

import os
import stat

from blocksnap.errors import UsageError, VolumeError
from blocksnap.extents.cow import CowStore, Doubt, Exceptions, read_exceptions
from blocksnap.operations.inspection import Inspection, Stopwatch, open_to_read
from blocksnap.system import devmapper


class UntrustedStoreError(VolumeError):
    """An exception store does not say what changed."""

    def __init__(self, device: str, problem: str) -> None:
        self.device = device
        self.problem = problem
        super().__init__(
            f"{device} does not tell what changed: {problem}",
            resolution="give the -cow device of a valid snapshot (see dmsetup ls) or an image of one",
        )


def inspect_cow_extents(device: str, *, origin_size: int | None, settled_areas: int | None) -> Inspection:
    """List the chunks of an origin that were written since a snapshot of it was made.

    On the store of an active snapshot, device-mapper is asked as for a backup. Raises UsageError when the
    device cannot be opened, UntrustedStoreError when it is no exception store or one that may be incomplete.
    """
    with open_to_read(device, direct=True) as fd:
        above = _snapshot_above(fd)
        if above is not None and settled_areas is not None:
            raise UsageError(f"{device} is in use, and device-mapper knows how many areas are full")
        store = _TimedStore(fd, lambda: devmapper.snapshot_status(above or 0))
        if above is None:
            reason = "the store of a snapshot that is not active"
            found = _scan_image(device, store, origin_size or 0, settled_areas or 0)
        else:
            reason = "the store of an active snapshot"
            found = _read_active(device, store, above, origin_size or 0)
    return Inspection(
        "cow",
        reason,
        found.changed,
        store.seconds,
        {
            "chunk_size": found.chunk_size,
            "exceptions": found.count,
            "areas": found.areas,
            "allocated_bytes": found.allocated,
            "metadata_bytes": found.metadata,
        },
    )


class _TimedStore(CowStore):
    """Counts the time of the engine, without that of asking device-mapper."""

    seconds = 0.0

    def scan(self, origin_size: int, settled_areas: int) -> Exceptions:
        watch = Stopwatch()
        try:
            return super().scan(origin_size, settled_areas)
        finally:
            self.seconds += watch.seconds


def _snapshot_above(fd: int) -> int | None:
    status = os.fstat(fd)
    return devmapper.snapshot_above(status.st_rdev) if stat.S_ISBLK(status.st_mode) else None


def _scan_image(device: str, store: CowStore, origin_size: int, settled_areas: int) -> Exceptions:
    try:
        return store.scan(origin_size, settled_areas)
    except ValueError as err:
        raise UntrustedStoreError(device, str(err)) from err
    except OSError as err:
        raise UntrustedStoreError(device, f"it cannot be read: {err.strerror}") from err


def _read_active(device: str, store: CowStore, above: int, origin_size: int) -> Exceptions:
    try:
        table = devmapper.snapshot_table(above)
    except ValueError as err:
        raise UntrustedStoreError(device, str(err)) from err
    if table.store != store.number:
        raise UntrustedStoreError(device, "it is not the exception store of what lies on it")
    found = read_exceptions(store, origin_size, table.chunk_size)
    if isinstance(found, Doubt):
        raise UntrustedStoreError(device, found.reason)
    return found
