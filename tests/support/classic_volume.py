# SPDX-License-Identifier: Apache-2.0
"""A classic LVM volume with snapshots for tests, on the scratch disks that LAB_DISKS names."""

from __future__ import annotations

import mmap
import os
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from blocksnap.extents.changes import Changes, Parent
from blocksnap.extents.cow import CowBase, CowIdentity, CowStore, Exceptions, find_cow_changes
from blocksnap.system import blockdev, devmapper, lvm
from blocksnap.system.lvm_report import LvRecord, LvReport
from support.lvm_lab import GROUP, remove_group, scratch_disks, tool

BLOCK = 4096
MAPPER = "/dev/mapper"


@contextmanager
def classic_group(group: str = GROUP) -> Iterator[str]:
    """Make a volume group of all scratch disks, and take everything away again."""
    disks = scratch_disks()
    tool("vgcreate", "-y", group, *disks)
    try:
        yield group
    finally:
        remove_group(group, disks)


def make_volume(group: str, name: str, size: int, kind: str = "linear") -> None:
    """Make a volume of ``size`` bytes: linear, raid1, cache (by a pool), cachevol, writecache, integrity."""
    raid = {
        "raid1": ("--type", "raid1", "-m1"),
        "integrity": ("--type", "raid1", "-m1", "--raidintegrity", "y"),
    }
    tool("lvcreate", "-y", "-W", "n", *raid.get(kind, ()), "-L", f"{size}b", "-n", name, group)
    cached = f"{group}/{name}"
    if kind == "cache":
        tool("lvcreate", "-y", "--type", "cache-pool", "-L", "12M", "-n", "fast", group)
        tool("lvconvert", "-y", "--type", "cache", "--cachepool", "fast", cached)
    elif kind in ("cachevol", "writecache"):
        tool("lvcreate", "-y", "-L", "12M", "-n", "fast", group)
        tool("lvchange", "-an", f"{group}/fast")
        tool("lvconvert", "-y", "--type", kind.removesuffix("vol"), "--cachevol", "fast", cached)


@contextmanager
def open_direct(path: str, flags: int = os.O_RDONLY) -> Iterator[int]:
    """Open a device past the page cache."""
    fd = os.open(path, flags | os.O_DIRECT | os.O_CLOEXEC)
    try:
        yield fd
    finally:
        os.close(fd)


def read_device(path: str) -> bytes:
    """All bytes of a device, from the medium."""
    with open_direct(path) as fd:
        buffer = mmap.mmap(-1, blockdev.size_of(fd))
        assert os.preadv(fd, [buffer], 0) == len(buffer)
        return bytes(buffer)


class DirectWriter:
    """Writes blocks of 4 KiB past the page cache: when a write returns it was on the device."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._buffer = mmap.mmap(-1, BLOCK)

    def write(self, block: int, content: bytes) -> None:
        """Write one block."""
        self._buffer[:] = content
        assert os.pwritev(self._fd, [self._buffer], block * BLOCK) == BLOCK


def write_blocks(path: str, blocks: list[int], chance: random.Random) -> None:
    """Overwrite blocks with something new."""
    with open_direct(path, os.O_WRONLY) as fd:
        writer = DirectWriter(fd)
        for block in blocks:
            writer.write(block, chance.randbytes(BLOCK))


@dataclass
class ClassicVolume:
    """A linear volume and the snapshots of it."""

    group: str
    name: str

    @property
    def node(self) -> str:
        """The node of the volume."""
        return self.node_of(self.name)

    def node_of(self, name: str, suffix: str = "") -> str:
        """The node of a volume, or of an inner one (``-cow``, ``-real``)."""
        return f"{MAPPER}/{devmapper.encode_name(self.group, name)}{suffix}"

    def take(self, name: str, *, chunk: str = "4k", size: str = "32M", permission: str = "r") -> None:
        """Take a snapshot."""
        tool(
            *("lvcreate", "-y", "-s", "-p", permission, "-L", size, "-c", chunk),
            *("-n", name, f"{self.group}/{self.name}"),
        )

    def remove(self, *names: str) -> None:
        """Remove snapshots."""
        for name in names:
            tool("lvremove", "-y", f"{self.group}/{name}")

    def report(self) -> LvReport:
        """What LVM knows."""
        return lvm.report(self.group)

    def record(self, name: str, report: LvReport | None = None) -> LvRecord:
        """What LVM knows of one volume."""
        found = (report or self.report()).find(self.group, name)
        assert found is not None, name
        return found

    def identity(self, name: str, report: LvReport | None = None) -> CowIdentity:
        """What a backup of a snapshot would remember of it."""
        found = self.record(name, report)
        with open_direct(self.node_of(name)) as fd:
            size = blockdev.size_of(fd)
        return CowIdentity(
            vg_uuid=found.vg_uuid,
            lv_uuid=found.origin_uuid,
            snapshot_uuid=found.lv_uuid,
            snapshot_created=found.lv_time,
            chunk_size=found.chunk_size or 0,
            size=size,
            run=name,
        )

    def base(self, name: str, report: LvReport | None = None) -> CowBase:
        """A snapshot as the base of the next backup."""
        found = self.record(name, report)
        return CowBase(
            lv_uuid=found.lv_uuid,
            origin_uuid=found.origin_uuid,
            created=found.lv_time,
            chunk_size=found.chunk_size or 0,
            is_writable=found.lv_permissions != "read-only",
            is_merging=found.lv_merging is not False,
        )

    def status(self, name: str) -> devmapper.SnapshotStatus:
        """What device-mapper says of a snapshot."""
        number = devmapper.snapshot_above(os.stat(self.node_of(name, "-cow")).st_rdev)
        assert number is not None
        return devmapper.snapshot_status(number)

    @contextmanager
    def store(self, name: str) -> Iterator[CowStore]:
        """The exception store of a snapshot."""
        with open_direct(self.node_of(name, "-cow")) as fd:
            yield CowStore(fd, lambda: self.status(name))

    def changed_since(self, parent: CowIdentity, base: str, snapshot: str) -> Changes:
        """What ``snapshot`` has that the base does not, found as for a backup."""
        report = self.report()
        identity = self.identity(snapshot, report)
        with self.store(base) as store:
            return find_cow_changes(
                identity,
                identity.size,
                Parent(parent.size, parent.to_binding(), known_here=True, load_mapped=lambda: None),
                self.base(base, report),
                store,
            )


def covered(changes: Changes | Exceptions, unit: int) -> set[int]:
    """The numbers of the units of which something is in the answer."""
    return {
        number
        for extent in changes.changed
        for number in range(extent.offset // unit, -(-extent.end // unit))
    }


def differing(before: bytes, after: bytes, unit: int) -> set[int]:
    """The numbers of the units that are not the same; what only one has differs."""
    return {
        at // unit
        for at in range(0, max(len(before), len(after)), unit)
        if before[at : at + unit] != after[at : at + unit]
    }
