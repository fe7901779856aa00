# SPDX-License-Identifier: Apache-2.0
"""A repository on a disk with a bad sector, and on one that has gone: the kernel has one error for both."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from blocksnap.backends.errors import BackendAwayError
from blocksnap.backends.local import LocalBackend
from blocksnap.repository.errors import DamagedObjectError
from blocksnap.repository.pack import read_pack_range
from support.instant_restore import mounted
from support.lvm_lab import ThinPool, switch, tool

DISK = "storage-that-goes"
NODE = f"/dev/mapper/{DISK}"
BLOCK = 4096


@contextmanager
def disk(store: str) -> Iterator[int]:
    """A disk whose table can be changed, on a volume; its sectors."""
    sectors = int(tool("blockdev", "--getsz", store))
    tool("dmsetup", "create", DISK, "--table", f"0 {sectors} linear {store} 0")
    try:
        yield sectors
    finally:
        tool("dmsetup", "remove", "--retry", DISK)


def read(backend: LocalBackend, name: str, block: int) -> bytes:
    buffer = bytearray(BLOCK)
    read_pack_range(backend, name, block * BLOCK, memoryview(buffer))
    return bytes(buffer)


def test_a_bad_sector_is_damage_and_a_disk_that_is_away_is_not(pool: ThinPool, tmp_path: Path) -> None:
    pool.create("store", "64M")
    store = pool.node("store")
    name, content = "packs/one", random.Random(1).randbytes(512 * BLOCK)
    try:
        with disk(store) as sectors:
            tool("mkfs.ext4", "-q", "-b", str(BLOCK), NODE)
            with mounted(NODE, tmp_path / "far") as far:
                backend = LocalBackend(str(far / "repository"))
                backend.create()
                backend.put("config", b"x" * 200)
                backend.put(name, content)
                tool("sync")
                (block,) = tool("debugfs", "-R", f"bmap /repository/{name} 300", NODE).split()
                begin, length = int(block) * BLOCK // 512, BLOCK // 512
                end = begin + length
                bad = (
                    f"0 {begin} linear {store} 0\n{begin} {length} error\n"
                    f"{end} {sectors - end} linear {store} {end}\n"
                )
                for table, error in ((bad, DamagedObjectError), (f"0 {sectors} error\n", BackendAwayError)):
                    switch(NODE, table)
                    Path("/proc/sys/vm/drop_caches").write_text("3")
                    with pytest.raises(error, match="Input/output error"):
                        read(backend, name, 300)
                switch(NODE, f"0 {sectors} linear {store} 0\n")
                assert read(backend, name, 300) == content[300 * BLOCK : 301 * BLOCK]
                backend.close()
    finally:
        pool.remove("store")
