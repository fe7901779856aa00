"""What on this host can be protected, how its changes are tracked, and what is in the way."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from blocksnap.errors import VolumeError
from blocksnap.system import blockdev
from blocksnap.system.command import has_program
from blocksnap.system.mounts import (
    Mount,
    loop_devices_of,
    mount_under,
    mounts_of,
    read_mounts,
    users_of_device,
)
from blocksnap.system.udev import BlockDevice, block_devices
from blocksnap.volumes.errors import SUPPORTED

if TYPE_CHECKING:
    from blocksnap.system.lvm_report import LvRecord, LvReport


_CLONE_METHODS = {"xfs-clone": "fiemap", "btrfs-clone": "btrfs-tree"}


@dataclass(frozen=True, slots=True)
class Candidate:
    """Something that holds data, and whether blocksnap can back it up.

    ``tracking`` says how changes are found, ``obstacle`` what is in the way and ``advice`` what to do
    about it, both None when nothing is; with no obstacle ``advice`` is what else there is to know. ``bases``
    are the snapshots that earlier runs left on the host as bases of the next backup. ``aliases`` are other
    names of it.
    """

    name: str
    kind: str
    size: int
    filesystem: str
    mountpoints: tuple[str, ...]
    stacked: tuple[str, ...]
    tracking: str | None
    supported: bool
    obstacle: str | None = None
    advice: str | None = None
    key: str | None = None
    bases: tuple[str, ...] = ()
    aliases: tuple[str, ...] = ()

    @property
    def used_by(self) -> tuple[str, ...]:
        """Where it is mounted, and what lies on it."""
        return self.mountpoints + self.stacked


def discover() -> list[Candidate]:
    """Return everything on this host that holds data, logical volumes first. Works without LVM."""
    devices = block_devices()
    mounts = read_mounts()
    found = _logical_volumes(devices, mounts) if has_program("lvs") else []
    found += _btrfs(devices, mounts)
    found += _plain_devices(devices, mounts)
    return found


def _logical_volumes(devices: list[BlockDevice], mounts: list[Mount]) -> list[Candidate]:
    from blocksnap.system import lvm
    from blocksnap.volumes.resolve import obstacle_of

    by_number = {device.number: device for device in devices}
    found = []
    report = lvm.report()
    bases = _bases(report)
    for lv in report:
        if lv.is_internal or lvm.run_of(lv.lv_tags):
            continue
        device = by_number.get(lv.number) if lv.number is not None else None
        obstacle, advice = obstacle_of(lv, report) or (None, None)
        if lv.segtype == "thin-pool":
            continue
        found.append(
            Candidate(
                name=lv.full_name,
                kind=_kind_of(lv),
                size=lv.lv_size,
                filesystem=device.filesystem if device else "",
                mountpoints=_points(mounts_of(lv.number, mounts)) if lv.number is not None else (),
                stacked=_stacked(lv.number, by_number) if lv.number is not None else (),
                tracking=_tracking_of(lv, has_base=lv.lv_uuid in bases) if obstacle is None else None,
                supported=obstacle is None,
                obstacle=f"it is {obstacle}" if obstacle else None,
                advice=advice or _note_of(lv, has_base=lv.lv_uuid in bases),
                aliases=(f"/dev/{lv.full_name}", *((device.node, *device.links) if device else ())),
                key=f"lvm:{lv.vg_uuid}/{lv.lv_uuid}",
                bases=tuple(base.full_name for base in bases.get(lv.lv_uuid, ())),
            )
        )
    lost = [base for uuid, of_volume in bases.items() if report.find_uuid(uuid) is None for base in of_volume]
    return found + [_base_of_nothing(base) for base in lost]


def _bases(report: LvReport) -> dict[str, list[LvRecord]]:
    """Return the bases by the UUIDs of their volumes."""
    from blocksnap.system import lvm

    found: dict[str, list[LvRecord]] = {}
    for lv in report:
        mark = lvm.base_of(lv.lv_tags)
        if mark is not None:
            found.setdefault(mark.lv_uuid, []).append(lv)
    return found


def _base_of_nothing(base: LvRecord) -> Candidate:
    return Candidate(
        name=base.full_name,
        kind="base",
        size=base.lv_size,
        filesystem="",
        mountpoints=(),
        stacked=(),
        tracking=None,
        supported=False,
        obstacle="it is the base snapshot of a volume that is gone",
        advice=f"the next backup on this host removes it, or: lvremove {base.full_name}",
    )


def _kind_of(lv: LvRecord) -> str:
    if lv.is_classic_snapshot:
        return "classic snapshot"
    return "classic" if lv.is_classic else lv.segtype


def _tracking_of(lv: LvRecord, *, has_base: bool) -> str:
    if lv.is_thin:
        return "thin-tree" if has_base else "thin-time"
    return "cow" if has_base else "compare"


def _note_of(lv: LvRecord, *, has_base: bool) -> str | None:
    """Say what tracking costs where it is not for nothing."""
    if not lv.is_classic or lv.is_classic_snapshot:
        return None
    if has_base:
        return "its base makes each first write to a chunk wait for a copy: base = none gives the speed back"
    return 'everything is read each time; base = "keep" tracks changes, and slows writes down'


def describe_image(path: str) -> Candidate:
    """Return what a file is as a volume; raises VolumeError."""
    from blocksnap.system.files import is_being_written
    from blocksnap.volumes import image
    from blocksnap.volumes.resolve import resolve_volume

    volume = resolve_volume(path)
    mount = mount_under(volume.name)
    filesystem = mount.filesystem if mount else "unknown"
    method = _CLONE_METHODS.get(image.source_of(volume.name) or "")
    bases = image.bases_of(volume.name)
    obstacle, advice = None, None
    if method is None and is_being_written(volume.name):
        obstacle = f"somebody has it open for writing, and its filesystem ({filesystem}) makes no clones"
        advice = "have a hook stop who writes to it, or say quiet_files if nobody does, or use XFS or btrfs"
    elif method is not None and not bases:
        advice = 'everything is read each time; base = "auto" tracks changes'
    return Candidate(
        name=volume.name,
        kind=volume.kind,
        size=volume.size,
        filesystem="",
        mountpoints=(),
        stacked=tuple(loop_devices_of(volume.name)),
        tracking=method if bases else "compare",
        supported=obstacle is None,
        obstacle=obstacle,
        advice=advice,
        key=volume.key,
        bases=bases,
    )


def _btrfs(devices: list[BlockDevice], mounts: list[Mount]) -> list[Candidate]:
    """Return btrfs file systems, one for all the devices of each."""
    filesystems: dict[str, list[BlockDevice]] = {}
    for device in devices:
        if device.filesystem == "btrfs" and not device.dm_uuid.startswith("LVM-"):
            filesystems.setdefault(device.filesystem_uuid or device.node, []).append(device)
    found = _subvolumes(_points(mount for mount in mounts if mount.filesystem == "btrfs"))
    for members in filesystems.values():
        points = _points(mount for each in members for mount in mounts_of(each.number, mounts))
        if any(volume.name in points for volume in found):
            continue
        found.append(
            Candidate(
                name=points[0] if points else members[0].node,
                kind="btrfs",
                size=sum(each.size for each in members),
                filesystem="btrfs",
                mountpoints=points,
                stacked=(),
                tracking=None,
                supported=False,
                obstacle="its subvolumes can be backed up when it is mounted",
                advice=f"unmounted, its device {members[0].node} can be backed up"
                if len(members) == 1
                else SUPPORTED,
            )
        )
    return found


def _subvolumes(points: Iterable[str]) -> list[Candidate]:
    """Return the subvolumes that are mounted, or are in one that is, but for snapshots."""
    from blocksnap.volumes.subvolume import SubvolumeVolume

    found: dict[str, SubvolumeVolume] = {}
    for point in points:
        try:
            mounted = SubvolumeVolume(point)
            found.setdefault(mounted.key, mounted)
            for volume in mounted.nested():
                found.setdefault(volume.key, volume)
        except VolumeError:
            # A directory of a subvolume can be mounted alone.
            continue
    return [
        Candidate(
            name=volume.name,
            kind="subvolume",
            size=volume.size,
            filesystem="btrfs",
            mountpoints=(volume.name,) if volume.name in points else (),
            stacked=(),
            tracking="btrfs-tree",
            supported=True,
            obstacle=None,
            advice=None,
        )
        for volume in found.values()
        if not volume.read_only
    ]


def _plain_devices(devices: list[BlockDevice], mounts: list[Mount]) -> list[Candidate]:
    """Return disks and partitions that neither LVM nor btrfs owns."""
    by_number = {device.number: device for device in devices}
    found = []
    for device in devices:
        if (
            device.filesystem == "btrfs"
            or device.dm_uuid.startswith("LVM-")
            or device.filesystem == "LVM2_member"
        ):
            continue
        if blockdev.partitions(device.number):
            continue
        points = _points(mounts_of(device.number, mounts))
        users = users_of_device(device.number) or list(blockdev.lasting_writers(device.number).values())
        found.append(
            Candidate(
                name=device.node,
                kind=_kind_of_device(device),
                size=device.size,
                filesystem=device.filesystem,
                mountpoints=points,
                stacked=_stacked(device.number, by_number),
                tracking="compare" if not users else None,
                supported=not users,
                obstacle=f"it has no snapshots and is in use: {'; '.join(users)}" if users else None,
                advice=_advice_for(device, points, by_number) if users else None,
                aliases=device.links,
            )
        )
    return found


def _kind_of_device(device: BlockDevice) -> str:
    if device.dm_uuid.startswith("CRYPT-"):
        return "opened LUKS"
    if device.filesystem == "crypto_LUKS":
        return "LUKS container"
    name = device.node.removeprefix("/dev/")
    special = next((kind for kind in ("md", "loop", "nbd", "dm", "zram") if name.startswith(kind)), None)
    return "partition" if device.is_partition else special or "disk"


def _advice_for(device: BlockDevice, points: tuple[str, ...], by_number: dict[int, BlockDevice]) -> str:
    """Say what can be done about a device that is in use and has no snapshots."""
    below = _volume_below(device.number, by_number)
    if below:
        return f"back up the logical volume that it lies on: {below}"
    if not points and (above := _stacked(device.number, by_number)):
        return f"back up what lies on it ({', '.join(above)}), or end that for the time of the backup"
    stop = "unmount it or stop what uses it for the time of the backup"
    if device.filesystem == "xfs" and points:
        return f"{stop}; images on it are cloned while they are in use: {points[0].rstrip('/')}/*"
    return f"{stop}; for backups in use, data belongs on LVM or btrfs"


def _volume_below(number: int, by_number: dict[int, BlockDevice]) -> str | None:
    """Return the logical volume that a device lies on as a whole."""
    below = blockdev.slaves(number)
    while len(below) == 1:
        device = by_number.get(below[0])
        if device is not None and device.vg_name:
            return f"{device.vg_name}/{device.lv_name}"
        below = blockdev.slaves(below[0])
    return None


def _points(mounts: Iterable[Mount]) -> tuple[str, ...]:
    return tuple(sorted({mount.point for mount in mounts}))


def _stacked(number: int, by_number: dict[int, BlockDevice]) -> tuple[str, ...]:
    """Return what lies on a device."""
    names = []
    for holder in blockdev.holders(number):
        device = by_number.get(holder)
        if device is None:
            names.append(f"{os.major(holder)}:{os.minor(holder)}")
        else:
            names.append(f"{device.vg_name}/{device.lv_name}" if device.vg_name else device.node)
    return tuple(names)
