"""Block devices as volumes and as targets, on loop devices of this machine."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest

from blocksnap.system.udev import settle
from support.commands import CommandLine
from support.loops import await_unused, call, loop_device, mounted

MIB = 1 << 20


def noise(seed: int, size: int) -> bytes:
    return random.Random(seed).randbytes(size)


@pytest.mark.parametrize("size", [8 * MIB, 8 * MIB + 512])
def test_an_unused_device_is_a_volume(blocksnap: CommandLine, tmp_path: Path, size: int) -> None:
    image = tmp_path / "disk.img"
    image.write_bytes(noise(1, 3 * MIB))
    with loop_device(image, size=size) as device:
        first = blocksnap.done("backup", device, "--json").backups[0]
        assert (first["kind"], first["method"], first["volume_bytes"]) == ("full", "compare", size)
        fd = os.open(device, os.O_WRONLY)
        os.pwrite(fd, b"changed", size - 7)
        os.fsync(fd)
        os.close(fd)
        second = blocksnap.done("backup", device, "--json").backups[0]
        assert second["kind"] == "incremental"
        assert 0 < second["changed_bytes"] <= 2 * 128 * 1024
        blocksnap.done("verify", "latest", device)
    assert blocksnap.done("restore", "latest", "-").stdout == image.read_bytes()


def test_a_mounted_device_is_no_volume(blocksnap: CommandLine, tmp_path: Path) -> None:
    with loop_device(tmp_path / "disk.img", size=64 * MIB) as device:
        call("mkfs.ext4", "-q", device)
        with mounted(device, tmp_path / "mnt"):
            refused = blocksnap("backup", device)
        assert refused.code == 14
        assert str(tmp_path / "mnt") in refused.stderr
        await_unused(device)
        blocksnap.done("backup", device)


def test_restoring_to_a_device(blocksnap: CommandLine, tmp_path: Path) -> None:
    content = noise(2, 2 * MIB) + bytes(3 * MIB) + noise(3, MIB) + bytes(MIB)
    source = tmp_path / "source.img"
    with source.open("wb") as file:
        file.write(content[: 2 * MIB])
        file.seek(5 * MIB)
        file.write(content[5 * MIB :])
    blocksnap.done("backup", source)
    with loop_device(tmp_path / "target.img", size=9 * MIB) as device:
        Path(device).write_bytes(noise(4, 9 * MIB))
        blocksnap.done("restore", "latest", device, "--verify")
        with open(device, "rb") as file:
            restored = file.read()
    assert restored[: len(content)] == content
    assert restored[len(content) :] == noise(4, 9 * MIB)[len(content) :]
    # The hole was discarded: the loop device's file lost the blocks.
    assert (tmp_path / "target.img").stat().st_blocks * 512 < 7 * MIB


@pytest.mark.parametrize("ending", [MIB + 100, 100, 612])
def test_a_file_of_no_whole_blocks_that_ends_in_a_hole(
    blocksnap: CommandLine, tmp_path: Path, ending: int
) -> None:
    content = noise(6, 4 * MIB) + bytes(ending)
    source, before = tmp_path / "source.img", noise(7, 9 * MIB)
    with source.open("wb") as file:
        file.write(content[: 4 * MIB])
        file.truncate(len(content))
    blocksnap.done("backup", source)
    with loop_device(tmp_path / "target.img", size=9 * MIB) as device:
        Path(device).write_bytes(before)
        blocksnap.done("restore", "latest", device, "--verify")
        restored = Path(device).read_bytes()
    assert restored[: len(content)] == content
    # What lies behind the backup's end belongs to somebody, even in the same block.
    assert restored[len(content) :] == before[len(content) :]


def test_targets_that_are_refused_by_name(blocksnap: CommandLine, tmp_path: Path) -> None:
    source = tmp_path / "source.img"
    source.write_bytes(noise(5, 64 * MIB))
    blocksnap.done("backup", source)
    with loop_device(tmp_path / "small.img", size=63 * MIB) as device:
        refused = blocksnap("restore", "latest", device)
        assert (refused.code, len(refused.errors)) == (1, 1)
        assert device in refused.stderr
        assert not any((tmp_path / "small.img").read_bytes())
    with loop_device(tmp_path / "used.img", size=64 * MIB) as device:
        call("mkfs.ext4", "-q", device)
        before = (tmp_path / "used.img").read_bytes()
        with mounted(device, tmp_path / "mnt", "-o", "ro"):
            refused = blocksnap("restore", "latest", device)
        assert (refused.code, len(refused.errors)) == (1, 1)
        assert str(tmp_path / "mnt") in refused.stderr
        assert (tmp_path / "used.img").read_bytes() == before
    with loop_device(tmp_path / "locked.img", size=64 * MIB, read_only=True) as device:
        refused = blocksnap("restore", "latest", device)
        assert (refused.code, len(refused.errors)) == (1, 1)


def test_volumes_lists_devices(blocksnap: CommandLine, tmp_path: Path) -> None:
    with loop_device(tmp_path / "disk.img", size=64 * MIB) as device:
        call("mkfs.ext4", "-q", device)
        settle(60)
        blocksnap.done("backup", device)
        listed = blocksnap.done("volumes", "--json").document["volumes"]
    mine = [volume for volume in listed if volume["name"] == device]
    assert len(mine) == 1, [volume["name"] for volume in listed]
    assert mine[0]["size"] == 64 * MIB
    assert mine[0]["supported"] is True
    assert mine[0]["last_backup"]
