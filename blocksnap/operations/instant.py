"""Restore a volume that is used from the first second, while its data arrives behind it.

The order of steps, and what holds between any two of them, is in docs/design.md, section 6.5.
"""

from __future__ import annotations

import re
import secrets
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial

from blocksnap.controller.arriving import Arrival, ArrivalFile, NothingArrivesError
from blocksnap.controller.pacing import TokenBucket
from blocksnap.errors import BlocksnapError, StorageError, TargetError, UsageError
from blocksnap.operations.catalogue import find_backup, require_image
from blocksnap.operations.images import IMAGES_FOLDER, OpenRepository, require_fuse, served_images
from blocksnap.operations.label import tell_of_labels
from blocksnap.operations.reporting import Reporter, phase
from blocksnap.operations.restore import LostRangeError, NewVolumeOptions
from blocksnap.operations.targets import read_runs
from blocksnap.pipeline.flow import Geometry
from blocksnap.repository.blockmap import MapReader
from blocksnap.repository.documents import Backup
from blocksnap.repository.keys import Right
from blocksnap.repository.repository import Repository
from blocksnap.restore.arrival_devices import (
    ArrivalDevices,
    Names,
    StoreFullError,
    below_table,
    empty_store,
    store_bytes,
)
from blocksnap.restore.arriving_target import ArrivingTarget
from blocksnap.restore.engine import UnreadableRangeError, head_bytes, restore_to_target
from blocksnap.restore.image_server import ImageServer
from blocksnap.restore.keeper import Keeper
from blocksnap.restore.new_volume import VolumeExistsError, choose_pool
from blocksnap.restore.record import RestoreRecord
from blocksnap.restore.targets import may_go_on
from blocksnap.system import dm_tables, lvm, namespace, nbd
from blocksnap.system.command import MissingProgramError, has_program
from blocksnap.system.lvm_report import LvReport

_VOLUME = re.compile(r"(?:/dev/)?([A-Za-z0-9+_.][A-Za-z0-9+_.-]*)/([A-Za-z0-9+_.][A-Za-z0-9+_.-]*)")
_MOST_NAME = 100
_SECTOR = 512
_AGAIN_SECONDS = 2.0
_LOOK_SECONDS = 0.5
_WRITES_SECONDS = 5.0
"""How often it is asked whether what is written meanwhile still has room."""


class UnevenSizeError(TargetError):
    """The backup is of something that no device can hold as it is."""

    def __init__(self, size: int) -> None:
        self.size = size
        super().__init__(
            f"a backup of {size} bytes, which are no whole sectors, cannot be used as a device",
            resolution="restore it to a file",
        )


class InterruptedArrivalError(TargetError):
    """An instant restore of the volume is under way already."""

    def __init__(self, volume: str) -> None:
        self.volume = volume
        super().__init__(
            f"{volume} is being restored already, and that was interrupted",
            resolution=f"go on with it: blocksnap restore --instant --resume {volume}",
        )


@dataclass(frozen=True, slots=True)
class InstantOptions:
    """How a volume is made, how much may be written before it is whole, and how fast the data may come."""

    new: NewVolumeOptions
    write_room: int = 0
    rate: int = 0


@dataclass(frozen=True, slots=True)
class InstantResult:
    """What was done: the device, and after how many seconds it could be used and was whole."""

    device: str
    backup: str
    volume_bytes: int
    usable_seconds: float
    seconds: float


def begin_instant(
    open_repository: OpenRepository,
    name: str,
    target: str,
    options: InstantOptions,
    report: Reporter,
    state_directory: str,
) -> InstantResult:
    """Make the volume ``VG/NAME``, usable at once, and bring the backup to it.

    Returns when it is a volume like any other. Raises UsageError, TargetError, NoFuseError, NbdError,
    StateError, InstantBusyError, and what opening the repository and finding the backup raise.
    """
    began = time.monotonic()
    group, volume = _parse(target)
    with _prepared(state_directory, group, volume) as (keeper, file):
        repository = open_repository()
        repository.keys.require(Right.READ)
        backup = find_backup(repository, name).backup
        require_image(backup)
        if backup.size % _SECTOR or not backup.size:
            raise UnevenSizeError(backup.size)
        before = file.read()
        if before is not None and before.stage != "making":
            raise InterruptedArrivalError(before.volume)
        if before is not None:
            _discard(before, file)
        known = lvm.report(group)
        arrival = _plan(repository, backup, known, group, volume)
        file.write(arrival)
        try:
            _make_volumes(arrival, backup, known, options)
        except BaseException:
            _discard(arrival, file)
            raise
        run = _Run(repository, backup, arrival, file, report, keeper, options.rate, began)
        return run.bring()


def resume_instant(
    open_repository: OpenRepository, target: str, rate: int, report: Reporter, state_directory: str
) -> InstantResult:
    """Go on with what was interrupted, on this host, however that came.

    Raises NothingArrivesError, and what ``begin_instant`` raises.
    """
    began = time.monotonic()
    group, volume = _parse(target)
    with _prepared(state_directory, group, volume) as (keeper, file):
        arrival = file.read()
        if arrival is None:
            raise NothingArrivesError(target)
        if arrival.stage == "making":
            _discard(arrival, file)
            raise NothingArrivesError(
                target, "it was interrupted before anything could be used: begin it anew"
            )
        repository = open_repository()
        if repository.config.id != arrival.repository:
            raise NothingArrivesError(target, "it comes from another repository")
        backup = find_backup(repository, arrival.backup).backup
        return _Run(repository, backup, arrival, file, report, keeper, rate, began).bring()


def abandon_instant(target: str, state_directory: str) -> None:
    """Give up a restore and remove the volume with all that was written to it.

    What waits for the repository fails first, so that whoever uses the volume can be ended. Raises
    DeviceBusyError while it is used, and NothingArrivesError when it is whole or was never begun.
    """
    group, volume = _parse(target)
    file = ArrivalFile(state_directory, group, volume)
    with file.held():
        arrival = file.read()
        if arrival is None:
            raise NothingArrivesError(target)
        if arrival.stage == "whole":
            raise NothingArrivesError(target, "all of it has arrived: go on with --resume, then remove it")
        _discard(arrival, file)


@contextmanager
def _prepared(state_directory: str, group: str, volume: str) -> Iterator[tuple[Keeper, ArrivalFile]]:
    """Fork what has to be forked first, and hold the restore of this volume."""
    require_fuse()
    if not has_program("nbdkit"):
        raise MissingProgramError("nbdkit")
    namespace.leave_mounts()
    with Keeper() as keeper:
        file = ArrivalFile(state_directory, group, volume)
        with file.held():
            yield keeper, file


def _parse(target: str) -> tuple[str, str]:
    found = _VOLUME.fullmatch(target)
    if found is None:
        raise UsageError(
            f"{target!r} is not the name of a volume",
            resolution="--instant makes a logical volume: write it as VG/NAME",
        )
    return found[1], found[2]


def _plan(repository: Repository, backup: Backup, report: LvReport, group: str, volume: str) -> Arrival:
    """Return what is to be made; raises VolumeExistsError."""
    token = secrets.token_hex(4)
    arrival = Arrival(
        stage="making",
        repository=repository.config.id,
        backup=backup.id,
        size=backup.size,
        group=group,
        name=volume,
        arriving=f"{volume[:_MOST_NAME]}-arriving",
        meanwhile=f"{volume[:_MOST_NAME]}-meanwhile",
        token=f"blocksnap-{token}",
    )
    for name in (volume, arrival.arriving, arrival.meanwhile):
        if report.find(group, name) is not None:
            raise VolumeExistsError(group, name)
    if dm_tables.number_of(arrival.device) is not None:
        raise VolumeExistsError(group, volume)
    return arrival


def _make_volumes(arrival: Arrival, backup: Backup, report: LvReport, options: InstantOptions) -> None:
    new = options.new
    uuid = backup.source.get("pool_uuid")
    known = uuid if isinstance(uuid, str) and not new.classic else None
    pool = choose_pool(report, arrival.group, new.pool, known)
    size = max(backup.size, new.volume_bytes)
    room = options.write_room or store_bytes(size)
    for name, size_bytes in ((arrival.arriving, size), (arrival.meanwhile, room)):
        tags = (lvm.INSTANT_TAG,)
        if pool is None:
            node = lvm.create_thick(arrival.group, name, size_bytes=size_bytes, tags=tags)
        else:
            node = lvm.create_thin(arrival.group, pool, name, size_bytes=size_bytes, tags=tags)
    empty_store(node)


def _names(arrival: Arrival) -> Names:
    return Names(
        arrival.device,
        arrival.below,
        arrival.group,
        arrival.name,
        arrival.arriving,
        arrival.meanwhile,
    )


def _discard(arrival: Arrival, file: ArrivalFile) -> None:
    """Remove everything."""
    index = nbd.find(arrival.token)
    if index is not None:
        # Nothing could be removed while something waits for it.
        nbd.disconnect(index)
    ArrivalDevices(_names(arrival)).discard()
    file.remove()


class _Run:
    """One process's part in an instant restore, from whatever stage it is at."""

    def __init__(
        self,
        repository: Repository,
        backup: Backup,
        arrival: Arrival,
        file: ArrivalFile,
        report: Reporter,
        keeper: Keeper,
        rate: int,
        began: float,
    ) -> None:
        self._repository = repository
        self._backup = backup
        self._geometry = Geometry(backup.size, backup.chunk_size)
        self._arrival = arrival
        self._file = file
        self._report = report
        self._keeper = keeper
        self._bucket = TokenBucket(rate) if rate else None
        self._looked = began
        self._lock = threading.Lock()
        self._began = began
        self._usable_seconds = 0.0
        self._devices = ArrivalDevices(_names(arrival))
        self._record = RestoreRecord(repository=arrival.repository, backup=backup.id, mode="whole")
        self._told: set[str] = set()

    def bring(self) -> InstantResult:
        """Do what is left to be done."""
        arrival = self._arrival
        try:
            if arrival.stage != "whole" or nbd.find(arrival.token) is not None:
                self._serve_and_fill()
            self._end()
        except BaseException:
            if self._arrival.stage == "making":
                _discard(self._arrival, self._file)
            else:
                self._report.warn(
                    f"{arrival.volume} is not complete"
                    + (
                        ", and reads of what has not arrived wait"
                        if self._arrival.stage == "arriving"
                        else ""
                    ),
                    resolution=f"go on: blocksnap restore --instant --resume {arrival.volume}",
                )
            raise
        seconds = time.monotonic() - self._began
        device = f"/dev/{arrival.volume}"
        return InstantResult(device, arrival.backup, arrival.size, self._usable_seconds, seconds)

    def _serve_and_fill(self) -> None:
        """Serve what has not arrived, make the device usable, and bring the rest."""
        lv_bytes = self._devices.open_volumes()
        image = f"{IMAGES_FOLDER}/{self._backup.id}"
        with (
            ExitStack() as users,
            served_images(
                self._repository,
                [self._backup],
                self._report,
                end_users=users.close,
                tell=self._tell,
                patient=True,
            ),
        ):
            server = ImageServer(image, self._arrival.token, self._keeper, self._tell)
            users.callback(server.close)
            remote = server.start()
            self._open(lv_bytes, remote)
            if self._arrival.stage == "arriving":
                self._fill_or_go_on_serving(lv_bytes, remote)
                self._reach("whole")
            self._devices.set_below_local(lv_bytes)
            server.disconnect()

    def _open(self, lv_bytes: int, remote: int) -> None:
        """Make the device that is used, if it is not there."""
        if self._arrival.stage == "making":
            # From here on the volume never looks whole when it is not.
            target = self._target(lv_bytes, remote)
            target.begin()
            target.close()
        if self._arrival.stage != "whole":
            self._move(lv_bytes, remote, self._reached())
        # What is written from the next step on is to be kept, whatever happens.
        if self._arrival.stage == "making":
            self._reach("arriving")
        self._devices.make_room(lv_bytes)
        device = self._devices.open_top(lv_bytes)
        self._usable_seconds = time.monotonic() - self._began
        tell_of_labels(self._backup, self._report)
        self._report.event(
            "usable",
            device=device,
            volume_bytes=self._backup.size,
            arrived_bytes=self._backup.size if self._arrival.stage == "whole" else self._reached(),
            seconds=round(self._usable_seconds, 3),
        )

    def _fill_or_go_on_serving(self, lv_bytes: int, remote: int) -> None:
        """Bring the data; when that cannot go on, tell, and serve those who use the volume until a signal."""
        try:
            while not self._fill(lv_bytes, remote):
                time.sleep(_AGAIN_SECONDS)
        except BlocksnapError as err:
            lost = LostRangeError(self._backup, err) if isinstance(err, UnreadableRangeError) else err
            self._report.warn(f"no more data arrives: {lost.brief}", resolution=lost.resolution)
            self._report.event("serving-only", volume=self._arrival.volume)
            while True:
                time.sleep(_LOOK_SECONDS)

    def _fill(self, lv_bytes: int, remote: int) -> bool:
        """Bring the data; False when the repository cannot be reached."""
        target = self._target(lv_bytes, remote)
        read_map = partial(read_runs, MapReader(self._repository.load_node), self._backup, None)
        try:
            with phase(self._report, f"restoring {self._backup.volume.name}", self._backup.size):
                restore_to_target(self._repository, self._geometry, read_map, target, self._report.advance)
            target.finish()
        except StorageError as err:
            target.close(keep=True)
            self._tell(err)
            return False
        except BaseException as err:
            target.close(keep=may_go_on(err))
            raise
        target.close()
        return True

    def _target(self, lv_bytes: int, remote: int) -> ArrivingTarget:
        moved = partial(self._moved, lv_bytes, remote)
        return ArrivingTarget(self._devices.node, self._backup.size, self._record, moved, self._hold_back)

    def _moved(self, lv_bytes: int, remote: int, reached: int) -> None:
        """Have what has arrived read from the volume from now on."""
        self._check_writes()
        self._move(lv_bytes, remote, reached)

    def _move(self, lv_bytes: int, remote: int, reached: int) -> None:
        self._devices.set_below(
            below_table(
                lv_bytes=lv_bytes,
                size=self._backup.size,
                head=head_bytes(self._geometry),
                reached=reached,
                local=self._devices.local(),
                remote=remote,
            )
        )

    def _reached(self) -> int:
        """Return up to where the data is there, but for the beginning."""
        return ArrivingTarget.reached_of(self._devices.node, self._record)

    def _check_writes(self) -> None:
        """Tell when the room for writes is full: the data may arrive all the same. Raises WritesLostError."""
        try:
            self._devices.check_writes()
        except StoreFullError as err:
            self._tell(err)

    def _hold_back(self, length: int) -> None:
        now = time.monotonic()
        with self._lock:
            is_due = now - self._looked >= _WRITES_SECONDS
            if is_due:
                self._looked = now
            delay = self._bucket.take(length, now) if self._bucket is not None else 0.0
        if is_due:
            self._check_writes()
        time.sleep(delay)

    def _end(self) -> None:
        """Bring what was written meanwhile to the volume, and make it LVM's own."""
        report = lvm.report(self._arrival.group)
        if report.find(self._arrival.group, self._arrival.meanwhile) is not None:
            lv_bytes = self._devices.open_volumes()
            self._devices.make_room(lv_bytes)
            self._devices.set_below_local(lv_bytes)
            self._report.event("arrived", volume=self._arrival.volume)
            self._devices.merge(lv_bytes)
        self._devices.hand_over()
        self._file.remove()

    def _reach(self, stage: str) -> None:
        self._arrival = Arrival.model_validate({**self._arrival.model_dump(), "stage": stage})
        self._file.write(self._arrival)

    def _tell(self, err: BlocksnapError) -> None:
        with self._lock:
            if err.brief in self._told:
                return
            self._told.add(err.brief)
        waits = "; what needs it waits" if isinstance(err, StorageError) else ""
        self._report.warn(f"{err.brief}{waits}", resolution=err.resolution)
