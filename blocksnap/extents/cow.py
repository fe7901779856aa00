"""What changed on a classic LVM volume, told by the exception store of its base snapshot.

Before the kernel lets a write to a chunk of the origin through for the first time since a snapshot, it
copies the chunk to the snapshot's store and waits until the store's list on the medium has it. So the list
of the base, read when the new snapshot exists, has every chunk in which the new snapshot differs from the
base, and those written meanwhile: these are read once in vain. The cost is that of the change, 16 bytes a
chunk; the price is paid before, by every first write, and by keeping the base.

Nothing of the list is believed before the kernel has said that it is whole, and it is compared with the
kernel's own count. A list never gets shorter while its snapshot is valid; what makes one incomplete is an
overflow of the store, which the kernel marks, and a merge, which takes entries away and of which only
device-mapper and LVM know. A base that somebody wrote to has those chunks in its list too, but is not what a
base should be. Every doubt is a full compare, with its reason. (kernel: drivers/md/dm-snap.c,
dm-snap-persistent.c)
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

from blocksnap.extents.changes import Binding, Changes, JsonValue, Parent, read_fields
from blocksnap.extents.model import ExtentList
from blocksnap.system.command import CommandError
from blocksnap.system.devmapper import SnapshotState, SnapshotStatus

ATTACHMENT = "attachment"
"""Where a manifest has the UUID of what joins a base to its origin; older ones lack it."""
_ATTEMPTS = 3
_PAUSE_SECONDS = 0.2
_HEADER_CHUNKS = 1
_STATES: dict[SnapshotState, str] = {
    "invalid": "the base snapshot became invalid: its exception store was too small for what was written",
    "overflow": "the exception store of the base snapshot overflowed",
    "merging": "the base snapshot is being merged into the volume",
    "merge failed": "the base snapshot was to be merged into the volume, and that failed",
    "unknown": "device-mapper does not know the state of the base snapshot",
}


@dataclass(frozen=True, slots=True)
class CowIdentity:
    """What tells one classic snapshot of one volume from all others.

    ``snapshot_created`` is LVM's time of its creation, ``size`` the volume's at that time, in bytes.
    """

    vg_uuid: str
    lv_uuid: str
    snapshot_uuid: str
    snapshot_created: str
    chunk_size: int
    size: int
    run: str

    def to_binding(self) -> dict[str, JsonValue]:
        """Return the form that is stored in the manifest."""
        return {"source": "lvm-cow", **asdict(self)}

    @classmethod
    def from_binding(cls, binding: Binding) -> CowIdentity | None:
        """Return the identity in a manifest; None when it is not one, or not whole."""
        values = read_fields(cls, binding, lowest=1)
        return cls(**values) if values and binding.get("source") == "lvm-cow" else None


@dataclass(frozen=True, slots=True)
class CowBase:
    """A snapshot that an earlier run left as base, as LVM reports it now."""

    lv_uuid: str
    origin_uuid: str
    created: str
    chunk_size: int
    is_writable: bool
    is_merging: bool
    attachment: str = ""
    """UUID of what joins it to its origin."""


@dataclass(frozen=True, slots=True)
class Trust:
    """What changed since the parent is what the exception store of the base says, in chunks of that size."""

    chunk_size: int
    reason: str


@dataclass(frozen=True, slots=True)
class Doubt:
    """Nothing of the parent may be taken over unread."""

    reason: str


@dataclass(frozen=True, slots=True)
class Exceptions:
    """What an exception store says; ``allocated`` and ``metadata`` are what the kernel counts, in bytes."""

    changed: ExtentList
    chunk_size: int
    count: int
    areas: int
    allocated: int
    metadata: int


class CowStore:
    """The ``-cow`` device of a snapshot, opened by the caller, with O_DIRECT when the snapshot is active.

    ``ask`` asks device-mapper for the snapshot's status; it is called before and after the list is read.
    """

    def __init__(self, fd: int, ask: Callable[[], SnapshotStatus]) -> None:
        self._fd = fd
        self.status = ask

    @property
    def number(self) -> int:
        """Device number."""
        return os.fstat(self._fd).st_rdev

    def scan(self, origin_size: int, settled_areas: int) -> Exceptions:
        """Read the list once; as ``_native.cow_scan``, which documents it."""
        from blocksnap._native import cow_scan

        changed, chunk_size, count, areas, allocated = cow_scan(self._fd, origin_size, settled_areas)
        return Exceptions(
            ExtentList(changed),
            chunk_size,
            count,
            areas,
            allocated=allocated * chunk_size,
            metadata=(areas + _HEADER_CHUNKS) * chunk_size,
        )


def find_cow_changes(
    identity: CowIdentity,
    size: int,
    parent: Parent | None,
    base: CowBase | None,
    store: CowStore | None,
) -> Changes:
    """Say what to read of a new snapshot of ``size`` bytes, which exists already.

    ``base`` is the snapshot that an earlier run left as the parent's base, if there is one, and ``store``
    its exception store, if it is active.
    """
    if parent is None:
        return compare_whole(size, "first backup of this volume")
    decision = decide(identity, parent, base)
    if isinstance(decision, Doubt):
        return compare_whole(size, decision.reason)
    if store is None:
        return compare_whole(size, "the base snapshot is not active")
    found = read_exceptions(store, parent.size, decision.chunk_size)
    if isinstance(found, Doubt):
        return compare_whole(size, found.reason)
    # Beyond its end a snapshot records nothing: there all is new. (kernel: dm-snap.c, __origin_write)
    grown = ExtentList.of([(parent.size, size - parent.size)])
    return Changes(
        "cow",
        decision.reason,
        inherits=True,
        allocated=ExtentList.whole(size),
        changed=found.changed.union(grown),
        discarded=ExtentList(),
    )


def decide(current: CowIdentity, parent: Parent, base: CowBase | None) -> Trust | Doubt:
    """Decide whether the base is the snapshot that the parent backup was taken of, and fit to be asked."""
    known = CowIdentity.from_binding(parent.binding)
    if known is None:
        return Doubt("the parent backup does not say what classic snapshot it was taken of")
    if base is None:
        return Doubt("the snapshot of the parent backup is not there any more")
    doubt = (
        _doubt_about_volume(current, known, parent)
        or _doubt_about_base(current, known, base)
        or _doubt_about_attachment(parent, base)
    )
    if doubt:
        return Doubt(doubt)
    return Trust(
        base.chunk_size,
        "the parent's snapshot was kept as base: its exception store has what was written since",
    )


def _doubt_about_volume(current: CowIdentity, known: CowIdentity, parent: Parent) -> str | None:
    doubts = (
        (current.vg_uuid != known.vg_uuid, "the volume is in another volume group than at the parent backup"),
        (current.lv_uuid != known.lv_uuid, "this is another logical volume than at the parent backup"),
        (known.size != parent.size, "the parent backup is not as large as its snapshot was"),
        (current.size < known.size, "the volume is smaller than at the parent backup"),
        (
            not parent.known_here,
            "this host has no record of the parent backup: its state was lost, rolled back or cloned",
        ),
    )
    return next((reason for found, reason in doubts if found), None)


def _doubt_about_base(current: CowIdentity, known: CowIdentity, base: CowBase) -> str | None:
    doubts = (
        (
            (base.lv_uuid, base.created) != (known.snapshot_uuid, known.snapshot_created),
            "the base snapshot is not that of the parent backup",
        ),
        (base.lv_uuid == current.snapshot_uuid, "the base snapshot and the new one are the same"),
        (base.origin_uuid != current.lv_uuid, "the base snapshot is one of another volume"),
        (base.is_merging, _STATES["merging"]),
        (base.is_writable, "the base snapshot can be written to"),
        (base.chunk_size != known.chunk_size, "the base snapshot has another chunk size than it had"),
    )
    return next((reason for found, reason in doubts if found), None)


def _doubt_about_attachment(parent: Parent, base: CowBase) -> str | None:
    """Whoever splits a snapshot off and puts it back may have written, and given the volume other places."""
    known = parent.binding.get(ATTACHMENT)
    if known is None or known == base.attachment:
        return None
    return "the base snapshot was taken off the volume and put back, and records nothing in between"


def doubt_about_status(status: SnapshotStatus, chunk_size: int) -> str | None:
    """Say why a snapshot in this state has a list that may not be complete; None when it has none."""
    if status.state != "valid":
        return _STATES[status.state]
    if status.total - status.allocated < chunk_size:
        # An overflow is marked without a flush, so a power cut can take the mark back.
        return "the exception store of the base snapshot is full to the last chunk"
    return None


def read_exceptions(store: CowStore, origin_size: int, chunk_size: int) -> Exceptions | Doubt:
    """Read the list of an active snapshot, and have the kernel vouch for it.

    ``origin_size`` (0: not known) and ``chunk_size`` are the snapshot's. An area is full on the medium
    before the kernel counts the next one, and a chunk that it counts is in the list as soon as the write that
    waits for it may go on. So a list that is shorter than what was counted before is read again, and then
    doubted. Areas and used chunks are compared, not entries: the kernel counts the chunk of an area as used
    before it counts the area.
    """
    before = _ask(store)
    doubt = doubt_about_status(before, chunk_size)
    if doubt:
        return Doubt(doubt)
    settled = max(0, before.metadata // chunk_size - _HEADER_CHUNKS - 1)
    problem = ""
    for attempt in range(_ATTEMPTS):
        if attempt:
            time.sleep(_PAUSE_SECONDS)
        try:
            found = store.scan(origin_size, settled)
        except ValueError as err:
            problem = str(err)
        except OSError as err:
            problem = f"it cannot be read: {err.strerror}"
        else:
            problem = _misfit(found, before, chunk_size)
        if not problem:
            doubt = doubt_about_status(_ask(store), chunk_size)
            return Doubt(doubt) if doubt else found
    return Doubt(f"the exception store of the base snapshot cannot be trusted: {problem}")


def _ask(store: CowStore) -> SnapshotStatus:
    try:
        return store.status()
    except (ValueError, CommandError):
        # Removed, or another target by now.
        return SnapshotStatus("unknown")


def _misfit(found: Exceptions, counted: SnapshotStatus, chunk_size: int) -> str:
    if found.chunk_size != chunk_size:
        return "it has another chunk size than the snapshot"
    if found.allocated < counted.allocated or found.metadata < counted.metadata:
        return "its list is shorter than the kernel's own count"
    return ""


def compare_whole(size: int, reason: str) -> Changes:
    """Answer a doubt: nothing is taken over unread."""
    whole = ExtentList.whole(size)
    return Changes("compare", reason, inherits=False, allocated=whole, changed=whole, discarded=ExtentList())
