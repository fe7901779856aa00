# SPDX-License-Identifier: Apache-2.0
"""The disks that tests may take for LVM: given by LAB_DISKS, in the lab and in the Vagrant VM alike."""

from __future__ import annotations

import os
import stat
import subprocess

from support.require import require


def lab_disks() -> list[str]:
    disks = [path for path in os.environ.get("LAB_DISKS", "").split(":") if path]
    require("lvm", len(disks) >= 2, "LAB_DISKS names no two scratch disks: run it by vagrant/lab")
    return disks


def test_disks_are_ours_and_unused() -> None:
    for path in lab_disks():
        assert stat.S_ISBLK(os.stat(path).st_mode)
        probe = subprocess.run(["wipefs", "--noheadings", path], capture_output=True, text=True, check=True)
        assert probe.stdout == ""


def test_kernel_has_the_snapshot_targets() -> None:
    lab_disks()
    for module in ("dm-thin-pool", "dm-snapshot"):
        subprocess.run(["modprobe", module], check=True)
    targets = subprocess.run(["dmsetup", "targets"], capture_output=True, text=True, check=True).stdout
    names = {line.split()[0] for line in targets.splitlines()}
    assert {"thin", "thin-pool", "snapshot", "snapshot-origin"} <= names
