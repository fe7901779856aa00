"""Twenty rounds of anything that may happen to a thin volume: every restore is byte-identical."""

from __future__ import annotations

import hashlib
import os
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from blocksnap.extents.model import ExtentList
from support.in_process import InProcess
from support.lvm_lab import ThinPool, obstacle, thin_pool, tool
from support.require import require

KIB, MIB = 1 << 10, 1 << 20
CHUNK = 128 * KIB
POOL_CHUNK = 64 * KIB
ROUNDS = int(os.environ.get("BLOCKSNAP_SOAK_ROUNDS", "7"))


@pytest.fixture
def pool(tmp_path: Path) -> Iterator[ThinPool]:
    why = obstacle()
    require("lvm", why is None, why or "")
    with thin_pool(tmp_path) as made:
        yield made


def content_hash(node: str) -> str:
    digest = hashlib.blake2b()
    with open(node, "rb", buffering=0) as device:
        os.posix_fadvise(device.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        while block := device.read(4 * MIB):
            digest.update(block)
    return digest.hexdigest()


class Disturber:
    """Does things to a volume, and knows which bytes it may have changed."""

    def __init__(self, pool: ThinPool, name: str, seed: int) -> None:
        self.pool, self.name = pool, name
        self.dice = random.Random(seed)
        self.touched: list[tuple[int, int]] = []
        self.foreign: list[str] = []
        self.snapshots = 0

    @property
    def node(self) -> str:
        return self.pool.node(self.name)

    @property
    def size(self) -> int:
        return int(tool("blockdev", "--getsize64", self.node))

    def write(self) -> None:
        fd = os.open(self.node, os.O_WRONLY)
        for _ in range(self.dice.randrange(1, 6)):
            length = self.dice.choice([512, 4 * KIB, 60 * KIB, 300 * KIB, 2 * MIB])
            offset = self.dice.randrange(0, self.size - length) // 512 * 512
            os.pwrite(fd, self.dice.randbytes(length), offset)
            self.touched.append((offset, length))
        os.fsync(fd)
        os.close(fd)

    def discard(self) -> None:
        offset = self.dice.randrange(0, self.size - 2 * MIB) // (4 * KIB) * 4 * KIB
        length = self.dice.choice([64 * KIB, 128 * KIB, 3 * 64 * KIB, MIB + 4 * KIB, 2 * MIB])
        tool("blkdiscard", "-o", str(offset), "-l", str(length), self.node)
        # A chunk that lost a part is read, one that lost all is not.
        self.touched.append((offset, length))

    def grow(self) -> None:
        tool("lvextend", "-L", "+4M", f"{self.pool.group}/{self.name}")

    def snapshot_by_others(self) -> None:
        self.snapshots += 1
        name = f"other{self.snapshots}"
        tool("lvcreate", "-s", "-n", name, f"{self.pool.group}/{self.name}")
        self.foreign.append(name)

    def drop_snapshot_by_others(self) -> None:
        if self.foreign:
            self.pool.remove(self.foreign.pop(self.dice.randrange(len(self.foreign))))

    def disturb(self) -> None:
        self.touched = []
        self.write()
        for act in self.dice.sample(
            [self.write, self.discard, self.grow, self.snapshot_by_others, self.drop_snapshot_by_others], 2
        ):
            act()

    @property
    def most_read(self) -> int:
        """What a reader of nothing but touched pool chunks has to read, in chunks of ours."""
        touched = ExtentList.of(self.touched).align(POOL_CHUNK, limit=self.size)
        return touched.align(CHUNK, limit=self.size).total


@pytest.mark.timeout(90 * ROUNDS)
def test_rounds_of_what_happens_to_a_volume(pool: ThinPool, blocksnap: InProcess, tmp_path: Path) -> None:
    volume = pool.create("data", "48M")
    disturber = Disturber(pool, "data", seed=20)
    disturber.write()
    first = blocksnap.backup(volume)
    assert (first["kind"], first["method"]) == ("full", "compare")
    assert first["read_bytes"] <= disturber.most_read
    for number in range(ROUNDS):
        disturber.disturb()
        told = blocksnap.backup(volume)
        expected = content_hash(disturber.node)
        assert (told["kind"], told["method"]) == ("incremental", "thin-time"), (number, told)
        assert told["read_bytes"] <= disturber.most_read, (number, disturber.touched)
        blocksnap.done("restore", "latest", tmp_path / "out", "-q")
        assert content_hash(str(tmp_path / "out")) == expected, number
        (tmp_path / "out").unlink()
        assert pool.snapshots() == []
    tags = tool("lvs", "-a", "--noheadings", "-o", "lv_tags", pool.group)
    assert "blocksnap" not in tags
    blocksnap.done("check", "--read-data")
