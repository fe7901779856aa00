"""What every command of LVM is told: which devices to leave alone, and not to write to its archive.

nbd devices, because a dead one hangs each LVM command on the host and a served backup would show its volume
group twice; our own snapshots, because they show the signatures of what they are snapshots of. Reading the
settings of the host costs a command of its own, so that is done once.
"""

from __future__ import annotations

import json
import os
import re
from functools import cache
from pathlib import Path

from blocksnap.system import sysfs
from blocksnap.system.command import run
from blocksnap.system.devmapper import decode_name

SNAPSHOT_PREFIX = "blocksnap-"
ARRIVING_SUFFIX = "-blocksnap"
"""Of the name in device-mapper of what an instant restore has below the device that is used."""
_QUIET_METADATA = "backup/backup=0 backup/archive=0"
_OUR_REJECTS = (
    "r|^/dev/nbd|",
    # The same by their number, of which udev makes names too: NBD_MAJOR (linux/major.h).
    "r|^/dev/block/43:|",
    f"r|^/dev/mapper/.*-{SNAPSHOT_PREFIX.replace('-', '--')}|",
    f"r|/{SNAPSHOT_PREFIX}|",
)
_DEVICES_FOLDER = Path("/etc/lvm/devices")
_DEVICE_LINKS = Path("/dev/disk")
_SYS_BLOCK = Path("/sys/block")


def settings() -> tuple[str, str]:
    """Return the words with which each command of LVM is told what to leave alone."""
    settings = [_QUIET_METADATA]
    filters = _user_filters()
    if filters is not None:
        rejects = [*_OUR_REJECTS, *_device_rejects()]
        settings += [
            f"devices/{name}={json.dumps([*rejects, *patterns])}" for name, patterns in filters.items()
        ]
    return "--config", " ".join(settings)


@cache
def _user_filters() -> dict[str, list[str]] | None:
    """Return the administrator's device filter; None where a devices file decides instead."""
    text = run(
        "lvmconfig", "--type", "full", "devices/filter", "devices/use_devicesfile", "devices/devicesfile"
    )
    values = parse_config(text)
    name = values.get("devicesfile")
    if values.get("use_devicesfile") == 1 and isinstance(name, str) and (_DEVICES_FOLDER / name).exists():
        return None
    patterns = values.get("filter")
    return {"filter": [str(each) for each in patterns] if isinstance(patterns, list) else []}


def parse_config(text: str) -> dict[str, object]:
    """Parse ``name=value`` lines of lvmconfig; values are numbers, strings and lists of strings."""
    values: dict[str, object] = {}
    for line in text.splitlines():
        name, equals, value = line.strip().partition("=")
        if equals:
            try:
                values[name] = json.loads(value)
            except ValueError:
                values[name] = value
    return values


def _device_rejects() -> list[str]:
    """Return patterns for all names of devices that may wait for a server of ours.

    Those are nbd devices, and what instant restores are made of. A device is accepted if any of its names is.
    """
    connected = {path.name for path in sysfs.find(_SYS_BLOCK, "nbd*") if _size_of(path) > 0}
    names: list[str] = []
    for path in _arriving():
        connected.add(path.name)
        mapped = _text(path / "dm/name")
        volume = decode_name(mapped)
        names += [
            f"/dev/{path.name}",
            f"/dev/block/{_text(path / 'dev')}",
            f"/dev/mapper/{mapped}",
            *([f"/dev/{'/'.join(volume)}"] if volume else []),
        ]
    if connected:
        names += [str(link) for link in sysfs.find(_DEVICE_LINKS, "by-*/*") if _leads_to(link, connected)]
    # The pattern language has its own special characters; a dot stands for any of them.
    return [f"r|^{re.sub(r'[^a-zA-Z0-9/]', '.', name)}$|" for name in names]


def _arriving() -> list[Path]:
    """Return the folders in sysfs of the devices of instant restores that are not LVM's yet."""
    found = []
    for name in sysfs.find(_SYS_BLOCK, "dm-*/dm/name"):
        if _text(name).endswith(ARRIVING_SUFFIX):
            below = name.parent.parent
            found += [below, *(_SYS_BLOCK / holder.name for holder in sysfs.find(below, "holders/*"))]
    return found


def _text(path: Path) -> str:
    return sysfs.text_of(path) or ""


def _leads_to(link: Path, disks: set[str]) -> bool:
    try:
        target = os.readlink(link).rpartition("/")[2]
    except OSError:
        return False
    return target in disks or target.partition("p")[0] in disks


def _size_of(disk: Path) -> int:
    try:
        return int(sysfs.exact_text(disk / "size"))
    except (OSError, ValueError):
        return 0
