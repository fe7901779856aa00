"""Classic LVM volumes: a read-only snapshot with an exception store, which has room for so much and no more.

The snapshot lives only while it is read, and the next backup compares everything. Where the job asks for it
(``base = "keep"``) the snapshot stays, active, and its store tells the next backup what was written. Whoever
writes pays for it: each first write to a chunk copies it to the store and waits for a flushed entry there.

A store that is full makes its snapshot worthless, and nothing else: writers go on, unhindered. So a snapshot
is watched while it is read (``levels``), it is looked at again before the commit (``check``), and a base that
became invalid means a full compare.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from blocksnap.errors import BlocksnapError
from blocksnap.extents.changes import BaseDecision, BasePolicy, Binding, Changes, Parent
from blocksnap.extents.cow import ATTACHMENT, CowBase, CowIdentity, CowStore, compare_whole, find_cow_changes
from blocksnap.system import blockdev, devmapper, mounts, written
from blocksnap.system.command import CommandError
from blocksnap.system.devmapper import SnapshotStatus
from blocksnap.system.dm_status import StatusReader, lvm_uuid
from blocksnap.volumes.base import Ledger, Level, SnapshotTiming, Trace, VolumeKind
from blocksnap.volumes.classic_store import StoreFacts, StoreSize, largest_store, plan_store
from blocksnap.volumes.errors import InactiveVolumeError, SnapshotFailedError, SnapshotLostError
from blocksnap.volumes.lvm_base import find_base, make_base, remove_bases
from blocksnap.volumes.lvm_snapshot import FreezeWatch, Readers, snapshot_name, snapshot_trace

if TYPE_CHECKING:
    from blocksnap.system.lvm_report import LvRecord, LvReport

BASE_PERCENT = 50.0
"""How full the store of a snapshot may be for it to stay as a base: it has to last until the next backup."""
_STATES = {
    "invalid": "its exception store was too small for what was written, so it is invalid",
    "overflow": "its exception store overflowed",
    "merging": "it is being merged into the volume",
    "merge failed": "it was to be merged into the volume, and that failed",
    "unknown": "device-mapper does not know its state",
}


class ClassicVolume:
    """A volume of LVM that is not thin: linear, striped, RAID, or cached."""

    kind: VolumeKind = "classic"

    def __init__(self, record: LvRecord, store_percent: float) -> None:
        self._lv = record
        self._percent = store_percent
        self._store = StoreSize(0, "")

    @property
    def name(self) -> str:
        """``VG/LV``."""
        return self._lv.full_name

    @property
    def key(self) -> str:
        """The UUIDs, which survive renaming."""
        return f"lvm:{self._lv.vg_uuid}/{self._lv.lv_uuid}"

    @property
    def size(self) -> int:
        """Size when the volume was looked up."""
        return self._lv.lv_size

    @property
    def snapshot_device(self) -> int | None:
        """Its number."""
        return self._lv.number

    def trace(self, run: str) -> Trace | None:
        """Return the name that the snapshot of a run will have."""
        return snapshot_trace(self._lv, run)

    def prepare(self) -> None:
        """Decide how large the exception store has to be, and see that there is room for it."""
        from blocksnap.system import lvm

        number = self._lv.number
        if number is None:
            raise InactiveVolumeError(self.name)
        report = lvm.report(self._lv.vg_name)
        current = report.find_uuid(self._lv.lv_uuid)
        if current is None:
            raise lvm.NoVolumeError(self.name)
        rate = written.observe(number, self._lv.lv_uuid)
        facts = StoreFacts(
            volume_size=current.lv_size,
            free=current.vg_free,
            extent_size=current.vg_extent_size,
            write_rate=rate.bytes_per_second if rate else 0.0,
            base_used=_used_by_bases(report, self._lv.lv_uuid),
        )
        self._store = plan_store(self.name, facts, self._percent)
        # The freeze flushes what is dirty; what is flushed before does not stretch it.
        mounts.flush_filesystem(number)

    def take_snapshot(self, run: str, ledger: Ledger) -> ClassicSnapshot:  # noqa: ARG002 - protocol
        """Take a snapshot and measure how long LVM kept the volume suspended."""
        from blocksnap.system import lvm

        lv = self._lv
        name = snapshot_name(run, lv.lv_uuid)
        watch = FreezeWatch(lv.number)
        try:
            with watch:
                lvm.create_classic_snapshot(lv.vg_name, lv.name, name, run, self._store.size, watch.observe)
        except CommandError as err:
            raise SnapshotFailedError(self.name, err.message) from err
        return ClassicSnapshot(lv, name, run, watch.timing(), self._store)


class ClassicSnapshot:
    """A read-only snapshot of a classic volume, active from its beginning to its end."""

    def __init__(
        self, origin: LvRecord, name: str, run: str, timing: SnapshotTiming, store: StoreSize
    ) -> None:
        self._origin = origin
        self._name = name
        self._run = run
        self._timing = timing
        self._store = store
        self._found: _Found | None = None
        self._attachment: Binding = {}
        self._removed = False
        self._readers = Readers()

    @property
    def size(self) -> int:
        """Size in bytes."""
        return self._known().identity.size

    @property
    def timing(self) -> SnapshotTiming:
        """When it was taken and how long writers stood still."""
        return self._timing

    @property
    def binding(self) -> Binding:
        """Identity of the volume and of this snapshot, and how large its store was made, and why.

        Once it is to stay as base, what joins it to the volume too.
        """
        return {
            **self._known().identity.to_binding(),
            "store_size": self._store.size,
            "store_reason": self._store.reason,
            **self._attachment,
        }

    def find_changes(self, parent: Parent | None) -> Changes:
        """Read from the exception store of the base what was written since, if a base was kept."""
        known = self._known()
        base = find_base(known.report, self._origin.lv_uuid, parent) if parent else None
        with ExitStack() as stack:
            store = stack.enter_context(_open_store(base)) if base else None
            try:
                record = _base_record(base) if base else None
            except BlocksnapError as err:
                # What LVM has no room to tell is in doubt, and no reason to fail.
                return compare_whole(self.size, err.brief)
            return find_cow_changes(known.identity, self.size, parent, record, store)

    @contextmanager
    def open_reader(self) -> Iterator[int]:
        """Yield a descriptor of the snapshot's device."""
        with self._readers.reading(self._known().number) as fd:
            identity = devmapper.lvm_identity(blockdev.device_number(fd))
            if identity is None or identity.lv_uuid != self._known().snapshot.lv_uuid.replace("-", ""):
                raise SnapshotLostError(self._origin.full_name, "its device is another one")
            yield fd

    def levels(self) -> tuple[Level, ...]:
        """Return how full its exception store is, unless that has room for everything."""
        status = self._status()
        if status is None:
            return ()
        self._require_validity(status)
        if status.total >= largest_store(self.size):
            return ()
        return (Level(f"the snapshot of {self._origin.full_name}", "store", status.allocated, status.total),)

    def drop(self) -> None:
        """Remove the snapshot, though it may be being read."""
        from blocksnap.system import lvm

        self._readers.cut_off()
        lvm.remove_snapshot(self._origin.vg_name, self._name, self._run)

    def check(self) -> None:
        """Make sure that it is still there, and that its store did not overflow."""
        status = self._status()
        if status is None:
            raise SnapshotLostError(self._origin.full_name, "it is gone")
        self._require_validity(status)

    def decide_base(self, policy: BasePolicy) -> BaseDecision:
        """Stay only where the job asks for it, and there is room left in the store."""
        if policy == "none":
            return BaseDecision(stays=False, reason="nothing is to stay in the volume group")
        if policy == "auto":
            reason = (
                "it would slow down whoever writes to the volume, so it stays only where the job says keep"
            )
            return BaseDecision(stays=False, reason=reason)
        status = self._status()
        if status is None or status.state != "valid":
            return BaseDecision(stays=False, reason="the snapshot is not valid any more")
        percent = 100 * status.allocated / status.total
        if percent > BASE_PERCENT and status.total < largest_store(self.size):
            reason = f"its store is {percent:.1f} % full, and a base begins below {BASE_PERCENT:g} %"
            return BaseDecision(stays=False, reason=reason)
        from blocksnap.system import lvm

        self._attachment = {ATTACHMENT: lvm.attachment(self._origin.vg_name, self._name)}
        return BaseDecision(stays=True, reason="as asked for")

    def settle(self, owner: str, *, stays: bool) -> None:
        """Become a base, or not, and remove the bases before."""
        if stays:
            make_base(self._origin, self._name, self._run, owner)
            self._removed = True
        but = self._name if stays else None
        remove_bases(self._known().report, owner, self._origin.lv_uuid, but=but)

    def remove(self) -> None:
        """Remove the snapshot."""
        if self._removed:
            return
        from blocksnap.system import lvm

        lvm.remove_snapshot(self._origin.vg_name, self._name, self._run)
        self._removed = True

    def _require_validity(self, status: SnapshotStatus) -> None:
        if status.state != "valid":
            advice = "raise limits.store_percent, or take it when less is written"
            raise SnapshotLostError(self._origin.full_name, _STATES[status.state], advice)

    def _status(self) -> SnapshotStatus | None:
        """Ask device-mapper how it is, by its UUID; None when it is gone."""
        snapshot = self._known().snapshot
        return _status_of(snapshot)

    def _known(self) -> _Found:
        """Look the snapshot up, once; not in ``take_snapshot``, where other volumes of a group wait."""
        if self._found is None:
            self._found = self._identify()
        return self._found

    def _identify(self) -> _Found:
        from blocksnap.system import lvm

        volume = self._origin
        report = lvm.report(volume.vg_name)
        lv = report.find(volume.vg_name, self._name)
        if lv is None or lvm.run_of(lv.lv_tags) != self._run:
            raise SnapshotLostError(volume.full_name, "LVM does not know it")
        if lv.origin_uuid != volume.lv_uuid:
            raise SnapshotLostError(volume.full_name, "LVM reports another origin for it")
        if lv.number is None or lv.origin_size is None or lv.chunk_size is None:
            raise SnapshotLostError(volume.full_name, "it is not active")
        identity = CowIdentity(
            vg_uuid=lv.vg_uuid,
            lv_uuid=volume.lv_uuid,
            snapshot_uuid=lv.lv_uuid,
            snapshot_created=lv.lv_time,
            chunk_size=lv.chunk_size,
            size=lv.origin_size,
            run=self._run,
        )
        return _Found(lv, lv.number, identity, report)


@dataclass(frozen=True, slots=True)
class _Found:
    snapshot: LvRecord
    number: int
    identity: CowIdentity
    report: LvReport


def _base_record(lv: LvRecord) -> CowBase:
    from blocksnap.system import lvm

    return CowBase(
        lv_uuid=lv.lv_uuid,
        origin_uuid=lv.origin_uuid,
        created=lv.lv_time,
        chunk_size=lv.chunk_size or 0,
        is_writable=lv.lv_permissions != "read-only",
        is_merging=lv.lv_merging is not False,
        attachment=lvm.attachment(lv.vg_name, lv.name),
    )


@contextmanager
def _open_store(base: LvRecord) -> Iterator[CowStore | None]:
    """Open the exception store of a base; None when the base is not active."""
    number = _store_device(base)
    if number is None:
        yield None
        return
    fd = blockdev.open_by_number(number)
    try:
        yield CowStore(fd, lambda: _status_of(base) or SnapshotStatus("unknown"))
    finally:
        os.close(fd)


def _store_device(lv: LvRecord) -> int | None:
    """Return the ``-cow`` device of a snapshot, told by its UUID among those that it lies on."""
    for number in blockdev.slaves(lv.number) if lv.number is not None else ():
        identity = devmapper.lvm_identity(number)
        if (
            identity is not None
            and identity.layer == "cow"
            and identity.lv_uuid == lv.lv_uuid.replace("-", "")
        ):
            return number
    return None


def _status_of(lv: LvRecord) -> SnapshotStatus | None:
    with StatusReader() as reader:
        text = reader.read(lvm_uuid(lv.vg_uuid, lv.lv_uuid))
    if text is None:
        return None
    try:
        return devmapper.parse_snapshot_status(text)
    except ValueError:
        # Another target: merged, for one.
        return SnapshotStatus("unknown")


def _used_by_bases(report: LvReport, lv_uuid: str) -> int | None:
    """Return what the stores of the bases of a volume hold, of the one that holds most; None without one."""
    from blocksnap.system import lvm

    used = []
    for lv in report:
        mark = lvm.base_of(lv.lv_tags)
        if mark is not None and mark.lv_uuid == lv_uuid and lv.is_classic_snapshot:
            status = _status_of(lv)
            # Of one that overflowed nobody knows how much it would have needed: more than there was.
            used.append(status.allocated if status and status.state == "valid" else lv.lv_size)
    return max(used, default=None)
