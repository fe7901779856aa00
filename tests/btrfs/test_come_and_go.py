"""Devices and filesystems of others come and go while ours are looked at."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from blocksnap.system import freeze, mounts
from blocksnap.volumes.discover import discover
from support.btrfs_lab import BtrfsLab
from support.loops import call, loop_device, unmount

MIB = 1 << 20
COMING_AND_GOING = """
set -e
while [ -e "$4" ]; do
    mount "$1" "$2"
    umount "$2"
    addpart "$3" 1 2048 4096
    delpart "$3" 1
done
"""


@contextmanager
def coming_and_going(folder: Path) -> Iterator[None]:
    """Have a btrfs mounted and unmounted, and a partition made and removed, without a pause."""
    point, goes_on = folder / "other", folder / "goes-on"
    point.mkdir()
    goes_on.touch()
    with (
        loop_device(folder / "btrfs.img", size=128 * MIB) as device,
        loop_device(folder / "parted.img", size=8 * MIB) as parted,
    ):
        call("mkfs.btrfs", "-q", device)
        # A namespace of its own: nobody who copies ours has a mount of it and keeps it.
        argv = ["unshare", "--mount", "--propagation", "private", "sh", "-c", COMING_AND_GOING, "sh"]
        others = subprocess.Popen([*argv, device, point, parted, goes_on], stderr=subprocess.PIPE, text=True)
        try:
            yield
            assert others.poll() is None, others.communicate()[1]
        finally:
            goes_on.unlink()
            others.communicate(timeout=300)


def test_what_others_remove_meanwhile_ends_no_look(lab: BtrfsLab, tmp_path: Path) -> None:
    """A directory of sysfs that is gone when it is looked into ended a run once."""
    own = os.stat(lab.device).st_rdev
    inner = lab.live / "inner.img"
    with loop_device(inner, size=64 * MIB) as loop:
        call("mkfs.ext4", "-q", loop)
        point = tmp_path / "inner"
        point.mkdir()
        call("mount", loop, point)
        try:
            with coming_and_going(tmp_path):
                for _ in range(150):
                    above = {layer.mount.point for layer in freeze.layers_above(own)}
                    assert {str(lab.mount), str(point)} <= above
                    assert os.stat(loop).st_rdev in freeze.numbers_above(os.stat(lab.live).st_dev)
                    assert mounts.btrfs_members(own) == {own}
                    assert f"mounted on {point}" in mounts.users_of_device(os.stat(loop).st_rdev)
                for _ in range(10):
                    assert str(lab.live) in {candidate.name for candidate in discover()}
        finally:
            unmount(point)
