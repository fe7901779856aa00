"""Bases by the command line on real LVM: what stays, what is said of it, and what a killed run leaves."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from blocksnap.cli.main import run
from blocksnap.controller.session import SnapshotSession
from blocksnap.repository.writer import RepositoryWriter
from blocksnap.system import lvm
from blocksnap.volumes import thin_base
from blocksnap.volumes.thin_pool import PoolLimits
from support.forks import exit_code_of
from support.in_process import InProcess
from support.killed import dead_after
from support.lvm_lab import ThinPool, obstacle, thin_pool, tool, write_at
from support.require import require

KIB, MIB = 1 << 10, 1 << 20


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ThinPool]:
    why = obstacle()
    require("lvm", why is None, why or "")
    with thin_pool(tmp_path_factory.mktemp("pool")) as made:
        yield made


@pytest.fixture
def volume(pool: ThinPool) -> Iterator[str]:
    name = pool.create("data", "16M")
    write_at(pool.node("data"), 0, os.urandom(2 * MIB))
    yield name
    for each in pool.snapshots():
        pool.remove(each)
    if "data" in pool.names():
        pool.remove("data")


def restored(blocksnap: InProcess, pool: ThinPool) -> bool:
    """Whether the latest backup is what is on the volume."""
    out = blocksnap.folder / "out"
    out.unlink(missing_ok=True)
    blocksnap.done("restore", "latest", out, "-q")
    with open(pool.node("data"), "rb") as device:
        return out.read_bytes() == device.read()


def test_a_job_keeps_a_base_until_it_does_not(
    pool: ThinPool, volume: str, blocksnap: InProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    configuration = blocksnap.folder / "blocksnap.toml"
    configuration.write_text(f'[jobs.data]\nvolumes = ["{volume}"]\nbase = "keep"\n')
    blocksnap.backup("--job", "data")
    (base,) = pool.snapshots()
    write_at(pool.node("data"), 4 * MIB, os.urandom(4 * KIB))
    # What stores nothing changes nothing.
    blocksnap.done("backup", "--job", "data", "--dry-run")
    assert pool.snapshots() == [base]
    told = blocksnap.backup("--job", "data")
    assert (told["method"], told["read_bytes"]) == ("thin-tree", 128 * KIB)
    assert told["source"]["base_kept"] is True
    assert restored(blocksnap, pool)
    (next_base,) = pool.snapshots()
    assert next_base != base
    listed = json.loads(blocksnap.done("volumes", "--json"))["volumes"]
    assert [(each["name"], each["tracking"], each["bases"]) for each in listed if each["bases"]] == [
        (volume, "thin-tree", [f"{pool.group}/{next_base}"])
    ]
    shown = blocksnap.done("show", "latest").decode()
    assert "thin-tree: the parent's snapshot was kept as base and nobody has touched it" in shown
    assert "base_reason" in shown
    # Another repository has bases of its own, or none, and leaves these alone.
    blocksnap.done("init", "--repo", str(blocksnap.folder / "other"))
    blocksnap.backup(volume, "--repo", str(blocksnap.folder / "other"))
    assert pool.snapshots() == [next_base]
    # With nearly no room in the pool it goes, with a warning; the backup is taken.
    with monkeypatch.context() as patched:
        patched.setattr(thin_base, "BASE_LIMITS", PoolLimits(data_percent=0.1))
        code, _, err = blocksnap("backup", "--job", "data")
    assert (code, pool.snapshots()) == (3, [])
    assert "no base of" in err
    assert blocksnap.backup(volume, "--base", "auto")["method"] == "thin-time"
    assert pool.snapshots() == []
    monkeypatch.setattr(thin_base, "AUTO_BASE_MAPPINGS", 32)
    told = blocksnap.backup(volume, "--base", "auto")
    assert told["source"]["base_reason"] == "the volume maps 33 chunks"
    assert len(pool.snapshots()) == 1
    told = blocksnap.backup(volume)
    assert (told["method"], told["source"]["base_kept"], pool.snapshots()) == ("thin-tree", False, [])


def test_a_base_is_kept_until_the_next_is_committed(
    pool: ThinPool, volume: str, blocksnap: InProcess, tmp_path: Path
) -> None:
    small = tmp_path / "small"
    small.mkdir()
    tool("mount", "-t", "tmpfs", "-o", "size=8M", "none", str(small))
    try:
        blocksnap.done("init", "--repo", str(small / "r"))
        blocksnap.backup(volume, "--base", "keep", "--repo", str(small / "r"))
        (base,) = pool.snapshots()
        write_at(pool.node("data"), 4 * MIB, os.urandom(10 * MIB))
        code, _, err = blocksnap("backup", volume, "--base", "keep", "--repo", str(small / "r"))
        assert (code, pool.snapshots()) == (1, [base]), err
        tool("mount", "-o", "remount,size=64M", str(small))
        told = blocksnap.backup(volume, "--base", "keep", "--repo", str(small / "r"))
        assert told["method"] == "thin-tree"
        assert pool.snapshots() != [base]
    finally:
        tool("umount", str(small))


def test_the_device_id_of_a_base_is_used_again(pool: ThinPool, volume: str, blocksnap: InProcess) -> None:
    blocksnap.backup(volume, "--base", "keep")
    (base,) = pool.snapshots()

    def thin_id(name: str) -> str:
        return tool("lvs", "--noheadings", "-o", "thin_id", f"{pool.group}/{name}").strip()

    lost, tags = thin_id(base), tool("lvs", "--noheadings", "-o", "lv_tags", f"{pool.group}/{base}")
    pool.remove(base)
    words = [word for tag in tags.strip().split(",") for word in ("--addtag", tag)]
    tool("lvcreate", "-s", "-pr", "-ky", *words, "-n", base, volume)
    assert thin_id(base) == lost
    write_at(pool.node("data"), 4 * MIB, os.urandom(4 * KIB))
    told = blocksnap.backup(volume, "--base", "keep")
    assert told["method"] == "thin-time"
    assert told["reason"].endswith("the base snapshot is not that of the parent backup")
    assert restored(blocksnap, pool)
    for name in pool.snapshots():
        pool.remove(name)
    # With nothing kept it is the same: the id of the last snapshot is somebody's volume now.
    blocksnap.backup(volume)
    pool.create("theirs", "4M")
    try:
        assert thin_id("theirs") == lost
        write_at(pool.node("theirs"), 0, os.urandom(MIB))
        write_at(pool.node("data"), 5 * MIB, os.urandom(4 * KIB))
        told = blocksnap.backup(volume)
        assert (told["method"], told["read_bytes"]) == ("thin-time", 128 * KIB)
        assert restored(blocksnap, pool)
    finally:
        pool.remove("theirs")


def test_the_base_of_a_volume_that_was_removed(pool: ThinPool, volume: str, blocksnap: InProcess) -> None:
    blocksnap.backup(volume, "--base", "keep")
    (base,) = pool.snapshots()
    pool.remove("data")
    listed = json.loads(blocksnap.done("volumes", "--json"))["volumes"]
    (row,) = (each for each in listed if each["name"] == f"{pool.group}/{base}")
    assert "the base snapshot of a volume that is gone" in row["obstacle"]
    other = pool.create("other", "4M")
    try:
        blocksnap.backup(other)
        assert pool.snapshots() == []
    finally:
        pool.remove("other")


DYING: dict[str, tuple[type | ModuleType, str]] = {
    "committed": (RepositoryWriter, "commit"),
    "announced": (SnapshotSession, "_announce_rotation"),
    "marked": (lvm, "mark_base"),
    "removed": (lvm, "remove_snapshot"),
    "settled": (SnapshotSession, "settle"),
}
"""After what a run dies."""


@pytest.mark.parametrize("step", DYING)
def test_a_run_that_is_killed_while_it_rotates(
    pool: ThinPool, volume: str, blocksnap: InProcess, step: str
) -> None:
    """No base is lost without a word, and none stays that nobody asks for."""
    blocksnap.backup(volume, "--base", "keep")
    (old,) = pool.snapshots()
    write_at(pool.node("data"), 4 * MIB, os.urandom(4 * KIB))

    def die() -> int:
        dead_after(*DYING[step])
        return run(["backup", volume, "--base", "keep"])

    assert exit_code_of(die) == 9
    left = pool.snapshots()
    assert (old in left) == (step not in ("removed", "settled"))
    assert len(left) == (1 if step in ("removed", "settled") else 2)
    write_at(pool.node("data"), 6 * MIB, os.urandom(4 * KIB))
    told = blocksnap.backup(volume, "--base", "keep")
    assert told["read_bytes"] == 128 * KIB
    if step == "committed":
        # Nobody knew that it was: its snapshot is gone, and the next backup says so.
        assert told["method"] == "thin-time"
        assert told["reason"].endswith(
            "; the base is not used: the base snapshot of the parent backup is gone"
        )
    else:
        assert told["method"] == "thin-tree"
    assert restored(blocksnap, pool)
    (base,) = pool.snapshots()
    assert base not in left
    assert os.listdir(blocksnap.folder / "state" / "journal") == []
