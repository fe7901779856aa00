"""A pool that has taken as many snapshots as a mapping can count, in 24 bits: nothing of it is believed."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from blocksnap.volumes import thin_pool as thin_pool_module
from blocksnap.volumes.errors import PoolWornOutError
from support.lvm_lab import ThinPool, obstacle, thin_pool, tool
from support.require import require
from support.thin_lab import Disturbed, Group

KIB, MIB = 1 << 10, 1 << 20
LAST = (1 << 24) - 1


def set_time(pool: ThinPool, time: int, folder: Path) -> None:
    """Give an inactive pool another time: its metadata is dumped, edited and restored where it lies."""
    metadata, name = f"{pool.group}/swap", f"{pool.group}/{pool.pool}"
    tool("lvcreate", "-y", "-L", "8M", "-n", "swap", pool.group)
    tool("vgchange", "-an", pool.group)
    tool("lvconvert", "-y", "--thinpool", name, "--poolmetadata", metadata)
    tool("lvchange", "-ay", metadata)
    text, count = re.subn(r' time="\d+"', f' time="{time}"', tool("thin_dump", pool.node("swap")), count=1)
    assert count == 1
    (folder / "dump").write_text(text)
    tool("thin_restore", "-i", str(folder / "dump"), "-o", pool.node("swap"))
    tool("lvchange", "-an", metadata)
    tool("lvconvert", "-y", "--thinpool", name, "--poolmetadata", metadata)
    tool("lvremove", "-y", metadata)
    tool("vgchange", "-ay", pool.group)


def test_times_are_believed_up_to_24_bits_and_nothing_beyond(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    why = obstacle()
    require("lvm", why is None, why or "")
    with thin_pool(tmp_path) as pool:
        volumes = [Disturbed(pool, "bare", stays=False), Disturbed(pool, "based", stays=True)]
        for each in volumes:
            pool.create(each.name, "8M")
            each.write(0, os.urandom(2 * MIB))
        set_time(pool, LAST - 6, tmp_path)
        group = Group(volumes, tmp_path / "state", 64 * KIB)
        with pytest.raises(PoolWornOutError):
            group.take(("compare", "compare"))
        assert pool.snapshots() == []
        # Up to the last time that fits ...
        monkeypatch.setattr(thin_pool_module, "SPARE_SNAPSHOTS", 0)
        group.take(("compare", "compare"))
        for each in volumes:
            each.write(MIB, os.urandom(4 * KIB))
            each.write(5 * MIB, os.urandom(4 * KIB))
        group.take(("thin-time", "thin-tree"))
        last = [each.last for each in volumes if each.last]
        assert [taken.binding["snapshot_time"] for taken in last] == [LAST - 1, LAST]
        # ... and beyond, where the kernel ors the 25th bit into the block number of what it maps, neither
        # times nor blocks prove anything.
        monkeypatch.setattr(thin_pool_module, "SPARE_SNAPSHOTS", -99)
        for each in volumes:
            each.write(2 * MIB - 4 * KIB, os.urandom(8 * KIB))
        doubt = "the pool has taken more snapshots than the times in its mappings can count"
        reasons = group.take(("compare", "compare"))
        assert reasons == [doubt, f"{doubt}; the base is not used: {doubt}"]
