"""Restore a volume that is used from the first second, while its data arrives behind it.

The order of steps, and what holds between any two of them, is in docs/design.md, section 6.5.
"""

from __future__ import annotations

import re
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from blocksnap.controller.arriving import Arrival, ArrivalFile, NothingArrivesError
from blocksnap.errors import TargetError, UsageError, VolumeError
from blocksnap.operations.bringing import (
    Bringing,
    InstantResult,
    discard,
    finish_alone,
    is_all_there,
    require_store,
    require_whole,
)
from blocksnap.operations.catalogue import find_backup, require_image
from blocksnap.operations.images import OpenRepository, require_fuse
from blocksnap.operations.reporting import Reporter
from blocksnap.operations.restore import NewVolumeOptions, require_possible
from blocksnap.operations.restore_limits import LimitsOf
from blocksnap.repository.documents import Backup
from blocksnap.repository.keys import Right
from blocksnap.repository.repository import Repository
from blocksnap.restore.exception_store import empty_store, store_bytes
from blocksnap.restore.keeper import Keeper
from blocksnap.restore.new_volume import VolumeExistsError, choose_pool
from blocksnap.system import dm_tables, lvm, namespace
from blocksnap.system.command import CommandError, MissingProgramError, has_program
from blocksnap.system.lvm_report import LvReport

_VOLUME = re.compile(r"(?:/dev/)?([A-Za-z0-9+_.][A-Za-z0-9+_.-]*)/([A-Za-z0-9+_.][A-Za-z0-9+_.-]*)")
_MOST_NAME = 100
_SECTOR = 512


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
    verify: bool = False
    """Read all back when it has arrived, before what was written meanwhile goes to it."""


def begin_instant(
    open_repository: OpenRepository,
    name: str,
    target: str,
    options: InstantOptions,
    limits_of: LimitsOf,
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
        stored = find_backup(repository, name)
        backup = stored.backup
        require_image(backup)
        require_possible(options.new, backup)
        if backup.size % _SECTOR or not backup.size:
            raise UnevenSizeError(backup.size)
        before = file.read()
        if before is not None and before.stage != "making":
            raise InterruptedArrivalError(before.volume)
        if before is not None:
            discard(before, file)
        known = lvm.report(group)
        arrival = _plan(repository, backup, known, group, volume, verify=options.verify)
        file.write(arrival)
        try:
            _make_volumes(arrival, backup, known, options)
        except BaseException:
            discard(arrival, file)
            raise
        limits = limits_of(stored)
        run = Bringing(repository, backup, arrival, file, report, keeper, options.rate, limits, began)
        return run.bring()


def resume_instant(
    open_repository: OpenRepository,
    target: str,
    rate: int,
    limits_of: LimitsOf,
    report: Reporter,
    state_directory: str,
    *,
    verify: bool = False,
) -> InstantResult:
    """Go on with what was interrupted on this host, however that came, and ``verify`` if that is wanted now.

    Raises NothingArrivesError, UsageError where it is too late for that, and what ``begin_instant`` raises.
    """
    began = time.monotonic()
    group, volume = _parse(target)
    with _prepared(state_directory, group, volume) as (keeper, file):
        arrival = file.read()
        if arrival is None:
            raise NothingArrivesError(target)
        if arrival.stage == "making":
            discard(arrival, file)
            raise NothingArrivesError(
                target, "it was interrupted before anything could be used: begin it anew"
            )
        if verify and not arrival.verify:
            if arrival.has_all:
                raise UsageError(
                    f"{target} cannot be verified any more: what was written meanwhile is going to it",
                    resolution="leave out --verify",
                )
            arrival = arrival.model_copy(update={"verify": True})
            file.write(arrival)
        if is_all_there(arrival):
            return finish_alone(arrival, file, keeper, report, began)
        repository = open_repository()
        if repository.config.id != arrival.repository:
            raise NothingArrivesError(target, "it comes from another repository")
        stored = find_backup(repository, arrival.backup)
        limits = limits_of(stored)
        run = Bringing(repository, stored.backup, arrival, file, report, keeper, rate, limits, began)
        return run.bring()


def abandon_instant(target: str, state_directory: str) -> None:
    """Give up a restore and remove the volume with all that was written to it.

    What waits for the repository fails first, so that whoever uses the volume can be ended. Raises
    DeviceBusyError while it is used, PartStaysError, and NothingArrivesError when it was never begun, or is
    whole and nothing that can be seen is in the way of its end.
    """
    group, volume = _parse(target)
    file = ArrivalFile(state_directory, group, volume)
    with file.held():
        arrival = file.read()
        if arrival is None:
            raise NothingArrivesError(target)
        if arrival.has_all and _can_be_finished(arrival):
            raise NothingArrivesError(target, "all of it has arrived: go on with --resume, then remove it")
        discard(arrival, file)


def _can_be_finished(arrival: Arrival) -> bool:
    try:
        require_whole(arrival)
        require_store(arrival)
    except (TargetError, VolumeError, CommandError):
        return False
    return True


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


def _plan(
    repository: Repository, backup: Backup, report: LvReport, group: str, volume: str, *, verify: bool
) -> Arrival:
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
        verify=verify,
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
    size = new.volume_bytes or backup.size
    room = options.write_room or store_bytes(size)
    for name, size_bytes in ((arrival.arriving, size), (arrival.meanwhile, room)):
        tags = (lvm.INSTANT_TAG,)
        if pool is None:
            node = lvm.create_thick(arrival.group, name, size_bytes=size_bytes, tags=tags)
        else:
            node = lvm.create_thin(arrival.group, pool, name, size_bytes=size_bytes, tags=tags)
    empty_store(node)
