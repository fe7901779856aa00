"""Who uses a device or a file: mounts, swap, loops, stacked devices; and what lies under a directory."""

from __future__ import annotations

import os
import re
import stat
from dataclasses import dataclass
from pathlib import Path

from blocksnap.system import blockdev, sysfs
from blocksnap.system.command import CommandError, run_observed

_MOUNTINFO = Path("/proc/self/mountinfo")
_SWAPS = Path("/proc/swaps")
_BLOCK = Path("/sys/block")
_BTRFS = Path("/sys/fs/btrfs")
_WITHOUT_NUMBER = frozenset({"btrfs", "bcachefs"})


@dataclass(frozen=True, slots=True)
class Mount:
    """One line of mountinfo(5).

    ``device`` is what stat calls st_dev, which for btrfs and others is no block device; ``source``
    then names the device. ``read_only`` is true when neither this mount nor the file system writes.
    """

    device: int
    root: str
    point: str
    filesystem: str
    source: str
    read_only: bool
    options: tuple[str, ...] = ()
    """Those of the filesystem itself, not of this mount of it."""


def parse_mountinfo(text: str) -> list[Mount]:
    """Parse the text of /proc/PID/mountinfo."""
    mounts = []
    # Not splitlines(): names may have what that takes for the end of a line.
    for line in text.split("\n"):
        left, _, right = line.partition(" - ")
        fields, tail = left.split(" "), right.split(" ")
        if len(fields) < 6 or len(tail) < 3:
            continue
        major, minor = fields[2].split(":")
        mounts.append(
            Mount(
                device=os.makedev(int(major), int(minor)),
                root=unescape(fields[3]),
                point=unescape(fields[4]),
                filesystem=tail[0],
                source=unescape(tail[1]),
                read_only="ro" in tail[2].split(","),
                options=tuple(map(unescape, tail[2].split(","))),
            )
        )
    return mounts


def read_mounts() -> list[Mount]:
    """Return what is mounted in this mount namespace."""
    return parse_mountinfo(sysfs.exact_text(_MOUNTINFO))


def mounts_of(number: int, mounts: list[Mount] | None = None) -> list[Mount]:
    """Return the mounts of the file system on a device."""
    mounts = read_mounts() if mounts is None else mounts
    # A btrfs over several devices names one of them.
    numbers = btrfs_members(number)
    return [mount for mount in mounts if mount.device == number or _source_number(mount) in numbers]


def flush_filesystem(number: int) -> None:
    """Write out what is dirty in the filesystem that is mounted from a device, if there is one (syncfs).

    It only spares time later: where no place it is mounted at can be opened, nothing is done. Raises
    CommandError where it cannot write.
    """
    for mount in mounts_of(number):
        try:
            flush(mount.point)
        except CommandError as err:
            # It may be unmounted there meanwhile, or lie below another mount (coreutils: src/sync.c).
            if "error opening" not in err.message:
                raise
        else:
            return


def flush(point: str) -> None:
    """Write out what is dirty in the filesystem that a path lies on (syncfs); raises CommandError.

    It does not fork, so it may be called while something stands still.
    """
    run_observed(("sync", "--file-system", point), lambda: None)


def filesystem_of(fd: int) -> int | None:
    """Return the filesystem on which a descriptor is open, by the number that mountinfo has for it.

    It is not always what stat calls st_dev: each btrfs subvolume has one of its own.
    """
    told = sysfs.exact_text(Path(f"/proc/self/fdinfo/{fd}")).splitlines()
    fields = dict(line.split(":", 1) for line in told if ":" in line)
    wanted = fields.get("mnt_id", "").strip()
    for line in sysfs.exact_text(_MOUNTINFO).split("\n"):
        words = line.split(" ", 3)
        if words[0] == wanted:
            major, minor = words[2].split(":")
            return os.makedev(int(major), int(minor))
    return None


def unescape(text: str) -> str:
    """Return a name that the kernel has escaped (proc(5): space, tab, line feed, backslash, ``#``)."""
    return re.sub(r"\\([0-7]{3})", lambda found: chr(int(found[1], 8)), text)


def device_of(mount: Mount) -> int | None:
    """Return the number of the block device that a filesystem is mounted from, None where there is none."""
    return mount.device if os.major(mount.device) else _source_number(mount)


def btrfs_members(number: int) -> set[int]:
    """Return all devices of the btrfs that is mounted from a device; itself where there is none.

    ``/sys/fs/btrfs/UUID/devices`` has links to them (Documentation/ABI, fs/btrfs/sysfs.c).
    """
    for folder in sysfs.find(_BTRFS, "*/devices"):
        found = set(sysfs.numbers_of(sysfs.find(folder, "*/dev")))
        if number in found:
            return found
    return {number}


def node_number(path: str) -> int | None:
    """Return the number of the block device that a path names; None where it names none."""
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_rdev if stat.S_ISBLK(status.st_mode) else None


def swap_files() -> list[str]:
    """Return the files and devices that are used as swap."""
    try:
        lines = sysfs.exact_text(_SWAPS).split("\n")[1:]
    except OSError as err:
        sysfs.raise_lack(err)
        return []
    return [unescape(line.split(" ")[0]) for line in lines if line]


def users_of_device(number: int) -> list[str]:
    """Say who uses a device, a partition of it, or the disk it is a partition of."""
    mounts = read_mounts()
    found = _direct_users(number, mounts)
    for partition in blockdev.partitions(number):
        found += _direct_users(partition, mounts)
    for disk in blockdev.slaves(number):
        if number in blockdev.partitions(disk):
            found += _direct_users(disk, mounts)
    return list(dict.fromkeys(found))


def swap_users(number: int) -> list[str]:
    """Say whether a device is used as swap."""
    return ["used as swap" for path in swap_files() if node_number(path) == number]


def loop_devices_of(path: str) -> list[str]:
    """Return the loop devices whose backing file is this one."""
    try:
        wanted = os.stat(path)
    except OSError:
        return []
    found = []
    for backing in sysfs.find(_BLOCK, "loop*/loop/backing_file"):
        try:
            status = os.stat(sysfs.exact_text(backing).removesuffix("\n"))
        except OSError as err:
            sysfs.raise_lack(err)
            continue
        if (status.st_dev, status.st_ino) == (wanted.st_dev, wanted.st_ino):
            found.append(f"/dev/{backing.parent.parent.name}")
    return sorted(found)


def loop_numbers_of(path: str) -> list[int]:
    """Return the numbers of the loop devices whose backing file is this one; they need no nodes."""
    return sysfs.numbers_of(_BLOCK / Path(node).name / "dev" for node in loop_devices_of(path))


def mount_under(path: str) -> Mount | None:
    """Return the mount that a path lies on, by the longest mount point above it."""
    return mount_at(os.path.realpath(path), read_mounts())


def mount_at(real: str, table: list[Mount]) -> Mount | None:
    """Return the mount of a table that a path without links lies on."""
    above = [mount for mount in table if _contains(mount.point, real)]
    # Later lines are mounted over earlier ones at the same point.
    return max(enumerate(above), key=lambda each: (len(each[1].point), each[0]))[1] if above else None


def _direct_users(number: int, mounts: list[Mount]) -> list[str]:
    found = [
        f"mounted on {mount.point}{' (read-only)' if mount.read_only else ''}"
        for mount in mounts_of(number, mounts)
    ]
    found += swap_users(number)
    for path in sysfs.find(blockdev.sysfs_folder(number), "holders/*"):
        found.append(f"held by {sysfs.text_of(path / 'dm/name') or path.name}")
    return found


def _source_number(mount: Mount) -> int | None:
    """Return the device of a file system that hides it behind a number of its own (btrfs)."""
    if os.major(mount.device):
        return None
    # The source of others may be a directory (FUSE), and be waited for, from a server that is gone.
    is_device = mount.filesystem in _WITHOUT_NUMBER and mount.source.startswith("/")
    return node_number(mount.source) if is_device or mount.source.startswith("/dev/") else None


def _contains(point: str, path: str) -> bool:
    return path == point or path.startswith(point.rstrip("/") + "/")
