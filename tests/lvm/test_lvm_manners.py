"""How blocksnap behaves among others in LVM: groups in every state, volumes that are converted, no debris."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from blocksnap.controller.lock import VolumeLocks
from blocksnap.system import lvm
from blocksnap.volumes.resolve import resolve_volume
from support.in_process import InProcess
from support.loops import detach
from support.lvm_lab import ThinPool, exit_code, tool, write_at

KIB, MIB = 1 << 10, 1 << 20


@pytest.fixture
def volume(pool: ThinPool) -> Iterator[str]:
    name = pool.create("data", "4M")
    write_at(pool.node("data"), 0, os.urandom(2 * MIB))
    yield name
    pool.remove("data")


def debris() -> set[str]:
    return {path for folder in ("archive", "backup") for path in os.listdir(f"/etc/lvm/{folder}")}


def refused(blocksnap: InProcess, volume: str, why: str) -> None:
    """No backup, one line of error that says why, and what to do."""
    code, _, err = blocksnap("backup", volume)
    assert code == 14, err
    (line,) = [line for line in err.splitlines() if line.startswith("error:")]
    assert why in line
    assert "fix:" in err


def test_nothing_is_archived_and_a_busy_volume_is_waited_for(
    pool: ThinPool, volume: str, blocksnap: InProcess
) -> None:
    before = debris()
    blocksnap.done("backup", volume)
    blocksnap.done("backup", volume, "--base", "keep")
    blocksnap.done("backup", volume)
    blocksnap.done("restore", "latest", f"{pool.group}/again", "--create")
    lvm.remove_volume(pool.group, "again", tag="none")
    blocksnap.done("doctor", "--fix")
    assert debris() == before
    pool.remove("again")
    with VolumeLocks(blocksnap.folder / "state", [(resolve_volume(volume).key, volume)]):
        code, _, err = blocksnap("backup", volume, "--wait", "1")
    assert code == 11
    assert f"{volume} is held by another run: process {os.getpid()} on " in err


def test_groups_that_are_renamed_exported_shared_or_miss_a_disk(
    pool: ThinPool, volume: str, blocksnap: InProcess, tmp_path: Path
) -> None:
    blocksnap.done("backup", volume)
    tool("vgrename", pool.group, "re-named.x+y")
    try:
        write_at("/dev/re-named.x+y/data", MIB, os.urandom(4 * KIB))
        told = blocksnap.backup("re-named.x+y/data")
        assert (told["method"], told["read_bytes"]) == ("thin-time", 128 * KIB)
    finally:
        tool("vgrename", "re-named.x+y", pool.group)
    tool("vgchange", "-an", pool.group)
    tool("vgexport", pool.group)
    try:
        refused(blocksnap, volume, "exported")
    finally:
        tool("vgimport", pool.group)
        tool("vgchange", "-ay", pool.group)
    extra = tmp_path / "extra"
    with extra.open("wb") as file:
        file.truncate(20 * MIB)
    loop = tool("losetup", "--find", "--show", str(extra)).strip()
    try:
        tool("vgextend", "-y", pool.group, loop)
        detach(loop)
        subprocess.run(["udevadm", "settle"], check=False)
        refused(blocksnap, volume, "missing disks")
        code, out, _ = blocksnap("doctor")
        assert code == 1
        assert b"disks of the volume group are missing" in out
    finally:
        tool("vgreduce", "--removemissing", pool.group)
    assert blocksnap.backup(volume)["method"] == "thin-time"


def test_pools_whose_parts_are_moved_and_mirrored(pool: ThinPool, volume: str, blocksnap: InProcess) -> None:
    """Whatever LVM makes of the pool under a volume, the next incremental is the volume byte for byte."""
    blocksnap.done("backup", volume)
    for words in (
        ("lvconvert", "-y", "--type", "raid1", "-m1", f"{pool.group}/{pool.pool}_tmeta"),
        ("lvconvert", "-y", "-m0", f"{pool.group}/{pool.pool}_tmeta"),
        ("lvextend", "--size", "+32M", f"{pool.group}/{pool.pool}"),
    ):
        tool(*words)
        write_at(pool.node("data"), MIB, os.urandom(4 * KIB))
        told = blocksnap.backup(volume)
        assert told["kind"] == "incremental"
        out = blocksnap.done("restore", "latest", "-")
        with open(pool.node("data"), "rb") as device:
            assert out == device.read(), (words, told["method"], told["reason"])


def test_one_command_of_ours_changes_a_group_at_a_time(
    pool: ThinPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lvm, "_LOCK_SECONDS", 0.1)
    with lvm._changing(pool.group):
        with pytest.raises(lvm.GroupBusyError, match=f"process {os.getpid()} has been changing"):
            lvm.create_thin(pool.group, pool.pool, "late", 4 * MIB)
    lvm.create_thin(pool.group, pool.pool, "late", 4 * MIB)
    pool.remove("late")


def test_volumes_of_others_come_and_go(pool: ThinPool, volume: str, blocksnap: InProcess) -> None:
    """Whatever the others' LVM and device mapper do meanwhile, they are not what is looked for."""
    other = pool.create("other", "4M")
    shell = (
        'trap "exit 0" TERM; while :; do '
        f"lvcreate -q -q -s -n of-others {other} && lvremove -q -q -y {pool.group}/of-others; "
        "dmsetup create of-others --table '0 8 zero'; dmsetup remove --retry of-others; done"
    )
    others = subprocess.Popen(["sh", "-c", shell], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        for options, kind in (((), "full"), (("--base", "keep"), "incremental")):
            write_at(pool.node("data"), 128 * KIB, os.urandom(4 * KIB))
            assert blocksnap.backup(volume, *options)["kind"] == kind
        names = {each["name"] for each in json.loads(blocksnap.done("volumes", "--json"))["volumes"]}
        assert {volume, other} <= names
        assert blocksnap("doctor", "--json")[0] in (0, 3)
        assert others.poll() is None
    finally:
        others.terminate()
        others.wait()
        exit_code("dmsetup", "remove", "--retry", "of-others")
        exit_code("lvremove", "-y", f"{pool.group}/of-others")
        pool.remove("other")
    blocksnap.done("verify", "latest", volume)
