"""From what the administrator typed to the volume that is meant, or to the reason why it cannot be one.

LVM is asked only where a name or a device says that it is involved: backing up a file starts no program.
"""

from __future__ import annotations

import glob
import os
import re
import stat
from collections.abc import Callable
from typing import TYPE_CHECKING

from blocksnap.errors import UsageError
from blocksnap.system import blockdev
from blocksnap.volumes.base import Volume, VolumeLimits
from blocksnap.volumes.errors import SUPPORTED, NameNotTextError, NoSuchVolumeError, UnsupportedVolumeError

if TYPE_CHECKING:
    from blocksnap.system.lvm_report import LvRecord, LvReport

_VG_LV = re.compile(r"([^/]+)/([^/]+)")
_PATTERN = re.compile(r"[*?[]")
_OTHER_FOLDERS = frozenset(
    {"block", "bus", "char", "disk", "fd", "input", "mapper", "net", "pts", "shm", "snd"}
)
_KINDS = {
    "cache-pool": "a cache pool",
    "error": "a volume without storage",
    "mirror": "a mirrored LVM volume",
    "thin-pool": "a thin pool",
    "vdo": "a VDO volume",
    "vdo-pool": "a VDO pool",
}


def resolve_volume(text: str, limits: VolumeLimits | None = None) -> Volume:
    """Return the volume that ``text`` names; ``limits`` are for its snapshots.

    ``VG/LV``, a device node, a mount point or directory, or a file. Raises VolumeError (exit code 14)
    saying what it is and what could be done, UsageError for what can be read in two ways.
    """
    if not text:
        raise UsageError("the name of a volume is empty")
    if _is_volume_name(text):
        vg, _, lv = text.partition("/")
        return _logical_volume(text, vg, lv, limits=limits)
    try:
        status = os.stat(text)
    except OSError as err:
        named = _inactive_volume(text)
        if named is None:
            raise NoSuchVolumeError(text, os.strerror(err.errno or 0)) from err
        return _logical_volume(text, *named, limits=limits)
    volume = _from_status(text, status, limits)
    if not _is_text(volume.name):
        raise NameNotTextError(volume.name)
    return volume


def resolve_volumes(
    text: str,
    limits: VolumeLimits | None = None,
    left_out: Callable[[NameNotTextError], None] | None = None,
) -> list[Volume]:
    """Return the volumes that ``text`` names: several where it ends in a pattern, ``/srv/images/*.qcow2``.

    A pattern means the files that fit it now, hidden ones left out, and those that are removed while they are
    looked at. Those whose names are no text, as anybody who may make files there can make one, are told to
    ``left_out``. Raises as ``resolve_volume``.
    """
    folder, _, pattern = text.rpartition("/")
    if not folder or not _PATTERN.search(pattern) or os.path.lexists(text):
        return [resolve_volume(text, limits)]
    paths = [path for path in glob.glob(pattern, root_dir=folder) if os.path.isfile(f"{folder}/{path}")]
    found: list[Volume] = []
    unnamed = 0
    for path in sorted(paths):
        try:
            found.append(resolve_volume(f"{folder}/{path}", limits))
        except NameNotTextError as err:
            if left_out is None or len(paths) == 1:
                raise
            unnamed += 1
            left_out(err)
        except NoSuchVolumeError:
            if os.path.lexists(f"{folder}/{path}"):
                raise
    if not found and not unnamed:
        raise NoSuchVolumeError(text, "no file fits the pattern")
    return found


def _is_text(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def _from_status(text: str, status: os.stat_result, limits: VolumeLimits | None) -> Volume:
    if stat.S_ISBLK(status.st_mode):
        return _device(os.path.normpath(text), status.st_rdev, limits)
    if stat.S_ISDIR(status.st_mode):
        return _directory(text, status.st_dev, limits)
    if stat.S_ISREG(status.st_mode):
        return _file(text, limits)
    raise UnsupportedVolumeError(text, "neither a device, a directory nor a file")


def _file(text: str, limits: VolumeLimits | None) -> Volume:
    """Return a file: an image of which clones are made, or one that is read where it is."""
    from blocksnap.volumes.device import FileVolume
    from blocksnap.volumes.image import ImageVolume, source_of

    try:
        source = source_of(text)
        if source is not None:
            return ImageVolume(text, source)
        return FileVolume(text, quiet=limits is not None and limits.quiet_files)
    except FileNotFoundError as err:
        raise NoSuchVolumeError(text, "it was removed in this very moment") from err


def _is_volume_name(text: str) -> bool:
    """Tell whether ``VG/LV`` is meant; raises UsageError when a relative path of that form exists too."""
    if text.startswith(("/", "./", "../")) or not _VG_LV.fullmatch(text):
        return False
    is_volume = os.path.lexists(f"/dev/{text}")
    if not os.path.lexists(text):
        return True
    if is_volume:
        raise UsageError(
            f"{text} is both a logical volume and a path",
            resolution=f"write /dev/{text} or ./{text} to say which",
        )
    return False


def _inactive_volume(path: str) -> tuple[str, str] | None:
    """Return what volume a node would belong to that is not there: inactive ones have none."""
    from blocksnap.system.devmapper import decode_name

    mapped = re.fullmatch(r"/dev/mapper/([^/]+)", path)
    if mapped:
        return decode_name(mapped[1])
    named = re.fullmatch(r"/dev/([^/]+)/([^/]+)", path)
    if named and named[1] not in _OTHER_FOLDERS:
        return named[1], named[2]
    return None


def _device(path: str, number: int, limits: VolumeLimits | None = None) -> Volume:
    from blocksnap.system.devmapper import decode_name, dm_name, lvm_identity

    identity = lvm_identity(number)
    if identity is None:
        from blocksnap.volumes.device import DeviceVolume

        return DeviceVolume(path)
    named = decode_name(dm_name(number) or "")
    if identity.layer not in ("", "pool") or named is None:
        raise UnsupportedVolumeError(path, "an inner part of a logical volume")
    return _logical_volume(path, *named, lv_uuid=identity.lv_uuid, limits=limits)


def _directory(path: str, device: int, limits: VolumeLimits | None = None) -> Volume:
    from blocksnap.system.mounts import mount_under

    mount = mount_under(path)
    filesystem = mount.filesystem if mount else "unknown"
    if filesystem == "btrfs":
        return _subvolume(path)
    if not os.major(device) or not blockdev.sysfs_folder(device).exists():
        raise UnsupportedVolumeError(path, f"on a file system without a block device ({filesystem})")
    from blocksnap.system.devmapper import lvm_identity

    if lvm_identity(device) is not None:
        return _device(blockdev.node_of(device), device, limits)
    below = _volume_below(device)
    node = blockdev.node_of(device)
    if below is None:
        raise UnsupportedVolumeError(
            path,
            f"on {node}, which has no snapshots",
            f"back up the images in it ({path.rstrip('/')}/*), or {node} when it is unmounted; {SUPPORTED}",
        )
    raise UnsupportedVolumeError(
        path,
        f"on {node}, which lies on the logical volume {below}",
        f"name {below} itself: its snapshot does not wait for what {node} holds back",
    )


def _subvolume(path: str) -> Volume:
    """Return the subvolume whose top directory a path is."""
    from blocksnap.system.btrfs import TOP_DIRECTORY
    from blocksnap.volumes.subvolume import SubvolumeVolume

    if os.stat(path).st_ino == TOP_DIRECTORY:
        return SubvolumeVolume(path)
    above = os.path.realpath(path)
    while above != "/" and os.stat(above).st_ino != TOP_DIRECTORY:
        above = os.path.dirname(above)
    raise UnsupportedVolumeError(
        path,
        f"a directory in the btrfs subvolume {above}",
        f"name the subvolume, or make one of it: btrfs subvolume create; {SUPPORTED}",
    )


def _volume_below(number: int) -> str | None:
    """Return the one logical volume that a device lies on as a whole (LUKS, a partition inside)."""
    from blocksnap.system.devmapper import decode_name, dm_name, lvm_identity

    below = blockdev.slaves(number)
    while len(below) == 1:
        named = decode_name(dm_name(below[0]) or "") if lvm_identity(below[0]) else None
        if named:
            return "/".join(named)
        below = blockdev.slaves(below[0])
    return None


def _logical_volume(
    text: str, vg: str, name: str, lv_uuid: str | None = None, *, limits: VolumeLimits | None = None
) -> Volume:
    from blocksnap.system import lvm

    record, report = lvm.get(vg, name)
    if lv_uuid is not None and record.lv_uuid.replace("-", "") != lv_uuid:
        raise NoSuchVolumeError(text, "it was replaced in this very moment")
    refuse_unsupported(record, report)
    limits = limits or VolumeLimits()
    if record.is_classic:
        from blocksnap.volumes.classic import ClassicVolume

        return ClassicVolume(record, limits.store_percent)
    from blocksnap.volumes.thin import ThinVolume
    from blocksnap.volumes.thin_pool import PoolLimits

    pool = PoolLimits(limits.pool_data_percent, limits.pool_metadata_percent)
    return ThinVolume(report.thin(record), pool)


def refuse_unsupported(record: LvRecord, report: LvReport) -> None:
    """Raise VolumeError for a logical volume of which no backup can be taken."""
    obstacle = obstacle_of(record, report)
    if obstacle:
        raise UnsupportedVolumeError(record.full_name, *obstacle)


def obstacle_of(record: LvRecord, report: LvReport) -> tuple[str, str | None] | None:
    """Say what a logical volume is and what to do, when no backup can be taken of it; None when one can."""
    from blocksnap.system.lvm import run_of

    checks = (
        (record.vg_exported, "in an exported volume group", f"import it: vgimport {record.vg_name}"),
        (
            record.vg_shared,
            "in a volume group that several hosts share",
            "take the backup of a local volume group",
        ),
        (
            record.vg_partial,
            "in a volume group with missing disks",
            f"bring them back, or: vgreduce --removemissing {record.vg_name}",
        ),
        (
            run_of(record.lv_tags) is not None,
            "a snapshot that blocksnap made",
            "name the volume it was made of",
        ),
        (record.segtype == "thin-pool", "a thin pool", _volumes_in(record, report)),
        (record.is_internal, "an inner part of a logical volume", "name the volume that it is a part of"),
        (record.lv_merging, "being merged", "wait until the merge is done (lvs -o+lv_merging)"),
    )
    for found, what, advice in checks:
        if found:
            return what, advice
    if record.is_thin:
        return None
    if record.is_classic:
        return _obstacle_below(record, report)
    if record.is_classic_snapshot:
        return "a classic LVM snapshot", f"name the volume it was made of: {record.vg_name}/{record.origin}"
    if record.segtype == "mirror":
        # What LVM itself says when a snapshot of one is taken.
        advice = "snapshots of it can deadlock when a disk fails: lvconvert --type raid1"
        return _KINDS["mirror"], f"{advice} {record.full_name}"
    return _KINDS.get(record.segtype, "of no known kind"), f"this kind is not supported yet; {SUPPORTED}"


def _obstacle_below(record: LvRecord, report: LvReport) -> tuple[str, str] | None:
    """Say what LVM takes no snapshots of although it is a classic volume (docs/design.md, section 4.7)."""
    name = record.full_name
    pool = report.find_uuid(record.pool_lv_uuid) if record.segtype == "cache" else None
    if pool is not None and pool.segtype != "cache-pool":
        return (
            "cached by a single volume (cachevol), and LVM takes no snapshots of that while it is active",
            f"lvconvert --splitcache {name}, then cache it by a pool: lvconvert --type cache --cachepool",
        )
    if any(part.segtype == "integrity" for part in report.parts(record)):
        return (
            "a RAID volume with integrity, and LVM takes no snapshots of that",
            f"lvconvert --raidintegrity n {name}",
        )
    return None


def _volumes_in(pool: LvRecord, report: LvReport) -> str:
    names = [lv.full_name for lv in report if lv.pool_lv_uuid == pool.lv_uuid and lv.is_thin]
    return f"name the volumes in it: {', '.join(names[:5])}" if names else "there is no volume in it"
