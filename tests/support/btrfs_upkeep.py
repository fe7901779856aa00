"""The operations of btrfs_work on the filesystem: flushing, defragmenting, balancing, snapshots of others.

They take from some hundred microseconds to a second, so they are chosen rarely.
"""

from __future__ import annotations

import errno
import os
import subprocess
from collections.abc import Callable

from support import btrfs_calls as calls
from support.btrfs_operations import opened
from support.btrfs_work import Operation, Workload

OPERATIONS: dict[str, tuple[float, Operation]] = {}
"""What needs nothing but the subvolume."""
WITH_SNAPSHOTS: dict[str, tuple[float, Operation]] = {}
"""What makes or deletes snapshots beside the subvolume."""


def upkeep(weight: float, table: dict[str, tuple[float, Operation]]) -> Callable[[Operation], Operation]:
    def add(function: Operation) -> Operation:
        table[function.__name__] = (weight, function)
        return function

    return add


@upkeep(0.5, OPERATIONS)
def sync(work: Workload) -> None:
    fd = os.open(work.root, os.O_RDONLY | os.O_CLOEXEC)
    try:
        calls.sync_filesystem(fd)
    finally:
        os.close(fd)


@upkeep(1, OPERATIONS)
def defragment(work: Workload) -> None:
    with opened(work, work.some_file()) as fd:
        offset, length = work.random.choice(((0, (1 << 64) - 1), work.place(work.size(fd))))
        calls.defragment(fd, offset, length, compression=work.random.randrange(4))


@upkeep(0.05, OPERATIONS)
def defragment_all(work: Workload) -> None:
    # It complains about files that are immutable, and goes on.
    argv = [
        "btrfs",
        "filesystem",
        "defragment",
        "-r",
        *work.random.choice(([], ["-czstd"], ["-clzo"])),
        work.root,
    ]
    subprocess.run(argv, check=False, capture_output=True)


@upkeep(0.04, OPERATIONS)
def balance(work: Workload) -> None:
    what = work.random.choice((["--full-balance"], ["-d"], ["-m"], ["-dusage=80"], ["-musage=80"]))
    argv = ["btrfs", "balance", "start", "--force", *what, work.root]
    done = subprocess.run(argv, check=False, capture_output=True, text=True)
    if "No space left" in done.stderr:
        # A small filesystem that is nearly full has nowhere to move blocks to.
        raise OSError(errno.ENOSPC, done.stderr)
    assert done.returncode == 0, (argv, done.stderr)


@upkeep(0.3, OPERATIONS)
def make_nested_subvolume(work: Workload) -> None:
    """In a snapshot it shows as an empty directory with inode number 2."""
    name = work.new_name()
    calls.create_subvolume(work.path(name))
    work.foreign.append(work.path(name))


@upkeep(0.5, WITH_SNAPSHOTS)
def snapshot_by_others(work: Workload) -> None:
    path = f"{work.beside}/foreign-{work.random.getrandbits(60):x}"
    calls.snapshot(work.root, path, read_only=work.random.random() < 0.5)
    work.foreign.append(path)
    if len(work.foreign) > 4:
        delete_snapshot_by_others(work)


@upkeep(0.2, WITH_SNAPSHOTS)
def snapshot_inside_its_source(work: Workload) -> None:
    """Its name enters the source in the transaction of the snapshot itself, but after the copy."""
    path = work.path(f"{work.some_folder() or '.'}/inside-{work.random.getrandbits(60):x}")
    calls.snapshot(work.root, path)
    work.foreign.append(path)
    if len(work.foreign) > 4:
        delete_snapshot_by_others(work)


@upkeep(0.4, WITH_SNAPSHOTS)
def delete_snapshot_by_others(work: Workload) -> None:
    """Its blocks become free, and what is written next may get the same addresses."""
    if not work.foreign:
        return
    path = work.foreign.pop(work.random.randrange(len(work.foreign)))
    # It may have moved with its directory, or gone with it; then it is left alone.
    calls.delete_subvolume(path)
