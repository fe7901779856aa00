"""The main job through the command line, on real LVM: what it reads, leaves and survives."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.commands import CommandLine
from support.in_process import InProcess
from support.lvm_lab import ThinPool, thin_pool, tool, write_at

KIB, MIB = 1 << 10, 1 << 20


@pytest.fixture(scope="module")
def shared_pool(_lab: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ThinPool]:
    with thin_pool(tmp_path_factory.mktemp("pool")) as made:
        yield made


@pytest.fixture
def pool(shared_pool: ThinPool) -> Iterator[ThinPool]:
    """A pool that has no volumes but those of the test."""
    before = set(shared_pool.names())
    yield shared_pool
    made = set(shared_pool.names()) - before
    tool("lvremove", "-ff", "-y", *(f"{shared_pool.group}/{name}" for name in made))


def fill(node: str, size: int) -> bytes:
    content = os.urandom(size)
    write_at(node, 0, content)
    return content


def test_an_unchanged_volume_reads_and_stores_nothing(pool: ThinPool, blocksnap: InProcess) -> None:
    volume = pool.create("data", "1G")
    fill(pool.node("data"), 16 * MIB)
    blocksnap.backup(volume)
    again = blocksnap.backup(volume)
    assert (again["method"], again["volume_bytes"]) == ("thin-time", 1024 * MIB)
    assert again["read_bytes"] == again["changed_bytes"] == again["new_bytes"] == 0
    assert again["stored_bytes"] < 16 * KIB
    assert pool.snapshots() == []


def test_a_mounted_filesystem_comes_back(pool: ThinPool, blocksnap: InProcess, tmp_path: Path) -> None:
    pool.create("data", "128M")
    tool("mkfs.ext4", "-q", pool.node("data"))
    (tmp_path / "mnt").mkdir()
    tool("mount", pool.node("data"), str(tmp_path / "mnt"))
    try:
        (tmp_path / "mnt" / "one").write_bytes(b"one" * 100_000)
        assert blocksnap.backup(str(tmp_path / "mnt"))["kind"] == "full"
        (tmp_path / "mnt" / "two").write_bytes(b"two" * 100_000)
        told = blocksnap.backup(str(tmp_path / "mnt"))
        assert (told["method"], told["volume"]) == ("thin-time", f"{pool.group}/data")
    finally:
        tool("umount", str(tmp_path / "mnt"))
    blocksnap.done("restore", "latest", f"{pool.group}/again", "--create", "--verify")
    assert tool("lvs", "--noheadings", "-o", "pool_lv", f"{pool.group}/again").strip() == pool.pool
    assert "blocksnap" not in tool("lvs", "--noheadings", "-o", "lv_tags", pool.group)
    # LVM froze the filesystem for the snapshot, so it is clean without a replay.
    tool("e2fsck", "-fn", pool.node("again"))
    tool("mount", pool.node("again"), str(tmp_path / "mnt"))
    try:
        assert (tmp_path / "mnt" / "one").read_bytes() == b"one" * 100_000
        assert (tmp_path / "mnt" / "two").read_bytes() == b"two" * 100_000
    finally:
        tool("umount", str(tmp_path / "mnt"))


def test_a_restore_to_a_new_volume_that_fails_leaves_none(pool: ThinPool, blocksnap: InProcess) -> None:
    volume = pool.create("data")
    fill(pool.node("data"), 2 * MIB)
    blocksnap.backup(volume)
    code, _, err = blocksnap("restore", "latest", f"{pool.group}/data", "--create")
    assert code == 1, err
    packs = sorted((blocksnap.folder / "repository" / "packs").rglob("*-*"), key=lambda p: p.stat().st_size)
    data = bytearray(packs[-1].read_bytes())
    data[500_000] ^= 1
    packs[-1].write_bytes(data)
    code, _, err = blocksnap("restore", "latest", f"{pool.group}/again", "--create")
    assert code == 13, err
    assert "cannot be restored" in err
    assert "again" not in pool.names()
    code, _, err = blocksnap("restore", "latest", f"{pool.group}/again", "--create", "--pool", "nosuch")
    assert code == 1, err
    assert "again" not in pool.names()


def test_restoring_over_a_volume(pool: ThinPool, blocksnap: InProcess) -> None:
    volume = pool.create("data")
    content = fill(pool.node("data"), 2 * MIB)
    blocksnap.backup(volume)
    fill(pool.node("data"), 8 * MIB)
    blocksnap.done("restore", "latest", volume, "--verify")
    with open(pool.node("data"), "rb") as device:
        assert device.read() == content + bytes(62 * MIB)
    # What the backup does not hold was discarded, not written with zeros.
    assert float(tool("lvs", "--noheadings", "-o", "data_percent", volume)) < 5
    told = blocksnap.backup(volume)
    assert told["changed_bytes"] <= 6 * MIB
    blocksnap.done("verify", "latest", volume)


def test_groups_share_an_instant_and_a_commit(pool: ThinPool, blocksnap: InProcess) -> None:
    volumes = [pool.create(name, "16M") for name in ("one", "two")]
    for name in ("one", "two"):
        fill(pool.node(name), MIB)
    out = json.loads(blocksnap.done("backup", "--json", *volumes).splitlines()[-1])["backups"]
    assert [backup["volume"] for backup in out] == volumes
    assert out[0]["skew_ms"] == out[1]["skew_ms"] > 0
    assert len(list((blocksnap.folder / "repository" / "manifests").iterdir())) == 1
    assert pool.snapshots() == []


def test_other_kinds_are_told_plainly(pool: ThinPool, blocksnap: InProcess) -> None:
    pool.create("data")
    tool("lvcreate", "-y", "-L", "8M", "-n", "classic", pool.group)
    for name in (pool.pool, "nosuch"):
        code, _, err = blocksnap("backup", f"{pool.group}/{name}")
        assert code == 14, (name, err)
        assert len([line for line in err.splitlines() if line.startswith("error:")]) == 1
        assert "fix:" in err
    listed = json.loads(blocksnap.done("volumes", "--json"))["volumes"]
    by_name = {volume["name"]: volume for volume in listed}
    assert by_name[f"{pool.group}/data"]["tracking"] == "thin-time"
    assert by_name[f"{pool.group}/data"]["supported"] is True
    assert by_name[f"{pool.group}/classic"]["supported"] is True
    assert by_name[f"{pool.group}/classic"]["tracking"] != "thin-time"


@pytest.mark.parametrize(("number", "code"), [(signal.SIGKILL, -9), (signal.SIGTERM, 143)])
def test_a_run_that_is_ended_by_a_signal(
    pool: ThinPool, tmp_path: Path, number: signal.Signals, code: int
) -> None:
    blocksnap = CommandLine(tmp_path)
    blocksnap.done("init")
    volume = pool.create("data")
    fill(pool.node("data"), 24 * MIB)
    # So slow that it is not over before the signal, on any machine.
    configuration = tmp_path / "blocksnap.toml"
    configuration.write_text('[defaults.pace]\npolicy = "fixed"\nread_rate = "128K"\n')
    process = blocksnap.start("backup", volume, "--json")
    try:
        assert process.stdout is not None
        assert b"plan" in process.stdout.readline()
        assert len(pool.snapshots()) == 1
        process.send_signal(number)
        _, stderr = process.communicate(timeout=600)
    finally:
        process.kill()
    assert process.returncode == code, stderr
    assert b"Traceback" not in stderr
    if number != signal.SIGKILL:
        assert pool.snapshots() == []
    configuration.unlink()
    assert blocksnap.done("list", "--json").document["backups"] == []
    events = blocksnap.done("backup", volume, "--json").events
    assert any(event["event"] == "recovered" for event in events) == (number == signal.SIGKILL)
    assert pool.snapshots() == []
    blocksnap.done("check", "--read-data")


def test_a_full_repository_leaves_no_snapshot(pool: ThinPool, blocksnap: InProcess, tmp_path: Path) -> None:
    volume = pool.create("data", "128M")
    fill(pool.node("data"), 4 * MIB)
    blocksnap.backup(volume)
    small = tmp_path / "small"
    small.mkdir()
    tool("mount", "-t", "tmpfs", "-o", "size=20M", "none", str(small))
    try:
        blocksnap.done("init", "--repo", str(small / "r"))
        fill(pool.node("data"), 28 * MIB)
        code, _, err = blocksnap("backup", volume, "--repo", str(small / "r"))
        assert code == 1, err
        assert "No space left" in err
        assert pool.snapshots() == []
    finally:
        tool("umount", str(small))
    assert blocksnap.backup(volume)["method"] == "thin-time"


def test_doubt_means_a_full_compare(pool: ThinPool, blocksnap: InProcess, tmp_path: Path) -> None:
    volume = pool.create("data")
    fill(pool.node("data"), 4 * MIB)
    blocksnap.backup(volume)
    tool("lvcreate", "-s", "-n", "before", volume)
    fill(pool.node("data"), MIB)
    blocksnap.backup(volume)
    tool("lvconvert", "--merge", f"{pool.group}/before")
    subprocess.run(["udevadm", "settle"], check=False)
    tool("lvchange", "-an", volume)
    tool("lvchange", "-ay", volume)
    told = blocksnap.backup(volume)
    assert (told["method"], told["kind"]) == ("compare", "incremental")
    assert "merge" in told["reason"]
    blocksnap.done("restore", "latest", tmp_path / "out")
    with open(pool.node("data"), "rb") as device:
        assert (tmp_path / "out").read_bytes() == device.read()
    assert blocksnap.backup(volume)["method"] == "thin-time"
