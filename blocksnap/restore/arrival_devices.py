"""The devices of an instant restore: what is used, from its first second to when it is LVM's alone.

    VG-NAME             snapshot of the device below; its exception store is the volume NAME-meanwhile
    VG-NAME-blocksnap   what has arrived from the volume NAME-arriving, the rest from a network block device

Every step can be taken again from wherever an interruption has left it (docs/design.md, section 6.5).
"""

from __future__ import annotations

import contextlib
import os
import time
from dataclasses import dataclass

from blocksnap.errors import BlocksnapError
from blocksnap.restore.arrival_errors import (
    MergeFailedError,
    PartGoneError,
    PartInactiveError,
    PartStaysError,
    StoreFullError,
    StoreStaysSmallError,
    VolumeAppearedError,
    VolumeShrunkError,
    WritesFailedError,
    giving_up,
)
from blocksnap.restore.exception_store import (
    CHUNK_SECTORS,
    StoreUnreadableError,
    is_nearly_full,
    take_up_store,
)
from blocksnap.restore.keeper import Keeper
from blocksnap.system import devmapper, dm_tables, lvm
from blocksnap.system.blockdev import DeviceBusyError, number_text, sysfs_folder
from blocksnap.system.command import CommandError
from blocksnap.system.dm_status import lvm_uuid
from blocksnap.system.lvm_report import LvReport
from blocksnap.system.mounts import users_of_device

_SECTOR = 512
_LOOK_SECONDS = 0.2


_InUse = type[StoreFullError] | type[WritesFailedError] | type[MergeFailedError]
_IN_USE: dict[str, _InUse] = {"overflow": StoreFullError, "merge failed": MergeFailedError}


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


def below_table(
    *, lv_bytes: int, size: int, head: int, reached: int, local: int, remote: int, capacity: int | None = None
) -> str:
    """Return the table of the device below: what is not remote any more is local.

    Local are the bytes from ``head`` to ``reached``, and those behind ``size``; numbers are those of devices.
    Of a local device that was made smaller ``capacity`` is left: below ``size`` what it lacks is remote, and
    behind that an error.
    """
    parts: list[tuple[int, int, int | None]] = []
    capacity = lv_bytes if capacity is None else capacity
    reached = max(min(reached, capacity), head)
    there = max(capacity, size)
    for begin, end, device in (
        (0, head, remote),
        (head, reached, local),
        (reached, size, remote),
        (size, min(there, lv_bytes), local),
        (there, lv_bytes, None),
    ):
        if begin >= end:
            continue
        if parts and parts[-1][2] == device:
            parts[-1] = (parts[-1][0], end, device)
        else:
            parts.append((begin, end, device))
    return "\n".join(
        f"{begin // _SECTOR} {(end - begin) // _SECTOR} "
        + ("error" if device is None else f"linear {number_text(device)} {begin // _SECTOR}")
        for begin, end, device in parts
    )


class ArrivalDevices:
    """The devices as they are now; raises CommandError where the kernel refuses something."""

    def __init__(self, names: Names) -> None:
        self._names = names

    def open_volumes(self, size: int) -> int:
        """Activate both volumes and return the bytes of what is used, which are ``size`` at least.

        Raises PartGoneError, PartInactiveError.
        """
        names = self._names
        for volume in (names.arriving, names.meanwhile):
            if dm_tables.number_of(devmapper.encode_name(names.group, volume)) is None:
                self._require_part(volume, size)
                try:
                    lvm.activate(names.group, volume)
                except CommandError as err:
                    raise PartInactiveError(names.volume, f"{names.group}/{volume}", err) from err
        number = dm_tables.number_of(names.device)
        return _bytes_of(number) if number is not None else max(self.capacity(), size)

    def capacity(self) -> int:
        """Return the bytes of the volume that the backup goes to."""
        return _bytes_of(self.local())

    def require_capacity(self, needed: int) -> None:
        """Raise VolumeShrunkError where the volume that the backup goes to has become smaller."""
        capacity = self.capacity()
        if capacity < needed:
            raise VolumeShrunkError(f"{self._names.group}/{self._names.arriving}", capacity, needed)

    def require_parts(self) -> None:
        """Raise PartGoneError where something is gone without which all of it cannot be there any more."""
        for volume in (self._names.arriving, self._names.meanwhile):
            self._require_part(volume, 0)

    def require_result(self) -> None:
        """Raise PartGoneError where the volume that everything was merged into is gone, by either name."""
        names, report = self._names, self._report()
        if report.find(names.group, names.arriving) is None and report.find(names.group, names.name) is None:
            raise PartGoneError(names.volume, names.volume, None)

    def require_store(self) -> None:
        """Raise TargetError where what was written meanwhile cannot be read, or its merge has failed."""
        names = self._names
        number = dm_tables.number_of(names.device)
        if number is not None and " snapshot" in dm_tables.read_table(names.device):
            state = devmapper.snapshot_status(number).state
            if state != "overflow":
                self._require_sound(state)
        is_nearly_full(self._store)

    def _require_part(self, part: str, size: int) -> None:
        """``size`` is that of another one that would do, 0 where none does."""
        names = self._names
        if self._report().find(names.group, part) is not None:
            return
        words = f"lvcreate --size {size}b --name {part} --addtag {lvm.INSTANT_TAG} {names.group}"
        making = words if size and part == names.arriving else None
        raise PartGoneError(names.volume, f"{names.group}/{part}", making)

    def _report(self) -> LvReport:
        names = self._names
        try:
            return lvm.report(names.group)
        except lvm.NoVolumeError as err:
            raise PartGoneError(names.volume, f"the volume group {names.group}", None) from err

    def require_name(self) -> None:
        """Raise VolumeAppearedError where the device of the name is a volume of LVM's, which has a UUID.

        Not to be asked once the restored one is such a volume.
        """
        number = dm_tables.number_of(self._names.device)
        if number is not None and devmapper.dm_uuid(number):
            raise VolumeAppearedError(self._names.group, self._names.name)

    @property
    def _store(self) -> str:
        return f"/dev/mapper/{devmapper.encode_name(self._names.group, self._names.meanwhile)}"

    @property
    def node(self) -> str:
        """The node of the volume that the backup goes to."""
        return f"/dev/mapper/{devmapper.encode_name(self._names.group, self._names.arriving)}"

    def local(self) -> int:
        """Return the number of the device that the backup goes to."""
        return self._number(devmapper.encode_name(self._names.group, self._names.arriving))

    def set_below(self, table: str, limit_seconds: float = dm_tables.WAIT_SECONDS) -> None:
        """Make the device below, or give it this table, when what is under way has been answered.

        Raises CommandTimeoutError when that takes longer.
        """
        if dm_tables.number_of(self._names.below) is None:
            dm_tables.create(self._names.below, table)
        else:
            dm_tables.replace(self._names.below, table, flushing=False, limit_seconds=limit_seconds)

    def set_below_local(self, lv_bytes: int, limit_seconds: float = dm_tables.WAIT_SECONDS) -> None:
        """Have the device below need nothing but the volume; raises CommandTimeoutError."""
        local = self.local()
        table = below_table(lv_bytes=lv_bytes, size=0, head=0, reached=0, local=local, remote=local)
        self.set_below(table, limit_seconds)

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
        """Raise WritesFailedError, StoreFullError or MergeFailedError unless what is written is taken."""
        number = dm_tables.number_of(self._names.device)
        if number is not None:
            self._require_sound(devmapper.snapshot_status(number).state)

    def _require_sound(self, state: str) -> None:
        names = self._names
        if state == "overflow":
            raise StoreFullError(names.volume)
        if state == "merge failed":
            raise MergeFailedError(names.volume)
        if state not in ("valid", "merging"):
            raise WritesFailedError(names.volume)

    def mend_store(self, room: int) -> StoreStaysSmallError | None:
        """Have a store that was full or has failed, also in a merge, be taken again: by a device made anew.

        A merge that has failed is not begun again by another table: the kernel would hand over what it has
        of the list in memory, where the end of it can be cleared though it was not written, and go on from
        there (dm-snap.c, __handover_exceptions; dm-snap-persistent.c, persistent_commit_merge).

        One that was full gets as many bytes as ``room``, which is 0 where nothing is added to it any more.
        What keeps it from that is returned: all that is there can be read all the same.
        Raises StoreFullError, WritesFailedError or MergeFailedError while it is used, StoreUnreadableError.
        """
        names = self._names
        number = dm_tables.number_of(names.device)
        state = "valid"
        if number is not None:
            if " snapshot" not in dm_tables.read_table(names.device):
                return None
            state = devmapper.snapshot_status(number).state
            if state in ("valid", "merging"):
                return None
            self._take_away(number, _IN_USE.get(state, WritesFailedError))
        try:
            take_up_store(self._store)
            is_full = state == "overflow" or is_nearly_full(self._store)
        except StoreUnreadableError as err:
            err.resolution = f"{err.resolution}; or {giving_up(names.volume)}"
            raise
        if is_full and self._bytes_of_store() < room:
            # The kernel looks at the size of a store, and forgets that it was full, only when it is opened.
            try:
                lvm.extend_volume(names.group, names.meanwhile, room)
            except CommandError as err:
                return StoreStaysSmallError(names.volume, f"{names.group}/{names.meanwhile}", err)
        return None

    def _bytes_of_store(self) -> int:
        return _bytes_of(self._number(devmapper.encode_name(self._names.group, self._names.meanwhile)))

    def _take_away(self, number: int, in_use: _InUse) -> None:
        volume = self._names.volume
        if users := users_of_device(number):
            raise in_use(volume, users)
        try:
            dm_tables.remove(self._names.device)
        except CommandError as err:
            if "busy" not in err.message:
                raise
            # A mount that is younger than this process's own view of them need not be seen here.
            raise in_use(volume, ["in use"]) from err

    def merge(self, lv_bytes: int, keeper: Keeper) -> None:
        """Bring what was written meanwhile to the volume, while it is used; returns when all of it is there.

        A device that merges answers with what lies below, and writes there, where its store has failed. So
        whether it has is asked while nothing can be written any more, before it becomes such a device.

        Raises MergeFailedError, WritesFailedError, StoreFullError.
        """
        table = self._top_table(lv_bytes, "snapshot-merge", "P")
        name = self._names.device
        number = dm_tables.number_of(name)
        if number is None:
            dm_tables.create(name, table)
        elif " snapshot" not in dm_tables.read_table(name):
            # It was all there, and the volume is used as it is.
            return
        else:
            # One that was loaded before an interruption would be in the way of another one.
            dm_tables.clear(name)
            with keeper.letting_go_on(name):
                dm_tables.replace_if(name, table, self.check_writes)
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
        """Remove everything, with what was written.

        Raises DeviceBusyError where it is in use, PartStaysError.
        """
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
        try:
            report = lvm.report(names.group)
        except lvm.NoVolumeError:
            # The whole group is gone.
            return
        for volume in (names.arriving, names.meanwhile):
            if report.find(names.group, volume) is None:
                continue
            try:
                lvm.remove_volume(names.group, volume, tag=lvm.INSTANT_TAG)
            except CommandError as err:
                raise PartStaysError(names.volume, f"{names.group}/{volume}", err) from err

    def _top_table(self, lv_bytes: int, target: str, kind: str) -> str:
        store = self._number(devmapper.encode_name(self._names.group, self._names.meanwhile))
        below = self._number(self._names.below)
        numbers = f"{number_text(below)} {number_text(store)}"
        return f"0 {lv_bytes // _SECTOR} {target} {numbers} {kind} {CHUNK_SECTORS}"

    @staticmethod
    def _number(name: str) -> int:
        found = dm_tables.number_of(name)
        if found is None:
            raise BlocksnapError(f"the device {name} is not there", resolution="see: dmsetup ls, lvs -a")
        return found


def _bytes_of(number: int) -> int:
    return int((sysfs_folder(number) / "size").read_text()) * _SECTOR
