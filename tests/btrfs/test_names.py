"""By which names parts of a btrfs filesystem are backed up, and what is said of the others."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from support.commands import CommandLine
from support.loops import await_unused, call, loop_device, mounted
from support.require import require


@pytest.fixture
def blocksnap(tmp_path: Path) -> CommandLine:
    ready = os.geteuid() == 0 and shutil.which("mkfs.btrfs") is not None
    require("btrfs", ready and "btrfs" in Path("/proc/filesystems").read_text(), "no btrfs, or not root")
    command = CommandLine(tmp_path)
    command.done("init")
    return command


def test_subvolumes_by_their_paths_and_nothing_else(blocksnap: CommandLine, tmp_path: Path) -> None:
    with loop_device(tmp_path / "btrfs.img", size=256 << 20) as device:
        call("mkfs.btrfs", "-q", device)
        with mounted(device, tmp_path / "mnt") as folder:
            call("btrfs", "subvolume", "create", folder / "sub")
            (folder / "sub" / "plain").mkdir()
            call("sync", "-f", folder)
            blocksnap.done("backup", folder / "sub")
            # The snapshots are made in the top directory, and that is no write of anybody's.
            told = blocksnap.done("backup", folder)
            assert "warning" not in told.stderr
            blocksnap.done("verify", f"{folder / 'sub'}@latest")
            for name in (folder / "sub" / "plain", device):
                refused = blocksnap("backup", name)
                assert refused.code == 14, refused
                assert len(refused.errors) == 1
                assert "fix:" in refused.stderr
        # Unmounted, it is a device like any other.
        await_unused(device)
        blocksnap.done("backup", device)
        blocksnap.done("verify", "latest", device)
