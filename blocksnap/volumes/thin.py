"""LVM thin volumes: a read-only snapshot in an instant, and the pool tells what changed.

Nothing is kept on the pool between backups (``extents.thin`` has the reason why that is enough), but where a
base is asked for (``thin_base``).
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from blocksnap.errors import BlocksnapError
from blocksnap.extents.changes import BaseDecision, BasePolicy, Binding, Changes, Parent
from blocksnap.extents.thin import find_thin_changes
from blocksnap.extents.thin_identity import BaseSnapshot, LostBase, ThinIdentity
from blocksnap.extents.thin_metadata import NoDeviceInPoolError, ThinMetadata
from blocksnap.system import blockdev, devmapper, mounts
from blocksnap.system.command import CommandError
from blocksnap.volumes import thin_base
from blocksnap.volumes.base import Ledger, Level, SnapshotTiming, Trace, VolumeKind
from blocksnap.volumes.errors import SnapshotFailedError, SnapshotLostError
from blocksnap.volumes.lvm_base import make_base, remove_bases
from blocksnap.volumes.lvm_snapshot import FreezeWatch, Readers, snapshot_name, snapshot_trace
from blocksnap.volumes.thin_hold import hold_metadata
from blocksnap.volumes.thin_pool import PoolLevels, PoolLimits, check_age, check_pool

if TYPE_CHECKING:
    from blocksnap.system.lvm_report import LvRecord, LvReport, ThinRecord


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

    @property
    def snapshot_device(self) -> int | None:
        """Its number, if it is active."""
        return self._thin.lv.number

    def trace(self, run: str) -> Trace | None:
        """Return the name that the snapshot of a run will have."""
        return snapshot_trace(self._thin.lv, run)

    def prepare(self) -> None:
        """Look at the pool before it is given work."""
        check_pool(self._thin, self._limits)
        # The freeze flushes what is dirty; what is flushed before does not stretch it.
        if self._thin.lv.number is not None:
            mounts.flush_filesystem(self._thin.lv.number)

    def take_snapshot(self, run: str, ledger: Ledger) -> ThinSnapshot:
        """Take a snapshot and measure how long LVM kept the volume suspended."""
        from blocksnap.system import lvm

        lv = self._thin.lv
        name = snapshot_name(run, lv.lv_uuid)
        watch = FreezeWatch(lv.number)
        try:
            with watch:
                lvm.create_thin_snapshot(lv.vg_name, lv.name, name, run, watch.observe)
        except CommandError as err:
            raise SnapshotFailedError(self.name, err.message) from err
        return ThinSnapshot(self._thin, name, run, watch.timing(), ledger)


class ThinSnapshot:
    """A read-only snapshot of a thin volume, inactive unless it is read."""

    def __init__(
        self, origin: ThinRecord, name: str, run: str, timing: SnapshotTiming, ledger: Ledger
    ) -> None:
        self._origin = origin
        self._name = name
        self._run = run
        self._timing = timing
        self._ledger = ledger
        self._found: _Found | None = None
        self._removed = False
        self._levels = PoolLevels(origin)
        self._readers = Readers()

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

    def _base_of(self, parent: Parent, metadata: ThinMetadata) -> BaseSnapshot | LostBase | None:
        """Return the snapshot that the parent's run left, or why it is not there; None when it left none."""
        base = thin_base.find_base(self._known().report, self._origin.lv.lv_uuid, parent)
        if base is None or isinstance(base, LostBase):
            return base
        if base.thin_id is None or base.pool_lv_uuid != self._known().identity.pool_uuid:
            return LostBase("the base snapshot is not in the volume's pool any more")
        try:
            return BaseSnapshot(base.lv_uuid, base.thin_id, metadata.facts(base.thin_id))
        except NoDeviceInPoolError:
            return LostBase("the pool does not have the base snapshot, though LVM does")

    @contextmanager
    def open_reader(self) -> Iterator[int]:
        """Activate the snapshot, yield a descriptor, deactivate it."""
        known = self._known()
        with self._active(known.snapshot.lv) as number, self._readers.reading(number) as fd:
            yield fd

    def levels(self) -> tuple[Level, ...]:
        """Return how full the pool is."""
        return self._levels.read()

    def drop(self) -> None:
        """Remove the snapshot, though it may be being read."""
        from blocksnap.system import lvm

        self._readers.cut_off()
        lvm.remove_snapshot(self._origin.lv.vg_name, self._name, self._run)

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

    def decide_base(self, policy: BasePolicy) -> BaseDecision:
        """Decide by the policy, the size of the volume's tree and how full the pool is now."""
        known = self._known()
        return thin_base.decide_base(policy, known.identity.snapshot_mapped, known.snapshot)

    def settle(self, owner: str, *, stays: bool) -> None:
        """Become a base, or not, and remove the bases before."""
        if stays:
            make_base(self._origin.lv, self._name, self._run, owner)
            self._removed = True
        but = self._name if stays else None
        remove_bases(self._known().report, owner, self._origin.lv.lv_uuid, but=but)

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
        check_age(thin.pool.full_name, mine.pool_time)
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
            # What LVM says is of the same instant as the list of devices; what the pool says may be younger.
            pool_transaction=min(mine.pool_transaction, thin.pool.transaction_id or mine.pool_transaction),
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
            trace = {
                "vg": thin.pool.vg_name,
                "pool": thin.pool.full_name,
                "pool_uuid": thin.pool.lv_uuid,
                "run": self._run,
            }
            number = devmapper.pool_above(metadata.number)
            hold = partial(hold_metadata, fd, number, trace, self._ledger) if number is not None else None
            yield ThinMetadata(fd, hold)

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
    """Return the devices of a pool and the transactions that made them.

    Our own snapshots too: one that was kept as a base is somebody's volume after a merge.
    """
    return " ".join(
        f"{lv.thin_id}@{lv.transaction_id}"
        for lv in sorted(report, key=lambda lv: lv.thin_id or 0)
        if lv.is_thin and lv.pool_lv_uuid == pool_uuid
    )
