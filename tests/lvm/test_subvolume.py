"""Subvolumes on the kernel of the lab, which is older than that of the host on which tests/btrfs runs."""

from __future__ import annotations

import os
from pathlib import Path

from support.btrfs_lab import btrfs_lab, require_btrfs
from support.commands import CommandLine
from support.file_trees import noise, rsync_differences


def test_a_subvolume_is_backed_up_incrementally_and_restored(tmp_path: Path) -> None:
    """Files are opened by their numbers: Linux 6.1 wants to know their generations for that."""
    require_btrfs()
    with btrfs_lab(tmp_path, size=160 << 20) as lab:
        for name in ("file", "other"):
            (lab.live / name).write_bytes(noise(1, 300_000))
        blocksnap = CommandLine(tmp_path)
        blocksnap.done("init", "--no-encryption")
        blocksnap.done("backup", lab.live)
        with (lab.live / "file").open("r+b") as file:
            file.write(noise(2, 100_000))
        (backup,) = blocksnap.done("backup", "--json", lab.live).backups
        assert (backup["method"], backup["kind"]) == ("btrfs-tree", "incremental")
        assert backup["read_bytes"] < 300_000
        blocksnap.done("restore", "latest", lab.mount / "back")
        assert rsync_differences(lab.live, lab.mount / "back") == ""
        assert sorted(os.listdir(lab.mount)) == ["back", "live"]
