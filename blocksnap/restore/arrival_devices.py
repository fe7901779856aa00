"""The devices of an instant restore: what is used, from its first second to when it is LVM's alone.

    VG-NAME             snapshot of the device below; its exception store is the volume NAME-meanwhile
    VG-NAME-blocksnap   what has arrived from the volume NAME-arriving, the rest from a network block device

Every step can be taken again from wherever an interruption has left it (docs/design.md, section 6.5).
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass

from blocksnap.errors import BlocksnapError, TargetError
from blocksnap.system import devmapper, dm_tables, lvm
from blocksnap.system.blockdev import DeviceBusyError, number_text, sysfs_folder
from blocksnap.system.command import CommandError
from blocksnap.system.dm_status import lvm_uuid
from blocksnap.system.mounts import users_of_device

_SECTOR = 512
_CHUNK_SECTORS = 8
"""Of the exception store: a block of most filesystems, so that a write of one copies nothing."""
_EXCEPTION_BYTES = 16
_SPARE_BYTES = 1 << 20
_ZEROED_BYTES = 64 << 10
_LOOK_SECONDS = 0.2


class WritesLostError(TargetError):
    """The kernel has given up on what was written meanwhile."""

    def __init__(self, volume: str, state: str) -> None:
        self.volume, self.state = volume, state
        super().__init__(
            f"what was written to {volume} since it was restored is lost: its store is {state}",
            resolution="see dmesg for why (a full pool or volume group, a failing disk); restore again",
        )


class StoreFullError(TargetError):
    """There is no more room for what is written meanwhile; ``users`` are in the way of making some."""

    def __init__(self, volume: str, users: Sequence[str] = ()) -> None:
        self.volume, self.users = volume, tuple(users)
        super().__init__(
            f"the room for what is written to {volume} meanwhile is full: writes fail, and what was written "
            f"before is kept{''.join(f'; it is {user}' for user in users)}",
            resolution="stop what uses it, unmount it, end this command, and make room with: "
            f"blocksnap restore --instant --resume {volume}",
        )


class VolumeAppearedError(TargetError):
    """Somebody has made a volume of the name that is restored to, while that was interrupted."""

    def __init__(self, group: str, name: str) -> None:
        self.group, self.name = group, name
        super().__init__(
            f"{group}/{name} is being restored, and a volume of that name was made meanwhile",
            resolution=f"give that one another name (lvrename {group} {name} OTHER) or remove it, then: "
            f"blocksnap restore --instant --resume {group}/{name}",
        )


@dataclass(frozen=True, slots=True)
class Names:
    """What the devices and volumes are called, in device-mapper and in LVM."""

    device: str
    below: str
    group: str
    name: str
    arriving: str
    meanwhile: str

    @property
    def volume(self) -> str:
        """``VG/NAME``."""
        return f"{self.group}/{self.name}"


def below_table(*, lv_bytes: int, size: int, head: int, reached: int, local: int, remote: int) -> str:
    """Return the table of the device below: what is not remote any more is local.

    Local are the bytes from ``head`` to ``reached``, and those behind ``size``; numbers are those of devices.
    """
    parts: list[tuple[int, int, int]] = []
    reached = max(reached, head)
    for begin, end, device in (
        (0, head, remote),
        (head, reached, local),
        (reached, size, remote),
        (size, lv_bytes, local),
    ):
        if begin >= end:
            continue
        if parts and parts[-1][2] == device:
            parts[-1] = (parts[-1][0], end, device)
        else:
            parts.append((begin, end, device))
    return "\n".join(
        f"{begin // _SECTOR} {(end - begin) // _SECTOR} linear {number_text(device)} {begin // _SECTOR}"
        for begin, end, device in parts
    )


def store_bytes(volume_bytes: int) -> int:
    """Return how large an exception store has to be that takes everything (kernel: dm-snap-persistent.c)."""
    chunk = _CHUNK_SECTORS * _SECTOR
    lists = -(-volume_bytes // chunk) * _EXCEPTION_BYTES
    return volume_bytes + lists + _SPARE_BYTES


def empty_store(node: str) -> None:
    """Make sure that nothing of what a volume held before is taken for the list of an exception store."""
    fd = os.open(node, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.pwrite(fd, bytes(_ZEROED_BYTES), 0)
        os.fsync(fd)
    finally:
        os.close(fd)


class ArrivalDevices:
    """The devices as they are now; raises CommandError where the kernel refuses something."""

    def __init__(self, names: Names) -> None:
        self._names = names

    def open_volumes(self) -> int:
        """Activate both volumes and return the bytes of the one that the backup goes to."""
        names = self._names
        for volume in (names.arriving, names.meanwhile):
            if dm_tables.number_of(devmapper.encode_name(names.group, volume)) is None:
                lvm.activate(names.group, volume)
        return int((sysfs_folder(self.local()) / "size").read_text()) * _SECTOR

    def require_name(self) -> None:
        """Raise VolumeAppearedError where the device of the name is a volume of LVM's, which has a UUID.

        Not to be asked once the restored one is such a volume.
        """
        number = dm_tables.number_of(self._names.device)
        if number is not None and devmapper.dm_uuid(number):
            raise VolumeAppearedError(self._names.group, self._names.name)

    @property
    def node(self) -> str:
        """The node of the volume that the backup goes to."""
        return f"/dev/mapper/{devmapper.encode_name(self._names.group, self._names.arriving)}"

    def local(self) -> int:
        """Return the number of the device that the backup goes to."""
        return self._number(devmapper.encode_name(self._names.group, self._names.arriving))

    def set_below(self, table: str) -> None:
        """Make the device below, or give it this table."""
        if dm_tables.number_of(self._names.below) is None:
            dm_tables.create(self._names.below, table)
        else:
            dm_tables.replace(self._names.below, table, flushing=False)

    def set_below_local(self, lv_bytes: int) -> None:
        """Have the device below need nothing but the volume."""
        local = self.local()
        table = below_table(lv_bytes=lv_bytes, size=0, head=0, reached=0, local=local, remote=local)
        self.set_below(table)

    def open_top(self, lv_bytes: int) -> str:
        """Make the device that is used, if it is not there, and return its path."""
        if dm_tables.number_of(self._names.device) is None:
            dm_tables.create(self._names.device, self._top_table(lv_bytes, "snapshot", "PO"))
        return self.publish()

    def publish(self) -> str:
        """Give the device the path that LVM will give it."""
        path = f"/dev/{self._names.volume}"
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with contextlib.suppress(FileExistsError):
            os.symlink(f"/dev/mapper/{self._names.device}", path)
        return path

    def check_writes(self) -> None:
        """Raise WritesLostError or StoreFullError unless what is written is kept."""
        number = dm_tables.number_of(self._names.device)
        if number is not None:
            self._require_sound(devmapper.snapshot_status(number).state)

    def _require_sound(self, state: str) -> None:
        if state == "overflow":
            raise StoreFullError(self._names.volume)
        if state not in ("valid", "merging"):
            raise WritesLostError(self._names.volume, state)

    def make_room(self, lv_bytes: int) -> None:
        """Where the store was full, make it large enough for all; raises StoreFullError while it is used."""
        names = self._names
        number = dm_tables.number_of(names.device)
        if number is None or " snapshot" not in dm_tables.read_table(names.device):
            return
        if devmapper.snapshot_status(number).state != "overflow":
            return
        if users := users_of_device(number):
            raise StoreFullError(names.volume, users)
        # The kernel looks at the size of a store, and forgets that it was full, only when it is opened.
        try:
            dm_tables.remove(names.device)
        except CommandError as err:
            if "busy" not in err.message:
                raise
            # A mount that is younger than this process's own view of them need not be seen here.
            raise StoreFullError(names.volume, ["in use"]) from err
        lvm.extend_volume(names.group, names.meanwhile, store_bytes(lv_bytes))

    def merge(self, lv_bytes: int) -> None:
        """Bring what was written meanwhile to the volume, while it is used; returns when all of it is there.

        Raises WritesLostError, StoreFullError.
        """
        table = self._top_table(lv_bytes, "snapshot-merge", "P")
        name = self._names.device
        if dm_tables.number_of(name) is None:
            dm_tables.create(name, table)
        elif " snapshot" not in dm_tables.read_table(name):
            # It was all there, and the volume is used as it is.
            return
        else:
            dm_tables.replace(name, table, flushing=True)
        self.publish()
        while True:
            status = devmapper.snapshot_status(self._number(name))
            self._require_sound(status.state)
            if status.allocated == status.metadata:
                return
            time.sleep(_LOOK_SECONDS)

    def hand_over(self) -> None:
        """Make the device LVM's own, and remove everything else, while it is used.

        Takes up wherever it was interrupted.
        """
        names = self._names
        report = lvm.report(names.group)
        ours = devmapper.encode_name(names.group, names.arriving)
        if report.find(names.group, names.arriving) is not None:
            # Its device may be in the place of ours, and must not be touched.
            if report.find(names.group, names.name) is not None:
                raise VolumeAppearedError(names.group, names.name)
            if dm_tables.number_of(names.device) is not None and dm_tables.number_of(ours) is not None:
                dm_tables.replace(names.device, dm_tables.read_table(ours), flushing=True)
            dm_tables.remove(names.below)
            lvm.remove_volume(names.group, names.meanwhile, tag=lvm.INSTANT_TAG)
            lvm.deactivate(names.group, names.arriving)
            lvm.rename_volume(names.group, names.arriving, names.name)
        volume, _ = lvm.get(names.group, names.name)
        number = dm_tables.number_of(names.device)
        if number is None:
            lvm.activate(names.group, names.name)
        elif not devmapper.dm_uuid(number):
            dm_tables.give_uuid(names.device, lvm_uuid(volume.vg_uuid, volume.lv_uuid))
        if lvm.INSTANT_TAG in volume.lv_tags:
            lvm.delete_tag(names.group, names.name, lvm.INSTANT_TAG)

    def discard(self) -> None:
        """Remove everything, with what was written; raises DeviceBusyError where it is in use."""
        names = self._names
        number = dm_tables.number_of(names.device)
        # A volume of LVM's, which somebody has made meanwhile, has a UUID; ours has none yet.
        if number is not None and not devmapper.dm_uuid(number):
            if users := users_of_device(number):
                raise DeviceBusyError(names.volume, users)
            dm_tables.remove(names.device)
        path = f"/dev/{names.volume}"
        if os.path.islink(path) and not os.path.exists(path):
            os.unlink(path)
        dm_tables.remove(names.below)
        for volume in (names.arriving, names.meanwhile):
            lvm.remove_volume(names.group, volume, tag=lvm.INSTANT_TAG)

    def _top_table(self, lv_bytes: int, target: str, kind: str) -> str:
        store = self._number(devmapper.encode_name(self._names.group, self._names.meanwhile))
        below = self._number(self._names.below)
        numbers = f"{number_text(below)} {number_text(store)}"
        return f"0 {lv_bytes // _SECTOR} {target} {numbers} {kind} {_CHUNK_SECTORS}"

    @staticmethod
    def _number(name: str) -> int:
        found = dm_tables.number_of(name)
        if found is None:
            raise BlocksnapError(f"the device {name} is not there", resolution="see: dmsetup ls, lvs -a")
        return found
