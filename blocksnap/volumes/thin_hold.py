"""Make a thin pool hold a metadata snapshot for a while: the way to read one that never stands still.

There is one place for it in a pool, it survives the death of who took it, and while it is taken the pool's
metadata grows. So it is the last resort; it is written down before it is taken and after, and what a killed
run left is released only where the held block is byte for byte the one that this run saw: others use that
place too (kernel: Documentation/admin-guide/device-mapper/thin-provisioning.rst).
"""

from __future__ import annotations

import mmap
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import blake2b
from typing import Literal

from blocksnap.errors import VolumeError
from blocksnap.system import blockdev, devmapper
from blocksnap.system.command import CommandError, CommandTimeoutError, interrupts_deferred
from blocksnap.system.lvm_report import LvReport
from blocksnap.volumes.base import Ledger, Trace

HOLD = "hold"
_BLOCK_SIZE = 4096
_ATTEMPTS = 5
_PAUSE_SECONDS = 1.0

Leftover = Literal["gone", "released", "unclear", "inactive"]


class MetadataHeldError(VolumeError):
    """Somebody else has the pool's only metadata snapshot."""

    def __init__(self, pool: str) -> None:
        self.pool = pool
        super().__init__(
            f"thin pool {pool} commits faster than its metadata can be read, and another holds its metadata "
            "snapshot",
            resolution="run it again; if nobody else should hold it: "
            "dmsetup message VG-POOL-tpool 0 release_metadata_snap",
        )


@contextmanager
def hold_metadata(fd: int, number: int, trace: Trace, ledger: Ledger) -> Iterator[int]:
    """Hold the metadata of the pool ``number`` (its ``-tpool`` device), and yield the block of the snapshot.

    ``fd`` is its metadata device, ``trace`` says which pool it is. Raises MetadataHeldError.
    """
    wish = {**trace, "kind": HOLD, "block": "", "digest": ""}
    held: Trace | None = None
    in_doubt = False
    ledger.add(wish)
    try:
        for attempt in range(_ATTEMPTS):
            if attempt:
                time.sleep(_PAUSE_SECONDS)
            # Between the pool's answer and our note of it nothing may come: nobody would know whose it is.
            with interrupts_deferred():
                held = _take(fd, number, wish, ledger)
            if held is not None:
                break
        else:
            raise MetadataHeldError(trace["pool"])
        yield int(held["block"])
    except CommandTimeoutError:
        in_doubt = True
        raise
    finally:
        if held is not None:
            devmapper.release_metadata_snapshot(number)
            ledger.strike(held)
        elif not in_doubt:
            ledger.strike(wish)


def release_leftover(trace: Trace, report: LvReport) -> Leftover:
    """Release what a dead run held, if it is held still and is the same; raises BlocksnapError.

    ``unclear`` when the run died between its wish and its note, and the pool holds something now;
    ``inactive`` when the pool cannot be asked.
    """
    pool = report.find_uuid(trace.get("pool_uuid", ""))
    metadata = report.find_uuid(pool.metadata_lv_uuid) if pool else None
    if metadata is None:
        return "gone"
    number = devmapper.pool_above(metadata.number) if metadata.number is not None else None
    if metadata.number is None or number is None:
        return "inactive"
    block = devmapper.pool_status(number).held_root
    if block is None:
        return "gone"
    if not trace.get("block"):
        return "unclear"
    fd = blockdev.open_by_number(metadata.number)
    try:
        if (str(block), _digest(fd, block)) != (trace["block"], trace.get("digest")):
            return "gone"
    finally:
        os.close(fd)
    devmapper.release_metadata_snapshot(number)
    return "released"


def _take(fd: int, number: int, wish: Trace, ledger: Ledger) -> Trace | None:
    """Reserve the metadata snapshot and write down which it is; None while another has it."""
    try:
        devmapper.reserve_metadata_snapshot(number)
    except CommandError as err:
        if "busy" not in err.message:
            raise
        return None
    try:
        block = devmapper.pool_status(number).held_root or 0
        held = {**wish, "block": str(block), "digest": _digest(fd, block)}
        ledger.add(held)
        ledger.strike(wish)
    except BaseException:
        devmapper.release_metadata_snapshot(number)
        raise
    return held


def _digest(fd: int, block: int) -> str:
    """Return what tells one copy of the superblock from others: the pool's counters and roots are in it."""
    buffer = mmap.mmap(-1, _BLOCK_SIZE)
    os.preadv(fd, [buffer], block * _BLOCK_SIZE)
    return blake2b(buffer, digest_size=16).hexdigest()
