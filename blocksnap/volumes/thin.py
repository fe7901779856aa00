"""LVM thin volumes: a read-only snapshot in an instant, and the pool tells what changed.

Nothing is kept on the pool between backups (``extents.thin`` has the reason why that is enough).
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import blake2b
from typing import TYPE_CHECKING, Self

from blocksnap.errors import BlocksnapError, VolumeError
from blocksnap.extents.changes import BasePolicy, Binding, Changes, Parent
from blocksnap.extents.thin import find_thin_changes
from blocksnap.extents.thin_identity import BaseSnapshot, ThinIdentity
from blocksnap.extents.thin_metadata import ThinMetadata
from blocksnap.system import blockdev, devmapper, mounts
from blocksnap.system.command import CommandError
from blocksnap.volumes.base import SnapshotTiming, Trace, VolumeKind
from blocksnap.volumes.errors import (
    PoolFullError,
    PoolHealthError,
    SnapshotFailedError,
    SnapshotLostError,
)

if TYPE_CHECKING:
    from blocksnap.system.lvm_report import LvRecord, LvReport, ThinRecord


AUTO_BASE_MAPPINGS = 1 << 25
"""Mappings of a volume from which on ``auto`` keeps a base: walking them all would take seconds."""


@dataclass(frozen=True, slots=True)
class PoolLimits:
    """How full a pool may be for a snapshot to be taken."""

    data_percent: float = 95.0
    metadata_percent: float = 90.0


class ThinVolume:
    """A thin volume of LVM."""

    kind: VolumeKind = "thin"

    def __init__(self, record: ThinRecord, limits: PoolLimits | None = None) -> None:
        self._thin = record
        self._limits = limits or PoolLimits()

    @property
    def name(self) -> str:
        """``VG/LV``."""
        return self._thin.lv.full_name

    @property
    def key(self) -> str:
        """The UUIDs, which survive renaming."""
        return f"lvm:{self._thin.lv.vg_uuid}/{self._thin.lv.lv_uuid}"

    @property
    def size(self) -> int:
        """Size when the volume was looked up."""
        return self._thin.lv.lv_size

    def trace(self, run: str) -> Trace | None:
        """Return the name that the snapshot of a run will have."""
        lv = self._thin.lv
        return {
            "kind": "lvm",
            "vg": lv.vg_name,
            "vg_uuid": lv.vg_uuid,
            "lv": snapshot_name(run, lv.lv_uuid),
            "origin": lv.name,
            "origin_uuid": lv.lv_uuid,
            "run": run,
        }

    def prepare(self) -> None:
        """Look at the pool before it is given work."""
        check_pool(self._thin, self._limits)
        # The freeze flushes what is dirty; what is flushed before does not stretch it.
        if self._thin.lv.number is not None:
            mounts.flush_filesystem(self._thin.lv.number)

    def take_snapshot(self, run: str) -> ThinSnapshot:
        """Take a snapshot and measure how long LVM kept the volume suspended."""
        from blocksnap.system import lvm

        lv = self._thin.lv
        name = snapshot_name(run, lv.lv_uuid)
        watch = _FreezeWatch(lv.number)
        try:
            with watch:
                lvm.create_thin_snapshot(lv.vg_name, lv.name, name, run, watch.observe)
        except CommandError as err:
            raise SnapshotFailedError(self.name, err.message) from err
        return ThinSnapshot(self._thin, name, run, watch.timing())


class ThinSnapshot:
    """A read-only snapshot of a thin volume, inactive unless it is read."""

    def __init__(self, origin: ThinRecord, name: str, run: str, timing: SnapshotTiming) -> None:
        self._origin = origin
        self._name = name
        self._run = run
        self._timing = timing
        self._found: _Found | None = None
        self._removed = False

    @property
    def size(self) -> int:
        """Size in bytes."""
        return self._known().snapshot.lv.lv_size

    @property
    def timing(self) -> SnapshotTiming:
        """When it was taken and how long writers stood still."""
        return self._timing

    @property
    def binding(self) -> Binding:
        """Identity of the volume, the pool and this snapshot."""
        return self._known().identity.to_binding()

    def find_changes(self, parent: Parent | None) -> Changes:
        """Read from the pool's own metadata what changed since the parent."""
        known = self._known()
        with self._metadata(known.snapshot) as metadata:
            return find_thin_changes(
                metadata,
                known.identity,
                self.size,
                parent,
                self._base_of(parent, metadata) if parent else None,
                external_origin=known.snapshot.external_origin is not None,
            )

    def _base_of(self, parent: Parent, metadata: ThinMetadata) -> BaseSnapshot | None:
        """Return the snapshot that the parent's run left, if it did and it is still there."""
        from blocksnap.system import lvm

        known, run = self._known(), parent.binding.get("run")
        if not isinstance(run, str):
            return None
        lv = known.report.find(self._origin.lv.vg_name, snapshot_name(run, self._origin.lv.lv_uuid))
        if lv is None or lvm.BASE_TAG not in lv.lv_tags or lv.thin_id is None:
            return None
        try:
            return BaseSnapshot(lv.lv_uuid, lv.thin_id, metadata.facts(lv.thin_id))
        except VolumeError:
            # LVM knows it and the pool does not: it is no base.
            return None

    @contextmanager
    def open_reader(self) -> Iterator[int]:
        """Activate the snapshot, yield a descriptor, deactivate it."""
        known = self._known()
        with self._active(known.snapshot.lv) as number:
            fd = blockdev.open_by_number(number)
            try:
                yield fd
            finally:
                os.close(fd)

    def check(self) -> None:
        """Make sure that the snapshot is still there and the pool did not fail under it."""
        if self._found is None:
            # Looked up for the first time, and healthy by what that has shown.
            check_pool(self._known().snapshot, PoolLimits(data_percent=100.0, metadata_percent=100.0))
            return
        known = self._found
        current = self._report()
        lv = current.find_uuid(known.snapshot.lv.lv_uuid)
        if lv is None:
            raise SnapshotLostError(self._origin.lv.full_name, "it is gone")
        if (lv.thin_id, lv.pool_lv_uuid) != (known.snapshot.lv.thin_id, known.snapshot.lv.pool_lv_uuid):
            raise SnapshotLostError(self._origin.lv.full_name, "it is another device of the pool")
        thin = current.thin(lv)
        if thin.metadata.lv_uuid != known.identity.metadata_uuid:
            raise SnapshotLostError(self._origin.lv.full_name, "the pool's metadata was replaced")
        check_pool(thin, PoolLimits(data_percent=100.0, metadata_percent=100.0))

    def settle(self, policy: BasePolicy) -> bool:
        """Stay as the base of the next backup, or not, and remove the bases before."""
        from blocksnap.system import lvm

        known, vg = self._known(), self._origin.lv.vg_name
        stays = policy == "keep" or (
            policy == "auto" and known.identity.snapshot_mapped >= AUTO_BASE_MAPPINGS
        )
        if stays:
            lvm.add_tag(vg, self._name, lvm.BASE_TAG)
            self._removed = True
        for lv in known.report:
            run = lvm.run_of(lv.lv_tags)
            is_base = lvm.BASE_TAG in lv.lv_tags and lv.origin_uuid == self._origin.lv.lv_uuid
            if is_base and run is not None and lv.name != self._name:
                lvm.remove_snapshot(vg, lv.name, run)
        return stays

    def remove(self) -> None:
        """Remove the snapshot."""
        if self._removed:
            return
        from blocksnap.system import lvm

        lvm.remove_snapshot(self._origin.lv.vg_name, self._name, self._run)
        self._removed = True

    def _report(self) -> LvReport:
        from blocksnap.system import lvm

        return lvm.report(self._origin.lv.vg_name)

    def _known(self) -> _Found:
        """Look the snapshot up, once; not in ``take_snapshot``, where other volumes of a group wait."""
        if self._found is None:
            self._found = self._identify()
        return self._found

    def _identify(self) -> _Found:
        from blocksnap.system import lvm

        volume = self._origin.lv
        report = self._report()
        lv, origin = report.find(volume.vg_name, self._name), report.find_uuid(volume.lv_uuid)
        if lv is None or lvm.run_of(lv.lv_tags) != self._run:
            raise SnapshotLostError(volume.full_name, "LVM does not know it")
        if origin is None or lv.origin_uuid != volume.lv_uuid or lv.thin_id is None or origin.thin_id is None:
            raise SnapshotLostError(volume.full_name, "LVM reports another origin for it")
        thin = report.thin(lv)
        with self._metadata(thin) as metadata:
            mine, its = metadata.facts(lv.thin_id), metadata.facts(origin.thin_id)
        identity = ThinIdentity(
            vg_uuid=lv.vg_uuid,
            lv_uuid=origin.lv_uuid,
            pool_uuid=thin.pool.lv_uuid,
            metadata_uuid=thin.metadata.lv_uuid,
            metadata_place=report.place(thin.metadata, lvm.disks()),
            thin_id=origin.thin_id,
            origin_transaction=its.transaction,
            origin_time=its.created,
            snapshot_id=lv.thin_id,
            snapshot_time=mine.created,
            snapshot_uuid=lv.lv_uuid,
            snapshot_root=mine.device_root,
            snapshot_transaction=mine.transaction,
            snapshot_mapped=mine.mapped_chunks,
            pool_time=mine.pool_time,
            pool_transaction=mine.pool_transaction,
            chunk_size=mine.chunk_size,
            devices=_devices_of(report, thin.pool.lv_uuid),
            run=self._run,
        )
        external = report.thin(origin).external_origin
        snapshot = type(thin)(lv=lv, pool=thin.pool, metadata=thin.metadata, external_origin=external)
        return _Found(snapshot, origin, identity, report)

    @contextmanager
    def _metadata(self, thin: ThinRecord) -> Iterator[ThinMetadata]:
        """Open the pool's metadata, for which the pool has to be active."""
        with contextlib.ExitStack() as stack:
            metadata = thin.metadata
            if metadata.number is None:
                stack.enter_context(self._active(thin.lv))
                metadata = self._report().thin(thin.lv).metadata
            if metadata.number is None:
                raise SnapshotLostError(self._origin.lv.full_name, "its pool cannot be activated")
            fd = blockdev.open_by_number(metadata.number)
            stack.callback(os.close, fd)
            yield ThinMetadata(fd)

    @contextmanager
    def _active(self, lv: LvRecord) -> Iterator[int]:
        from blocksnap.system import lvm, udev

        lvm.activate(lv.vg_name, self._name)
        try:
            node = f"/dev/mapper/{devmapper.encode_name(lv.vg_name, self._name)}"
            udev.wait_for_node(node)
            number = os.stat(node).st_rdev
            identity = devmapper.lvm_identity(number)
            if identity is None or identity.lv_uuid != lv.lv_uuid.replace("-", ""):
                raise SnapshotLostError(self._origin.lv.full_name, f"{node} is another device")
            yield number
        finally:
            # Removing it deactivates it too, so a failure here must not hide what led to it.
            with contextlib.suppress(BlocksnapError):
                lvm.deactivate(lv.vg_name, self._name)


@dataclass(frozen=True, slots=True)
class _Found:
    snapshot: ThinRecord
    origin: LvRecord
    identity: ThinIdentity
    report: LvReport


def _devices_of(report: LvReport, pool_uuid: str) -> str:
    """Return the devices of a pool and the transactions that made them, but for our own snapshots."""
    from blocksnap.system import lvm

    return " ".join(
        f"{lv.thin_id}@{lv.transaction_id}"
        for lv in sorted(report, key=lambda lv: lv.thin_id or 0)
        if lv.is_thin and lv.pool_lv_uuid == pool_uuid and lvm.run_of(lv.lv_tags) is None
    )


class _FreezeWatch:
    """Measures, by looking, how long a device is suspended.

    One too short to be seen counts as none, and the snapshot is then dated to before ``lvcreate``: rather
    too early than too late.
    """

    def __init__(self, number: int | None) -> None:
        self._path = (
            f"/sys/dev/block/{blockdev.number_text(number)}/dm/suspended" if number is not None else None
        )
        self._fd = -1
        self._last_running = 0.0
        self._began = self._taken = 0.0
        self._suspended = False
        self._frozen = 0.0

    def __enter__(self) -> Self:
        if self._path is not None:
            with contextlib.suppress(OSError):
                self._fd = os.open(self._path, os.O_RDONLY | os.O_CLOEXEC)
        self._last_running = time.monotonic()
        self._began = time.time()
        return self

    def __exit__(self, *_: object) -> None:
        if self._fd >= 0:
            os.close(self._fd)
        if not self._taken:
            self._taken = self._began
        self._fd = -1

    def observe(self) -> None:
        """Look once."""
        now = time.monotonic()
        if self._fd >= 0 and _reads_one(self._fd):
            if not self._suspended:
                self._taken = time.time()
            self._suspended = True
        else:
            if self._suspended:
                # From the last look that saw it running to the first: rather too long than too short.
                self._frozen = max(self._frozen, now - self._last_running)
            self._suspended = False
            self._last_running = now

    def timing(self) -> SnapshotTiming:
        """Return what was seen."""
        return SnapshotTiming(taken_at=self._taken, freeze_seconds=self._frozen)


def _reads_one(fd: int) -> bool:
    try:
        return os.pread(fd, 1, 0) == b"1"
    except OSError:
        return False


def snapshot_name(run: str, lv_uuid: str) -> str:
    """Return the name of the snapshot that a run takes of a volume: short, and of no other run or volume."""
    digest = blake2b(f"{run}/{lv_uuid}".encode(), digest_size=5).hexdigest()
    prefix = "".join(letter for letter in run if letter.isalnum())[:12]
    return f"blocksnap-{prefix}-{digest}"


def check_pool(thin: ThinRecord, limits: PoolLimits) -> None:
    """Raise VolumeError when the pool of a volume is damaged or too full for a snapshot."""
    pool = thin.pool
    if pool.lv_check_needed:
        raise PoolHealthError(pool.full_name, "its metadata needs a check")
    if pool.lv_health_status not in ("", "out_of_data"):
        raise PoolHealthError(pool.full_name, pool.lv_health_status)
    metadata = thin.metadata.number
    number = devmapper.pool_above(metadata) if metadata is not None else None
    if number is None:
        return
    status = devmapper.pool_status(number)
    if status.mode != "rw":
        modes = {
            "ro": "it is read-only",
            "fail": "it has failed",
            "out_of_data_space": "it is out of data space",
        }
        raise PoolHealthError(pool.full_name, modes[status.mode])
    if status.needs_check:
        raise PoolHealthError(pool.full_name, "its metadata needs a check")
    if status.data_percent > limits.data_percent:
        raise PoolFullError(pool.full_name, "data", status.data_percent, limits.data_percent)
    if status.metadata_percent > limits.metadata_percent:
        raise PoolFullError(pool.full_name, "metadata", status.metadata_percent, limits.metadata_percent)
