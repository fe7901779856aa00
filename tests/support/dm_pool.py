# SPDX-License-Identifier: Apache-2.0
"""A thin pool without LVM on top, where a snapshot costs milliseconds, and what the tools say of it.

LVM's commands take half a second each in the lab, and what they do to a pool are the same messages.
"""

from __future__ import annotations

import mmap
import os
import random
import re
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from xml.etree import ElementTree as ET

from blocksnap import _native
from blocksnap.extents.model import ExtentList
from support.lvm_lab import scratch_disks, tool
from support.thin_metadata import BLOCK_SIZE, Pool

PREFIX = "bs-test-"
SECTOR = 512
_METADATA_SECTORS = 8192
_DATA_SECTORS = 1 << 20


def read_metadata(node: str, held_root: int = 0) -> Pool:
    """Read all of a metadata device past the page cache; with ``held_root``, as of that metadata snapshot."""
    fd = os.open(node, os.O_RDONLY | os.O_DIRECT)
    try:
        size = os.lseek(fd, 0, os.SEEK_END)
        buffer = mmap.mmap(-1, size)
        assert os.preadv(fd, [buffer], 0) == size
    finally:
        os.close(fd)
    image = bytearray(buffer)
    if held_root:
        image[:BLOCK_SIZE] = image[held_root * BLOCK_SIZE : (held_root + 1) * BLOCK_SIZE]
    return Pool(bytes(image))


def held_root(pool: str) -> int:
    """Return the block of the metadata snapshot that a pool holds; 0 for none."""
    words = tool("dmsetup", "status", "--noflush", pool).split()
    return int(words[6].replace("-", "0"))


@contextmanager
def holding(pool: str) -> Iterator[int]:
    """Make a pool hold a metadata snapshot."""
    tool("dmsetup", "message", pool, "0", "reserve_metadata_snap")
    try:
        yield held_root(pool)
    finally:
        tool("dmsetup", "message", pool, "0", "release_metadata_snap")


def diff(fd: int, first: int, second: int, held: int = 0) -> tuple[ExtentList, ExtentList]:
    """Return what the C core says changed from one device to another, and what only the first maps."""
    changed, discarded, _ = _native.thin_diff(fd, first, second, 0, 1 << 20, held)
    return ExtentList(changed), ExtentList(discarded)


def delta_by_tool(
    metadata: str, first: int, second: int, chunk_size: int, *, live: bool = True
) -> tuple[ExtentList, ExtentList]:
    """Return what ``thin_delta`` says changed from one device to another, and what only the first maps."""
    text = tool(
        "thin_delta", *(["-m"] if live else []), "--thin1", str(first), "--thin2", str(second), metadata
    )
    changed, gone = [], []
    for each in ET.fromstring(text).iter():  # noqa: S314 - the tool's own
        place = (int(each.get("begin", 0)) * chunk_size, int(each.get("length", 0)) * chunk_size)
        if each.tag in ("different", "right_only"):
            changed.append(place)
        elif each.tag == "left_only":
            gone.append(place)
    return ExtentList.of(changed), ExtentList.of(gone)


def delta_by_model(pool: Pool, first: int, second: int) -> tuple[ExtentList, ExtentList]:
    """The same, told by the reference model."""
    before, after = pool.mappings(first), pool.mappings(second)
    size = pool.chunk_size
    changed = [c for c, (block, _) in after.items() if before.get(c, (None, 0))[0] != block]
    gone = [c for c in before if c not in after]
    return tuple(ExtentList.of((c * size, size) for c in sorted(each)) for each in (changed, gone))  # type: ignore[return-value]


@dataclass
class DmPool:
    """A pool with one volume, snapshots by id, and a generator of what may happen to them."""

    metadata: str
    chunk_size: int
    dice: random.Random
    nr_chunks: int = 600
    next_id: int = 1
    snapshots: list[int] = field(default_factory=list)

    @property
    def name(self) -> str:
        """The pool's name, for messages."""
        return f"{PREFIX}pool"

    @property
    def node(self) -> str:
        """The volume's node."""
        return f"/dev/mapper/{PREFIX}volume"

    def message(self, text: str) -> None:
        """Send a message to the pool."""
        tool("dmsetup", "message", f"/dev/mapper/{self.name}", "0", text)

    def start(self) -> None:
        """Make device 0 and activate it."""
        self.message("create_thin 0")
        sectors = self.nr_chunks * self.chunk_size // SECTOR
        tool("dmsetup", "create", f"{PREFIX}volume", "--table", f"0 {sectors} thin /dev/mapper/{self.name} 0")

    def snapshot(self) -> int:
        """Take a snapshot of the volume, as LVM does, and return its id."""
        tool("dmsetup", "suspend", f"{PREFIX}volume")
        try:
            self.message(f"create_snap {self.next_id} 0")
        finally:
            tool("dmsetup", "resume", f"{PREFIX}volume")
        self.snapshots.append(self.next_id)
        self.next_id += 1
        return self.snapshots[-1]

    def write(self, count: int) -> None:
        """Write small and large pieces here and there, some clustered."""
        size = self.nr_chunks * self.chunk_size
        fd = os.open(self.node, os.O_WRONLY)
        try:
            for _ in range(count):
                length = self.dice.choice([512, 4096, 4096, self.chunk_size, 3 * self.chunk_size + 512])
                at = self.dice.randrange(0, size - length) // 512 * 512
                os.pwrite(fd, self.dice.randbytes(length), at)
            os.fsync(fd)
        finally:
            os.close(fd)

    def discard(self) -> None:
        """Discard a range that may begin and end within chunks."""
        size = self.nr_chunks * self.chunk_size
        length = self.dice.choice([4096, self.chunk_size, 20 * self.chunk_size + 4096])
        at = self.dice.randrange(0, size - length) // 4096 * 4096
        tool("blkdiscard", "-o", str(at), "-l", str(length), self.node)

    def drop(self) -> None:
        """Remove a snapshot; its id is used again at times."""
        if len(self.snapshots) > 2:
            gone = self.snapshots.pop(self.dice.randrange(len(self.snapshots)))
            self.message(f"delete {gone}")

    def disturb(self) -> None:
        """Do a few things."""
        for _ in range(self.dice.randrange(1, 4)):
            act = self.dice.choice([self.write_some, self.write_some, self.discard, self.snapshot, self.drop])
            act()

    def write_some(self) -> None:
        """Write between one piece and many."""
        self.write(self.dice.choice([1, 4, 30]))


@contextmanager
def dm_pool(seed: int, chunk_size: int) -> Iterator[DmPool]:
    """Make a pool on the first scratch disk, and take it away again."""
    disk = scratch_disks()[0]
    sectors = chunk_size // SECTOR
    made = f"{PREFIX}metadata", f"{PREFIX}data", f"{PREFIX}pool"
    data = _DATA_SECTORS // sectors * sectors
    try:
        tool("dmsetup", "create", made[0], "--table", f"0 {_METADATA_SECTORS} linear {disk} 0")
        tool("dmsetup", "create", made[1], "--table", f"0 {data} linear {disk} {_METADATA_SECTORS}")
        tool("dd", "if=/dev/zero", f"of=/dev/mapper/{made[0]}", "bs=4096", "count=1", "conv=fsync")
        where = f"/dev/mapper/{made[0]} /dev/mapper/{made[1]} {sectors} 0 1 skip_block_zeroing"
        tool("dmsetup", "create", made[2], "--table", f"0 {data} thin-pool {where}")
        pool = DmPool(f"/dev/mapper/{made[0]}", chunk_size, random.Random(seed))
        pool.start()
        yield pool
    finally:
        for name in (f"{PREFIX}volume", *reversed(made)):
            subprocess.run(["dmsetup", "remove", "--retry", name], check=False, capture_output=True)
        left = re.findall(rf"^{PREFIX}\S+", tool("dmsetup", "ls"), re.MULTILINE)
        assert not left, left
