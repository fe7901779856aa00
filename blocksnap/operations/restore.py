"""Restore a backup to a file, a block device, a new volume or standard output."""

from __future__ import annotations

import os
import re
import stat
import time
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, BinaryIO, Literal

from blocksnap.errors import DamageError, TargetError, UsageError
from blocksnap.operations.catalogue import require_image
from blocksnap.operations.reporting import Reporter, phase
from blocksnap.operations.targets import complete, read_runs, verify_target
from blocksnap.pipeline.flow import Geometry
from blocksnap.pipeline.selection import Ranges
from blocksnap.repository.blockmap import MapReader
from blocksnap.repository.documents import Backup
from blocksnap.repository.keys import Right
from blocksnap.repository.repository import Repository
from blocksnap.restore.engine import Losses, UnreadableRangeError, restore_to_stream, restore_to_target
from blocksnap.restore.pool_watch import USUAL_LIMITS, RestoreLimits
from blocksnap.restore.record import RestoreMode, RestoreRecord
from blocksnap.restore.targets import LastingTarget

if TYPE_CHECKING:
    from blocksnap.operations.in_place import InPlaceResult

TargetKind = Literal["file", "device", "volume", "stream"]
ImageFormat = Literal["raw", "qcow2"]
Missing = Literal["fail", "zero"]
"""What a restore does where the repository has lost something."""
_LV_NAME = re.compile(r"(?:/dev/)?([A-Za-z0-9+_.][A-Za-z0-9+_.-]*)/([A-Za-z0-9+_.][A-Za-z0-9+_.-]*)")


class LostRangeError(DamageError):
    """The repository cannot give a range of a backup."""

    def __init__(self, backup: Backup, err: UnreadableRangeError) -> None:
        self.backup, self.offset, self.length = backup.id, err.offset, err.length
        super().__init__(
            f"backup {backup.id[:8]} of {backup.volume.name}: {err.brief}",
            resolution="run: blocksnap repair; to have the rest, with zeros there: restore --missing=zero",
        )


class UnknownTargetError(TargetError):
    """A target that is neither a place for a file nor a volume."""

    def __init__(self, target: str, reason: str, resolution: str) -> None:
        self.target = target
        super().__init__(f"cannot restore to {target}: {reason}", resolution=resolution)


@dataclass(frozen=True, slots=True)
class NewVolumeOptions:
    """What a volume that is made has to be like; what is not said follows from the backup."""

    pool: str | None = None
    classic: bool = False
    volume_bytes: int = 0


@dataclass(frozen=True, slots=True)
class RestorePlan:
    """Which backup goes where."""

    backup: Backup
    target: str
    kind: TargetKind
    in_place: bool = False
    image: ImageFormat = "raw"
    volume_group: str = ""
    volume_name: str = ""
    new: NewVolumeOptions = NewVolumeOptions()
    pool_uuid: str | None = None
    limits: RestoreLimits = USUAL_LIMITS


@dataclass(frozen=True, slots=True)
class RestoreResult:
    """What a restore did."""

    plan: RestorePlan
    seconds: float
    verified: bool
    in_place: InPlaceResult | None = None
    missing: tuple[tuple[int, int], ...] = ()
    """Ranges, as (offset, length), that hold zeros because the repository has lost them."""

    @property
    def missing_bytes(self) -> int:
        """How much is missing."""
        return sum(length for _, length in self.missing)


def plan_restore(
    backup: Backup,
    target: str,
    *,
    create: bool = False,
    in_place: bool = False,
    image: ImageFormat = "raw",
    new: NewVolumeOptions | None = None,
    limits: RestoreLimits = USUAL_LIMITS,
) -> RestorePlan:
    """Decide what kind of place the target is; raises TargetError or UsageError."""
    if create and in_place:
        raise UsageError("--create makes a new volume, and --in-place writes over what is there")
    if new is not None and not create:
        raise UsageError("--pool, --classic and --size go with --create")
    if target == "-":
        if create or in_place or image != "raw":
            raise UsageError("- is standard output, which takes the raw volume from beginning to end")
        return RestorePlan(backup, target, "stream")
    name = _LV_NAME.fullmatch(target)
    if create:
        return replace(_new_volume(backup, target, name, new or NewVolumeOptions(), image), limits=limits)
    found, kind = _existing(target, name)
    if image != "raw" and (kind != "file" or in_place):
        raise UsageError(f"--format {image} goes with a new file")
    if in_place and kind == "file" and not os.path.exists(found):
        raise UnknownTargetError(target, "there is no such file", "leave out --in-place to make it")
    return RestorePlan(backup, found, kind, in_place=in_place, image=image, limits=limits)


def require_possible(new: NewVolumeOptions, backup: Backup) -> None:
    """Raise UsageError where no volume can be made as it is asked for."""
    if new.pool and new.classic:
        raise UsageError("a classic volume is in no pool: give --pool or --classic")
    if 0 < new.volume_bytes < backup.size:
        raise UsageError(
            f"--size {new.volume_bytes} is less than the {backup.size} bytes of the backup",
            resolution="leave it out, or make the volume larger",
        )


def _new_volume(
    backup: Backup, target: str, name: re.Match[str] | None, new: NewVolumeOptions, image: ImageFormat
) -> RestorePlan:
    if name is None:
        raise UsageError(f"{target!r} is not the name of a volume", resolution="write it as VG/NAME")
    if image != "raw":
        raise UsageError("a volume holds the raw content: leave out --format")
    require_possible(new, backup)
    # The pool the backup came from, if it still is there, is where the volume belongs.
    known = backup.source.get("pool_uuid")
    uuid = known if isinstance(known, str) and not new.classic else None
    return RestorePlan(backup, f"{name[1]}/{name[2]}", "volume", False, "raw", name[1], name[2], new, uuid)


def _existing(target: str, name: re.Match[str] | None) -> tuple[str, TargetKind]:
    try:
        mode = os.stat(target).st_mode
    except FileNotFoundError:
        mode = 0
    except OSError as err:
        reason = (os.strerror(err.errno) if err.errno else str(err)).lower()
        raise UnknownTargetError(target, reason, "name another place") from err
    if stat.S_ISBLK(mode):
        return target, "device"
    if stat.S_ISDIR(mode):
        raise UnknownTargetError(target, "it is a directory", "name a file in it")
    if mode and not stat.S_ISREG(mode):
        raise UnknownTargetError(target, "it is neither a file nor a block device", "name another target")
    device = f"/dev/{target}"
    if not mode and name and not target.startswith("/") and os.path.exists(device):
        return device, "device"
    if target.startswith("/dev/") and not mode:
        raise UnknownTargetError(
            target, "there is no such device", "name an existing one, or make a new volume with --create"
        )
    folder = os.path.dirname(os.path.abspath(target))
    if not os.path.isdir(folder):
        raise UnknownTargetError(
            target,
            f"there is no directory {folder}",
            "make it first, or use --create to make a volume VG/NAME",
        )
    return target, "file"


def execute_restore(
    repository: Repository,
    plan: RestorePlan,
    stdout: BinaryIO,
    report: Reporter,
    *,
    verify: bool,
    missing: Missing = "fail",
    state_directory: str = "",
) -> RestoreResult:
    """Do it; ``state_directory`` is for the snapshots of a restore in place.

    Raises MissingRightError, and TargetError when the target cannot take the backup, before anything is
    written, and LostRangeError when the repository cannot give a range, unless zeros may stand there.
    """
    repository.keys.require(Right.READ)
    require_image(plan.backup)
    began = time.monotonic()
    geometry = Geometry(plan.backup.size, plan.backup.chunk_size)
    losses = Losses(geometry) if missing == "zero" else None
    in_place: InPlaceResult | None = None
    try:
        if plan.in_place:
            if losses is not None:
                raise UsageError("--missing=zero would write zeros over what is good: leave out --in-place")
            from blocksnap.operations.in_place import restore_in_place

            in_place = restore_in_place(
                repository,
                plan.backup,
                plan.target,
                state_directory,
                report,
                is_device=plan.kind == "device",
                limits=plan.limits,
                verify=verify,
            )
        else:
            _restore(repository, plan, geometry, losses, stdout, report, verify=verify)
    except UnreadableRangeError as err:
        raise LostRangeError(plan.backup, err) from err
    lost = tuple(losses.chunks().extents(geometry)) if losses else ()
    verified = verify and plan.kind != "stream"
    return RestoreResult(plan, time.monotonic() - began, verified, in_place, lost)


def _restore(
    repository: Repository,
    plan: RestorePlan,
    geometry: Geometry,
    losses: Losses | None,
    stdout: BinaryIO,
    report: Reporter,
    *,
    verify: bool,
) -> None:
    """Write everything."""
    backup = plan.backup
    read_map = partial(read_runs, MapReader(repository.load_node), backup, losses)
    doing = f"restoring {backup.volume.name}"
    if plan.kind == "stream":
        with phase(report, doing, backup.size):
            runs = read_map(0, geometry.count)
            restore_to_stream(repository, geometry, runs, stdout, report.advance, losses)
            stdout.flush()
        return
    # What was lost before an interruption would not be known after it, so such a restore begins anew.
    mode: RestoreMode = "whole" if losses is None else "with-losses"
    record = RestoreRecord(repository=repository.config.id, backup=backup.id, mode=mode)
    with ExitStack() as stack:
        opened = _open_target(plan, record, stack, verify=verify)
        target = stack.enter_context(complete(opened, report))
        with phase(report, doing, backup.size):
            restore_to_target(repository, geometry, read_map, target, report.advance, losses)
        if verify:
            verify_target(repository, backup, target, report, losses.chunks() if losses else Ranges())


def _open_target(
    plan: RestorePlan, record: RestoreRecord, stack: ExitStack, *, verify: bool
) -> LastingTarget:
    if plan.image != "raw":
        from blocksnap.restore.disk_image import DiskImageTarget

        return DiskImageTarget(plan.target, plan.backup.size, record, plan.image, compare=verify)
    if plan.kind == "file":
        from blocksnap.restore.file_target import FileTarget

        return FileTarget(plan.target, plan.backup.size, record)
    if plan.kind == "device":
        from blocksnap.restore.device_target import DeviceTarget

        return DeviceTarget(plan.target, plan.backup.size, record, plan.limits)
    from blocksnap.restore.new_volume import NewVolume

    volume = stack.enter_context(
        NewVolume(
            plan.volume_group,
            plan.volume_name,
            plan.backup.size,
            record,
            pool=plan.new.pool,
            pool_uuid=plan.pool_uuid,
            volume_bytes=plan.new.volume_bytes,
            limits=plan.limits,
        )
    )
    return volume.target
