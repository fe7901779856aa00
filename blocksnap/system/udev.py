"""What udev knows about block devices; the only importer of pyudev.

udev's database may be empty (containers, initramfs); what the kernel itself tells is then all there
is, and every property beyond that may be missing.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass

from blocksnap.system import blockdev, sysfs
from blocksnap.system.command import CommandError, has_program, run


@dataclass(frozen=True, slots=True)
class BlockDevice:
    """A block device and what is known about it; empty strings where nothing is."""

    node: str
    number: int
    is_partition: bool
    size: int
    vg_name: str
    lv_name: str
    dm_uuid: str
    filesystem: str
    filesystem_uuid: str
    label: str
    links: tuple[str, ...]


def block_devices() -> list[BlockDevice]:
    """Return all block devices with something in them, in the order of their names."""
    import pyudev

    found = []
    for device in pyudev.Context().list_devices(subsystem="block"):
        properties = device.properties
        if not device.device_node or not device.device_number:
            continue
        size = _size(device.device_number)
        if not size:
            continue
        found.append(
            BlockDevice(
                node=str(device.device_node),
                number=int(device.device_number),
                is_partition=device.device_type == "partition",
                size=size,
                vg_name=properties.get("DM_VG_NAME", ""),
                lv_name=properties.get("DM_LV_NAME", ""),
                dm_uuid=properties.get("DM_UUID", "") or _kernel_dm_uuid(device.device_number),
                filesystem=properties.get("ID_FS_TYPE", ""),
                filesystem_uuid=properties.get("ID_FS_UUID", ""),
                label=properties.get("ID_FS_LABEL", ""),
                links=tuple(sorted(properties.get("DEVLINKS", "").split())),
            )
        )
    return sorted(found, key=lambda each: each.node)


def settle(timeout_seconds: float = 10.0) -> None:
    """Wait until udev has dealt with what happened so far; does nothing where there is no udev."""
    if not os.path.exists("/run/udev/control") or not has_program("udevadm"):
        return
    try:
        run("udevadm", "settle", f"--timeout={timeout_seconds:.0f}", timeout_seconds=timeout_seconds + 5)
    except CommandError:
        # It took too long for udev; what comes next looks at the device itself.
        return


def wait_for_node(path: str, *, timeout_seconds: float = 10.0) -> None:
    """Wait until a node is there; raises NoDeviceError."""
    deadline = time.monotonic() + timeout_seconds
    while not os.path.exists(path):
        if time.monotonic() > deadline:
            raise blockdev.NoDeviceError(path, f"it did not appear within {timeout_seconds:g} s")
        time.sleep(0.01)


def _size(number: int) -> int:
    try:
        return int(sysfs.exact_text(blockdev.sysfs_folder(number) / "size")) * 512
    except (OSError, ValueError):
        return 0


def _kernel_dm_uuid(number: int) -> str:
    return sysfs.text_of(blockdev.sysfs_folder(number) / "dm/uuid") or ""
