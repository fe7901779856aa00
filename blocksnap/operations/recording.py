"""Record with a run what its volumes lie on, so that they can be restored to a bare machine.

Only where it says something: of a file there is no disk to make anew. What cannot be found out is a warning,
and no reason to fail: the backups are whole without it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from blocksnap.errors import BlocksnapError
from blocksnap.operations.reporting import Reporter, each_once
from blocksnap.repository.documents import RecordedDisk, RecordedHeader, RecordedMount, Recovery
from blocksnap.system import blockdev
from blocksnap.system.command import has_program, run
from blocksnap.system.lvm_text import parse, section_in, text_in
from blocksnap.system.mounts import device_of, node_number, read_mounts
from blocksnap.volumes.base import Volume
from blocksnap.volumes.luks_header import LuksHeaderVolume, headers_below

_FSTAB = Path("/etc/fstab")


def record_host(volumes: Sequence[Volume], report: Reporter) -> Recovery | None:
    """Return what the volumes of a run lie on; None where that says nothing."""
    if not any(volume.key.startswith("lvm:") or volume.kind == "device" for volume in volumes):
        return None
    headers = tuple(_header(volume) for volume in volumes if isinstance(volume, LuksHeaderVolume))
    try:
        groups = _groups(volumes)
        numbers = (disk for device in _devices(volumes, groups) for disk in _whole_disks(device))
        disks = tuple(_disk(number) for number in dict.fromkeys(numbers))
        return Recovery(groups=groups, disks=disks, headers=headers, mounts=_mounts(), fstab=_fstab())
    except (BlocksnapError, OSError, ValueError, KeyError) as err:
        report.warn(
            f"what the volumes lie on was not recorded: {err}",
            resolution="the backup is whole; see that vgcfgbackup and sfdisk work",
        )
        return None


def with_luks_headers(volumes: Sequence[Volume], report: Reporter) -> list[Volume]:
    """Return volumes behind the headers of the LUKS containers that logical volumes and devices lie on.

    They come first, so that the newest backup of a run is still that of a volume that was named.
    """
    found: dict[str, LuksHeaderVolume] = {}
    warn = each_once(report)
    try:
        for number in _devices(volumes, _groups(volumes)):
            headers, unreadable = headers_below(number)
            found |= {header.key: header for header in headers}
            for unread in unreadable:
                warn(unread)
    except (BlocksnapError, OSError, ValueError, KeyError) as err:
        report.warn(
            f"LUKS headers were not found: {err}",
            resolution="the volumes are backed up without; see that vgcfgbackup works",
        )
    return [*found.values(), *volumes]


def _groups(volumes: Sequence[Volume]) -> dict[str, str]:
    """Return the volume groups of a run's volumes in LVM's text form."""
    from blocksnap.system import lvm

    uuids: dict[str, list[str]] = {}
    for volume in volumes:
        if volume.key.startswith("lvm:"):
            uuids.setdefault(volume.name.partition("/")[0], []).append(volume.key.rpartition("/")[2])
    return {vg: lvm.group_text(vg, of_group) for vg, of_group in uuids.items()}


def _devices(volumes: Sequence[Volume], groups: dict[str, str]) -> list[int]:
    """Return the numbers of the physical volumes of the groups, and of devices."""
    paths = [volume.name for volume in volumes if volume.kind == "device"]
    for vg, text in groups.items():
        paths += physical_volumes(vg, text)
    # A hint that is not true any more leads nowhere.
    return [number for path in paths if (number := node_number(path)) is not None]


def physical_volumes(vg: str, text: str) -> list[str]:
    """Return the devices of a group's physical volumes when it was recorded; raises LvmTextError."""
    volumes = section_in(section_in(parse(text), vg), "physical_volumes")
    return [text_in(section_in(volumes, name), "device") for name in volumes]


def _whole_disks(number: int) -> list[int]:
    below = blockdev.slaves(number)
    return [disk for each in below for disk in _whole_disks(each)] if below else [number]


def _disk(number: int) -> RecordedDisk:
    node = blockdev.node_of(number)
    size = int((blockdev.sysfs_folder(number) / "size").read_text()) * 512
    has_table = blockdev.partitions(number) and has_program("sfdisk")
    return RecordedDisk(path=node, size=size, table=run("sfdisk", "--dump", node) if has_table else "")


def _header(volume: LuksHeaderVolume) -> RecordedHeader:
    return RecordedHeader(volume=volume.name, path=volume.path, mapping=volume.mapping)


def _mounts() -> tuple[RecordedMount, ...]:
    """Return the filesystems on block devices and where they are mounted."""
    found = {
        (mount.source, mount.point): RecordedMount(
            source=mount.source, point=mount.point, filesystem=mount.filesystem
        )
        for mount in read_mounts()
        if mount.root == "/" and mount.source.startswith("/dev/") and device_of(mount) is not None
    }
    return tuple(found.values())


def _fstab() -> str:
    try:
        return _FSTAB.read_text(errors="replace")
    except OSError:
        return ""
