"""What the engine for classic snapshots believes of dm-snapshot, checked on the kernel itself.

Here the targets are put together by hand, so that what reaches the medium can be recorded, or slowed down.
"""

from __future__ import annotations

import os
import random
import struct
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import pytest

from blocksnap import _native
from blocksnap.extents.cow import CowStore, Doubt, read_exceptions
from blocksnap.system import devmapper
from support.classic_volume import BLOCK, DirectWriter, open_direct, write_blocks
from support.cow_store import CowStore as BuiltStore
from support.cow_store import read_entries
from support.log_writes import SECTOR, log_entries, target
from support.lvm_lab import scratch_disks
from support.standing import wait_until

MIB = 1 << 20
ORIGIN = 16 * MIB
STORE_AT, STORE = 32 * MIB, 16 * MIB
BLOCKS = ORIGIN // BLOCK


@pytest.fixture(scope="module")
def disk(_lab: None) -> str:
    return scratch_disks()[0]


@contextmanager
def snapshotted(below: str) -> Iterator[tuple[str, str, str]]:
    """An origin and a store on one device, with a snapshot: the origin, what it lies on, and the store."""
    with ExitStack() as stack:
        real = stack.enter_context(target("real", ORIGIN, f"linear {below} 0"))
        store = stack.enter_context(target("cow", STORE, f"linear {below} {STORE_AT // SECTOR}"))
        stack.enter_context(target("snapshot", ORIGIN, f"snapshot {real} {store} P 8"))
        yield stack.enter_context(target("origin", ORIGIN, f"snapshot-origin {real}")), real, store


def read_part(path: str, offset: int, length: int) -> bytes:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return os.pread(fd, length, offset)
    finally:
        os.close(fd)


def clear_store(disk: str, stale: BuiltStore) -> None:
    """Let the store hold what an older one left, but for its beginning, which LVM wipes."""
    fd = os.open(disk, os.O_RDWR | os.O_CLOEXEC)
    try:
        copy = os.memfd_create("stale")
        stale.write(copy)
        os.pwrite(fd, os.pread(copy, STORE, 0), STORE_AT)
        os.close(copy)
        os.pwrite(fd, bytes(BLOCK), STORE_AT)
        os.fsync(fd)
    finally:
        os.close(fd)


def stale_store() -> BuiltStore:
    """A list of 2,000 chunks, at the very places where the new one will be."""
    return BuiltStore([n * 2 + 1 for n in range(2000)], chunks=STORE // BLOCK)


def listed(fd: int) -> set[int]:
    """The blocks that the engine finds in a list; none before there is one."""
    try:
        packed = _native.cow_scan(fd, ORIGIN, 0)[0]
    except ValueError as err:
        assert "never initialised" in str(err)
        return set()
    pairs = struct.iter_unpack("<QQ", packed)
    return {at // BLOCK for begin, length in pairs for at in range(begin, begin + length, BLOCK)}


def write_synced(path: str, seed: int, count: int) -> None:
    """Overwrite random blocks, each on the medium before the next."""
    chance = random.Random(seed)
    with open_direct(path, os.O_WRONLY | os.O_DSYNC) as fd:
        writer = DirectWriter(fd)
        for _ in range(count):
            writer.write(chance.randrange(BLOCKS), chance.randbytes(BLOCK))


def test_no_write_reaches_the_medium_before_its_entry_in_the_list(disk: str) -> None:
    """At every point in the order of what reached the medium, what differs from the base is in the list.

    So it is after a power cut, too. Behind the list is an older one, which is never taken for a part of it.
    """
    log = scratch_disks()[1]
    clear_store(disk, stale_store())
    before = read_part(disk, 0, ORIGIN)
    medium = os.memfd_create("store")
    try:
        os.pwrite(medium, read_part(disk, STORE_AT, STORE), 0)
        with target("logged", 64 * MIB, f"log-writes {disk} {log}") as logged, snapshotted(logged) as nodes:
            writers = [threading.Thread(target=write_synced, args=(nodes[0], seed, 300)) for seed in range(3)]
            for writer in writers:
                writer.start()
            for writer in writers:
                writer.join()
        changed: set[int] = set()
        points = 0
        for entry in log_entries(log):
            offset, data = entry.offset, entry.data
            if not data or entry.mark is not None:
                continue
            points += 1
            if offset >= STORE_AT:
                os.pwrite(medium, data, offset - STORE_AT)
            else:
                changed |= {
                    (offset + at) // BLOCK
                    for at in range(0, len(data), BLOCK)
                    if data[at : at + BLOCK] != before[offset + at : offset + at + BLOCK]
                }
            assert changed <= listed(medium)
        assert listed(medium) == changed
        assert len(changed) > 3 * 256
        assert points > 2 * len(changed)
    finally:
        os.close(medium)


def test_a_merge_takes_entries_from_the_end(disk: str) -> None:
    """The device looks like one with a shorter list: that it is merged only device-mapper tells."""
    clear_store(disk, stale_store())
    chance = random.Random(11)
    with snapshotted(disk) as (origin, _, store):
        write_blocks(origin, chance.sample(range(BLOCKS), 600), chance)
        with open_direct(store) as fd:
            before = list(read_entries(fd))
    assert len(before) == 600
    with ExitStack() as stack:
        real = stack.enter_context(target("real", ORIGIN, f"linear {disk} 0"))
        store = stack.enter_context(target("cow", STORE, f"linear {disk} {STORE_AT // SECTOR}"))
        slow = stack.enter_context(target("slow", STORE, f"delay {store} 0 0 {store} 0 100"))
        stack.enter_context(target("merged", ORIGIN, f"snapshot-merge {real} {slow} P 8"))
        above = devmapper.snapshot_above(os.stat(slow).st_rdev)
        assert above is not None
        table = devmapper.snapshot_table(above)
        assert (table.is_merging, table.chunk_size) == (True, BLOCK)
        assert table.store == os.stat(slow).st_rdev
        with open_direct(store) as fd:
            left = before
            for _ in range(5):
                longer = len(left)
                assert wait_until(lambda: len(list(read_entries(fd))) < longer, 60)  # noqa: B023 - at once
                left = list(read_entries(fd))
                assert left == before[: len(left)]
                assert _native.cow_scan(fd, ORIGIN, 0)[2] <= len(left)
            status = devmapper.snapshot_status(above)
            found = read_exceptions(CowStore(fd, lambda: devmapper.snapshot_status(above)), ORIGIN, BLOCK)
        assert status.state == "merging"
        assert isinstance(found, Doubt)
        assert "being merged" in found.reason
    assert left
