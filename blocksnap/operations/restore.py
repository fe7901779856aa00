"""Restore a backup to a file, a block device, a new volume or standard output."""

from __future__ import annotations

import os
import re
import stat
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import BinaryIO, Literal

from blocksnap.errors import DamageError, TargetError, UsageError
from blocksnap.operations.catalogue import map_root
from blocksnap.operations.compare import find_differences
from blocksnap.operations.reporting import Reporter, phase
from blocksnap.pipeline.flow import Geometry
from blocksnap.pipeline.selection import Ranges
from blocksnap.repository.blockmap import Entry, MapReader
from blocksnap.repository.documents import Backup
from blocksnap.repository.keys import Right
from blocksnap.repository.repository import Repository
from blocksnap.restore.engine import Losses, UnreadableRangeError, restore_to_stream, restore_to_target
from blocksnap.restore.targets import DeviceTarget, FileTarget, Target

TargetKind = Literal["file", "device", "volume", "stream"]
Missing = Literal["fail", "zero"]
"""What a restore does where the repository has lost something."""
_LV_NAME = re.compile(r"(?:/dev/)?([A-Za-z0-9+_.][A-Za-z0-9+_.-]*)/([A-Za-z0-9+_.][A-Za-z0-9+_.-]*)")


class RestoreDiffersError(DamageError):
    """What was written reads back differently."""

    def __init__(self, target: str, offset: int, length: int, total_bytes: int) -> None:
        self.target = target
        self.offset, self.length, self.total_bytes = offset, length, total_bytes
        super().__init__(
            f"{target} does not hold what was written: {total_bytes} bytes differ, "
            f"the first at {offset} to {offset + length}",
            resolution="do not use this target; look for I/O errors in the kernel log (dmesg)",
        )


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
class RestorePlan:
    """Which backup goes where."""

    backup: Backup
    target: str
    kind: TargetKind
    volume_group: str = ""
    volume_name: str = ""
    pool: str | None = None
    pool_uuid: str | None = None


@dataclass(frozen=True, slots=True)
class RestoreResult:
    """What a restore did."""

    plan: RestorePlan
    seconds: float
    verified: bool
    missing: tuple[tuple[int, int], ...] = ()
    """Ranges, as (offset, length), that hold zeros because the repository has lost them."""

    @property
    def missing_bytes(self) -> int:
        """How much is missing."""
        return sum(length for _, length in self.missing)


def plan_restore(backup: Backup, target: str, *, create: bool, pool: str | None) -> RestorePlan:
    """Decide what kind of place the target is; raises TargetError or UsageError."""
    if target == "-":
        if create:
            raise UsageError("--create makes a logical volume, and - is standard output")
        return RestorePlan(backup, target, "stream")
    name = _LV_NAME.fullmatch(target)
    if create:
        if name is None:
            raise UsageError(f"{target!r} is not the name of a volume", resolution="write it as VG/NAME")
        # The pool the backup came from, if it still is there, is where the volume belongs.
        known = backup.source.get("pool_uuid")
        uuid = known if isinstance(known, str) else None
        return RestorePlan(backup, f"{name[1]}/{name[2]}", "volume", name[1], name[2], pool, uuid)
    if pool:
        raise UsageError("--pool goes with --create")
    return RestorePlan(backup, *_existing(target, name))


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
) -> RestoreResult:
    """Do it.

    Raises MissingRightError, and TargetError when the target cannot take the backup, before anything is
    written, and LostRangeError when the repository cannot give a range, unless zeros may stand there.
    """
    repository.keys.require(Right.READ)
    began = time.monotonic()
    geometry = Geometry(plan.backup.size, plan.backup.chunk_size)
    losses = Losses(geometry) if missing == "zero" else None
    try:
        verified = _restore(repository, plan, geometry, losses, stdout, report, verify=verify)
    except UnreadableRangeError as err:
        raise LostRangeError(plan.backup, err) from err
    lost = tuple(Ranges(losses.chunks()).extents(geometry)) if losses else ()
    return RestoreResult(plan, time.monotonic() - began, verified=verified, missing=lost)


def _restore(
    repository: Repository,
    plan: RestorePlan,
    geometry: Geometry,
    losses: Losses | None,
    stdout: BinaryIO,
    report: Reporter,
    *,
    verify: bool,
) -> bool:
    """Write everything; tell whether it was read back."""
    backup = plan.backup
    runs = _runs(repository, backup, geometry, losses)
    doing = f"restoring {backup.volume.name}"
    if plan.kind == "stream":
        with phase(report, doing, backup.size):
            restore_to_stream(repository, geometry, runs, stdout, report.advance, losses)
            stdout.flush()
        return False
    with ExitStack() as stack:
        target = _open_target(plan, stack)
        stack.callback(target.close)
        with phase(report, doing, backup.size):
            restore_to_target(repository, geometry, runs, target, report.advance, losses)
        if verify:
            _verify(repository, backup, target, Ranges(losses.chunks() if losses else ()), report)
        target.finish()
    return verify


def _runs(
    repository: Repository, backup: Backup, geometry: Geometry, losses: Losses | None
) -> Iterator[tuple[int, int, Entry]]:
    def refuse(begin: int, end: int, err: DamageError) -> None:
        offset, last = begin * geometry.chunk_size, min(end * geometry.chunk_size, geometry.size)
        raise UnreadableRangeError(offset, last - offset, err) from err

    note = losses.note if losses else refuse
    return MapReader(repository.load_node).runs(map_root(backup.map), 0, geometry.count, note)


def _open_target(plan: RestorePlan, stack: ExitStack) -> Target:
    if plan.kind == "file":
        return FileTarget(plan.target, plan.backup.size)
    if plan.kind == "device":
        return DeviceTarget(plan.target, plan.backup.size)
    from blocksnap.restore.new_volume import NewVolume

    volume = stack.enter_context(
        NewVolume(
            plan.volume_group,
            plan.volume_name,
            plan.backup.size,
            pool=plan.pool,
            pool_uuid=plan.pool_uuid,
        )
    )
    return volume.target


def _verify(repository: Repository, backup: Backup, target: Target, lost: Ranges, report: Reporter) -> None:
    differing = find_differences(repository, backup, target.reader(), [(0, backup.size)], report, lost=lost)
    if differing:
        geometry = Geometry(backup.size, backup.chunk_size)
        offset, length = next(differing.extents(geometry))
        raise RestoreDiffersError(target.name, offset, length, differing.total_bytes(geometry))
