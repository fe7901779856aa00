"""btrfs is not supported yet, and every way to name a part of one is told so plainly."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from support.commands import CommandLine
from support.loops import call, loop_device, mounted
from support.require import require


@pytest.fixture
def blocksnap(tmp_path: Path) -> CommandLine:
    ready = os.geteuid() == 0 and shutil.which("mkfs.btrfs") is not None
    require("btrfs", ready and "btrfs" in Path("/proc/filesystems").read_text(), "no btrfs, or not root")
    command = CommandLine(tmp_path)
    command.done("init")
    return command


def test_a_btrfs_filesystem_is_refused_by_name(blocksnap: CommandLine, tmp_path: Path) -> None:
    with loop_device(tmp_path / "btrfs.img", size=256 << 20) as device:
        call("mkfs.btrfs", "-q", device)
        with mounted(device, tmp_path / "mnt") as folder:
            call("btrfs", "subvolume", "create", folder / "sub")
            for volume in (folder, folder / "sub"):
                refused = blocksnap("backup", volume)
                assert refused.code == 14, refused
                assert len(refused.errors) == 1
                assert "btrfs" in refused.stderr
                assert "supported" in refused.stderr
                assert "fix:" in refused.stderr
        # Unmounted, it is a device like any other.
        blocksnap.done("backup", device)
        blocksnap.done("verify", "latest", device)
