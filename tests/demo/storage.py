# SPDX-License-Identifier: Apache-2.0
"""The ground the demo stands on: a volume group with a thin pool on one disk, the repository on another."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from commands import DemoError, run

GROUP = "demo"
POOL = "pool"
VOLUME_SIZE = "1g"


def scratch_disks() -> tuple[str, str]:
    """Return the two disks that may be overwritten."""
    disks = [path for path in os.environ.get("LAB_DISKS", "").split(":") if path]
    if len(disks) < 2:
        raise DemoError("LAB_DISKS names no two scratch disks; run the demo with: make demo")
    return disks[0], disks[1]


@contextmanager
def volume_group(disk: str) -> Iterator[None]:
    """A volume group with a thin pool that fills most of it; both are gone afterwards."""
    with ExitStack() as stack:
        run("pvcreate", "--quiet", "--yes", disk)
        stack.callback(run, "pvremove", "--quiet", disk)
        run("vgcreate", "--quiet", GROUP, disk)
        stack.callback(run, "vgremove", "--quiet", "--yes", GROUP)
        run("lvcreate", "--quiet", "--type=thin-pool", "--extents=90%FREE", "--chunksize=64k",
            f"--name={POOL}", GROUP)  # fmt: skip
        yield


def create_volume(name: str) -> None:
    """Make a thin volume with an empty filesystem."""
    run("lvcreate", "--quiet", f"--virtualsize={VOLUME_SIZE}", f"--thinpool={POOL}", f"--name={name}", GROUP)
    make_filesystem(device_of(name))


def remove_volume(name: str) -> None:
    """Remove a volume of the group."""
    run("lvremove", "--quiet", "--yes", f"{GROUP}/{name}")


def device_of(name: str) -> str:
    """Return the path of a volume's device."""
    return f"/dev/{GROUP}/{name}"


def arrived_share(name: str) -> float:
    """Return which share of a volume that is restored instantly is read from the volume itself."""
    lines = [line.split() for line in run("dmsetup", "table", f"{GROUP}-{name}-blocksnap").splitlines()]
    total = sum(int(line[1]) for line in lines)
    # The network block device of what has not arrived is of major number 43.
    return sum(int(line[1]) for line in lines if not line[3].startswith("43:")) / total


def make_filesystem(device: str) -> None:
    """Make an ext4, over whatever was there."""
    run("mkfs.ext4", "-q", "-F", device)


def mounted(device: str, directory: Path) -> ExitStack:
    """Mount; closing what this returns unmounts, and doing so twice does no harm."""
    directory.mkdir(exist_ok=True)
    run("mount", device, str(directory))
    stack = ExitStack()
    stack.callback(run, "umount", str(directory))
    return stack


def check_filesystem(device: str, directory: Path) -> None:
    """Replay the journal by mounting once, then let e2fsck find fault; raises DemoError if it does."""
    with mounted(device, directory):
        pass
    run("e2fsck", "-f", "-n", device)


def volumes() -> list[str]:
    """Return the names of all volumes in the group but the pool."""
    listed = run("lvs", "--noheadings", "--options=lv_name", GROUP).split()
    return sorted(name for name in listed if name != POOL)
