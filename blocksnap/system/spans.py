"""What lies on several devices at once: filesystems with a log elsewhere, btrfs, arrays, striped volumes.

Only what the kernel says of itself is asked, in sysfs and mountinfo; nothing on a device is read. So of a
filesystem that is not mounted, and an array that is not assembled, nothing is known.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from blocksnap.errors import BlocksnapError
from blocksnap.system import blockdev, devmapper, mounts, sysfs
from blocksnap.system.mounts import Mount

_EXT4 = Path("/sys/fs/ext4")
_PROC = Path("/proc")
_CLASS = Path("/sys/class/block")
_OTHER_DEVICES = ("logdev=", "rtdev=")
"""Options of XFS in mountinfo that name a device (xfs(5))."""
_NEEDS_ALL = re.compile(r"linear|striped|thin-pool|cache|writecache|raid(?!1$).*")
"""Targets of device-mapper that have a part of their data on each device. Not those of which one is whole by
itself: mirrors, and the origin of a snapshot or of a thin volume that has an external one."""
_MIRROR = "raid1"
_CUT_NAME = 15
"""Bytes of a kernel thread's name (TASK_COMM_LEN in linux/sched.h, and its NUL)."""


@dataclass(frozen=True, slots=True)
class Span:
    """Something that needs all of several devices; ``point`` is where it is mounted, if it is."""

    name: str
    devices: frozenset[int]
    point: str | None = None
    is_btrfs: bool = False


def spans_of(numbers: Collection[int], whole: Collection[int] = ()) -> list[Span]:
    """Return what needs several devices: all such filesystems, and which of ``numbers`` are such devices.

    Nothing is said of those that are ``whole``, whatever they are made of.
    """
    return [*_filesystems(mounts.read_mounts()), *_arrays(set(numbers) - set(whole))]


def find_outside(spans: Iterable[Span], inside: Collection[int]) -> list[tuple[Span, frozenset[int]]]:
    """Return what has devices among those that are ``inside`` and others too, with these others."""
    return [
        (span, outside)
        for span in spans
        if (outside := span.devices - frozenset(inside)) and outside != span.devices
    ]


def call_device(number: int) -> str:
    """Return what people call a device: VG/LV, its name in device-mapper, or its node."""
    name = devmapper.dm_name(number)
    if name is not None:
        lv = devmapper.decode_name(name) if devmapper.lvm_identity(number) else None
        return "/".join(lv) if lv else f"/dev/mapper/{name}"
    try:
        return blockdev.node_of(number)
    except blockdev.NoDeviceError:
        return blockdev.number_text(number)


def _filesystems(table: Sequence[Mount]) -> Iterator[Span]:
    known: set[frozenset[int]] = set()
    for mount in table:
        number = mounts.device_of(mount)
        if number is None:
            continue
        if mount.filesystem == "btrfs":
            devices = frozenset(mounts.btrfs_members(number))
        else:
            devices = frozenset({number, *_named_in(mount), *_external_journal(number)})
        if len(devices) > 1 and devices not in known:
            known.add(devices)
            name = f"the {mount.filesystem} on {mount.point}"
            yield Span(name, devices, mount.point, is_btrfs=mount.filesystem == "btrfs")


def _named_in(mount: Mount) -> Iterator[int]:
    for option in mount.options:
        path = option.partition("=")[2]
        if option.startswith(_OTHER_DEVICES) and (number := mounts.node_number(path)) is not None:
            yield number


def _external_journal(number: int) -> Iterator[int]:
    """Yield the device of the journal of an ext4, where that is another.

    The thread that writes the journal has its name from it: ``jbd2/dm-3`` of a device, ``jbd2/dm-3-8`` of an
    inode of one (kernel: fs/jbd2/journal.c, jbd2_journal_init_dev, jbd2_journal_init_inode).
    """
    with contextlib.suppress(OSError, ValueError):
        own = blockdev.sysfs_folder(number).resolve().name
        thread = sysfs.exact_text(_EXT4 / own / "journal_task").strip()
        said = sysfs.exact_text(_PROC / thread / "comm").strip()
        name = said.removeprefix("jbd2/")
        # Linux before 5.17 cuts it, and what is left may be the name of another device.
        if len(said) >= _CUT_NAME and own.startswith(name):
            return
        if not re.fullmatch(rf"{re.escape(own)}-\d+", name):
            yield from sysfs.numbers_of([_CLASS / name / "dev"])


def _arrays(numbers: Collection[int]) -> Iterator[Span]:
    for number in numbers:
        if not os.major(number):
            continue
        below = frozenset(blockdev.slaves(number))
        if len(below) > 1 and _needs_all(number):
            yield Span(call_device(number), below)


def _needs_all(number: int) -> bool:
    """Tell whether none of the devices below holds all that there is; False where that is not told."""
    with contextlib.suppress(OSError):
        level = sysfs.exact_text(blockdev.sysfs_folder(number) / "md/level").strip()
        return level != _MIRROR
    try:
        kinds = devmapper.target_kinds(number)
    except BlocksnapError:
        # It is a look that must not end what asks for it.
        return False
    return bool(kinds) and all(map(_NEEDS_ALL.fullmatch, kinds))
