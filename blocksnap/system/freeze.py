"""Freeze and thaw filesystems by descriptor (ioctl_fifreeze(2)), and what of them lies above a device."""

from __future__ import annotations

import fcntl
import os
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from blocksnap.system import blockdev, mounts, sysfs
from blocksnap.system.mounts import Mount

# <linux/fs.h>, <linux/loop.h>
_FIFREEZE = 0xC0045877
_FITHAW = 0xC0045878
_LOOP_GET_STATUS64 = 0x4C05
_LOOP_INFO_BYTES = 232
_FUSE = "fuse"
_LOOP_MAJOR = 7
_SYS_BLOCK = Path("/sys/block")


@dataclass(frozen=True, slots=True)
class Layer:
    """A mounted filesystem whose data ends up on a device: directly at depth 0, else through other layers."""

    mount: Mount
    depth: int


def freeze(fd: int) -> None:
    """Freeze the filesystem on which ``fd`` is open; OSError EBUSY when it is frozen already."""
    fcntl.ioctl(fd, _FIFREEZE, 0)


def thaw(fd: int) -> bool:
    """Thaw it; False when it was not frozen. Raises OSError."""
    try:
        fcntl.ioctl(fd, _FITHAW, 0)
    except OSError as err:
        if err.errno == 22:
            return False
        raise
    return True


def layers_above(number: int, table: Sequence[Mount] | None = None) -> list[Layer]:
    """Return the filesystems of this mount namespace above a device, those deepest in the stack first.

    Partitions, encryption, RAID and nested volume groups are followed through the kernel's list of holders,
    loop devices through the file that each is backed by. ``number`` may be what stat calls the device of the
    files in a btrfs subvolume: then those that are mounted from images in it.
    """
    table = mounts.read_mounts() if table is None else table
    _, found = _climb(number, table)
    # Within one depth as they were mounted last: a filesystem may hold the image that a later one is on.
    order = {mount.device: place for place, mount in enumerate(table)}
    return sorted(found.values(), key=lambda layer: (-layer.depth, -order.get(layer.mount.device, 0)))


def numbers_above(number: int) -> frozenset[int]:
    """Return a device and all that its data is seen through: devices above it, and filesystems.

    Filesystems are numbered as mountinfo does; of those that only another mount namespace has mounted, such
    as lie directly on one of the devices have its number.
    """
    devices, filesystems = _climb(number, mounts.read_mounts())
    return frozenset(devices) | frozenset(filesystems)


def _climb(number: int, table: Sequence[Mount]) -> tuple[set[int], dict[int, Layer]]:
    """Return the devices above one, itself included, and the filesystems on them, by their numbers."""
    found: dict[int, Layer] = {}
    seen: set[int] = set()
    # What stat calls the device of files is on btrfs that of their subvolume, and none that is mounted.
    inside = () if os.major(number) else _loops_on(number, table)
    wanted = [(number, 0), *((loop, 1) for loop in inside)]
    while wanted:
        device, depth = wanted.pop(0)
        if device in seen:
            continue
        seen.add(device)
        wanted += [(each, depth + 1) for each in (*blockdev.holders(device), *blockdev.partitions(device))]
        # Of several mounts one that shows all of the filesystem.
        for mount in sorted(mounts.mounts_of(device, list(table)), key=lambda mount: mount.root != "/"):
            if mount.device in found:
                continue
            found[mount.device] = Layer(mount, depth)
            wanted += [(loop, depth + 1) for loop in _loops_on(mount.device, table)]
    return seen, found


def backing_filesystem(number: int) -> int | None:
    """Return the filesystem of the file that a loop device is backed by, as mountinfo numbers it.

    None for other devices.
    """
    found = _backing(number)
    return found[0] if found else None


def _backing(number: int) -> tuple[int, int] | None:
    """Return how the filesystem behind a loop device is numbered: by mountinfo, and by stat of the file."""
    if os.major(number) != _LOOP_MAJOR:
        return None
    folder = blockdev.sysfs_folder(number) / "loop"
    try:
        path = sysfs.exact_text(folder / "backing_file").removesuffix("\n")
        # The kernel gives the path as whoever attached it saw it, which need not be ours.
        seen = mounts.mount_at(path, mounts.read_mounts())
        if seen is not None and seen.filesystem.startswith(_FUSE):
            # Whoever looks at the file waits for a process, and for ever if that does not answer.
            return seen.device, seen.device
        device = _device_of_file(number)
    except blockdev.NoDeviceError:
        return None
    except OSError as err:
        # It is not attached.
        sysfs.raise_lack(err)
        return None
    try:
        mount = mounts.mount_under(path)
        if mount is not None and os.stat(path).st_dev == device:
            return mount.device, device
    except OSError as err:
        # The path leads elsewhere here.
        sysfs.raise_lack(err)
    return device, device


def _device_of_file(number: int) -> int:
    fd = os.open(blockdev.node_of(number), os.O_RDONLY | os.O_CLOEXEC)
    try:
        buffer = bytearray(_LOOP_INFO_BYTES)
        fcntl.ioctl(fd, _LOOP_GET_STATUS64, buffer)
    finally:
        os.close(fd)
    device: int = struct.unpack_from("=Q", buffer)[0]
    return device


def _loops_on(filesystem: int, table: Sequence[Mount]) -> list[int]:
    """Return the loop devices whose files lie on a filesystem, and on which something lies.

    It is numbered as mountinfo does, or as stat does its files: on btrfs these are those of one subvolume.
    Others are not asked: the kernel looks at the file for an answer, and waits for ever where that is served
    by a process that does not answer (FUSE).
    """
    numbers = []
    loops = sysfs.find(_SYS_BLOCK, "loop*/loop")
    for number in sysfs.numbers_of(folder.parent / "dev" for folder in loops):
        is_used = mounts.mounts_of(number, list(table)) or blockdev.holders(number)
        if is_used or blockdev.partitions(number):
            numbers.append(number)
    return [number for number in numbers if filesystem in (_backing(number) or ())]
