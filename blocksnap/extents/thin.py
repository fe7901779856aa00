"""What changed on an LVM thin volume, told by the times in the pool's mapping tree.

The pool counts snapshots: its time. A snapshot gets the time that its creation makes, T, and from
then on the kernel writes nothing in place that was mapped before T: the first write to such a chunk
maps it anew, with a time of T or later, whether or not the snapshot still exists. So with nothing
kept on the pool, everything that changed since a snapshot of time T is what is mapped with a time
>= T, plus what was mapped then and is not mapped any more (discards leave no trace but that).

This holds within one history of one device of one pool. ``decide`` compares everything that
could tell of another history, and answers with a full compare whenever in doubt:

* The device: UUIDs of group, volume, pool and pool metadata; the thin id, which a merge changes
  and a removal frees for reuse; the transaction and time at which the pool made the device.
* The history: pool time and transaction count must not have run backwards, and the new snapshot must
  be younger than the parent's. Counters alone are no proof: when the disk under the pool is rolled
  back (a hypervisor's or an array's snapshot) or cloned, they go on and soon look right again. So
  each run is written down in the host's own history before it commits (controller.history); a host
  that does not know the parent's run was rolled back or cloned with its disks, or is another one.
  Where only the disks were rolled back, a device of the pool that is older than the parent but
  unknown to it gives that away.
* The metadata: ``lvconvert --repair`` puts a copy, which may lack the newest mappings, under the same
  name, UUID and creation time, but in another place on the disks.
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, fields

from blocksnap.errors import VolumeError
from blocksnap.extents.changes import Binding, Changes, JsonValue, MappedSet, Parent
from blocksnap.extents.model import ExtentList

_TIME_LIMIT = 1 << 24
"""A mapping has 24 bits for the time; the superblock has 32."""
_ATTEMPTS = 5
_PAUSE_SECONDS = 0.2
_NEEDS_CHECK = 1


@dataclass(frozen=True, slots=True)
class ThinIdentity:
    """What tells one snapshot of one thin volume, and the history it belongs to, from all others.

    ``devices`` are those of the pool, as ``id@transaction`` of their making, without our snapshots.
    """

    vg_uuid: str
    lv_uuid: str
    pool_uuid: str
    metadata_uuid: str
    metadata_place: str
    thin_id: int
    origin_transaction: int
    origin_time: int
    snapshot_id: int
    snapshot_time: int
    pool_time: int
    pool_transaction: int
    chunk_size: int
    devices: str
    run: str

    def to_binding(self) -> dict[str, JsonValue]:
        """Return the form that is stored in the manifest."""
        return {"source": "lvm-thin", **asdict(self)}

    @classmethod
    def from_binding(cls, binding: Binding) -> ThinIdentity | None:
        """Return the identity in a manifest; None when it is not one, or not whole."""
        values = {each.name: binding.get(each.name) for each in fields(cls)}
        for each in fields(cls):
            value = values[each.name]
            # A bool is an int to Python, but not to us.
            if type(value).__name__ != each.type or (isinstance(value, int) and value < 0) or value == "":
                return None
        return cls(**values) if binding.get("source") == "lvm-thin" else None  # type: ignore[arg-type]


@dataclass(frozen=True, slots=True)
class DeviceFacts:
    """What the pool's metadata says about the pool and one thin device."""

    pool_time: int
    pool_transaction: int
    needs_check: bool
    held_root: int
    chunk_size: int
    mapping_root: int
    mapped_chunks: int
    transaction: int
    created: int

    def is_same_tree(self, other: DeviceFacts) -> bool:
        """Whether both saw the same, unmodified mapping tree of the same device."""
        return (self.mapping_root, self.mapped_chunks, self.transaction, self.created) == (
            other.mapping_root,
            other.mapped_chunks,
            other.transaction,
            other.created,
        )


@dataclass(frozen=True, slots=True)
class Inherit:
    """Chunks mapped before pool time ``since`` are those of the parent."""

    since: int
    reason: str


@dataclass(frozen=True, slots=True)
class Compare:
    """Nothing of the parent may be taken over unread."""

    reason: str


def decide(current: ThinIdentity, parent: Binding, *, known_here: bool) -> Inherit | Compare:
    """Decide whether the pool's times can be trusted to tell what changed since the parent.

    ``known_here`` tells that this host wrote the parent's run down when it was committed.
    """
    known = ThinIdentity.from_binding(parent)
    if known is None:
        return Compare("the parent backup does not say what thin volume it was taken of")
    doubt = _doubt_about_device(current, known) or _doubt_about_history(current, known)
    if doubt is None and not known_here:
        doubt = "this host has no record of the parent backup: its state was lost, rolled back or cloned"
    if doubt:
        return Compare(doubt)
    return Inherit(
        since=known.snapshot_time, reason=f"same volume and history since pool time {known.snapshot_time}"
    )


def _doubt_about_device(current: ThinIdentity, known: ThinIdentity) -> str | None:
    doubts = (
        (current.vg_uuid != known.vg_uuid, "the volume is in another volume group than at the parent backup"),
        (current.lv_uuid != known.lv_uuid, "this is another logical volume than at the parent backup"),
        (current.pool_uuid != known.pool_uuid, "the volume is in another pool than at the parent backup"),
        (
            current.metadata_uuid != known.metadata_uuid or current.metadata_place != known.metadata_place,
            "the pool's metadata was moved or replaced since the parent backup, as a repair does",
        ),
        (current.chunk_size != known.chunk_size, "the pool has another chunk size than at the parent backup"),
        (
            current.thin_id != known.thin_id,
            "the volume is another device of its pool than at the parent backup, as after a merge",
        ),
        (
            (current.origin_transaction, current.origin_time)
            != (known.origin_transaction, known.origin_time),
            "the pool made the volume's device anew since the parent backup",
        ),
    )
    return next((reason for found, reason in doubts if found), None)


def _doubt_about_history(current: ThinIdentity, known: ThinIdentity) -> str | None:
    stranger = _device_of_another_history(current, known)
    doubts = (
        (
            max(current.pool_time, known.pool_time, current.snapshot_time) >= _TIME_LIMIT,
            "the pool has taken more snapshots than the times in its mappings can count",
        ),
        (known.snapshot_time > known.pool_time, "the parent backup's pool times contradict each other"),
        (current.pool_time < known.pool_time, "the pool's time went backwards since the parent backup"),
        (
            current.pool_transaction < known.pool_transaction,
            "the pool's transaction count went backwards since the parent backup",
        ),
        (
            current.snapshot_time <= known.snapshot_time,
            "the snapshot is not younger than that of the parent backup: the pool was rolled back",
        ),
        (
            stranger is not None,
            f"device {stranger} of the pool is older than the parent backup, which does not know it",
        ),
    )
    return next((reason for found, reason in doubts if found), None)


def _device_of_another_history(current: ThinIdentity, known: ThinIdentity) -> str | None:
    """Return a device that the pool made before the parent's snapshot, but that was not there then.

    Counters that were rolled back look right again once others have taken snapshots: this finds those.
    """
    for device in sorted(set(current.devices.split()) - set(known.devices.split())):
        _, _, transaction = device.partition("@")
        if not transaction.isdecimal() or int(transaction) < known.pool_transaction:
            return device.partition("@")[0]
    return None


def find_thin_changes(
    fd: int,
    identity: ThinIdentity,
    size: int,
    parent: Parent | None,
    *,
    external_origin: bool,
) -> Changes:
    """Say what of a snapshot to read.

    ``fd`` is the pool's metadata device, opened with O_DIRECT. No metadata snapshot is needed:
    the tree of a snapshot that is never written is never modified, so it is enough that the device is
    the same after the walk. Raises VolumeError when the metadata cannot be read consistently.
    """
    if external_origin:
        # What the volume does not map reads as the bytes of its external origin.
        reason = "the volume has an external origin, whose bytes show where it maps nothing itself"
        whole = ExtentList.whole(size)
        return Changes(
            "compare", reason, inherits=False, allocated=whole, changed=whole, discarded=ExtentList()
        )
    decision: Inherit | Compare = Compare("first backup of this volume")
    if parent:
        decision = decide(identity, parent.binding, known_here=parent.known_here)
    remembered = parent.load_mapped() if parent and isinstance(decision, Inherit) else None
    if isinstance(decision, Inherit) and (remembered is None or not _fits(remembered, identity, parent)):
        decision = Compare("the parent backup does not remember which chunks were mapped")
    since = decision.since if isinstance(decision, Inherit) else 0
    changed, bitmap = _scan(fd, identity, since=since, size=size)
    mapped = MappedSet(identity.chunk_size, bitmap)
    allocated = _extents(mapped, size)
    if parent is None or remembered is None or isinstance(decision, Compare):
        return Changes(
            "compare",
            decision.reason,
            inherits=False,
            allocated=allocated,
            changed=allocated,
            discarded=ExtentList(),
            mapped=mapped,
        )
    return Changes(
        "thin-time",
        decision.reason,
        inherits=True,
        allocated=allocated,
        changed=_with_resized(changed, allocated, unit=mapped.unit, size=size, parent_size=parent.size),
        discarded=_discarded(remembered, mapped, size),
        mapped=mapped,
    )


def read_facts(fd: int, thin_id: int) -> DeviceFacts:
    """Read what a pool's metadata says about one thin device; raises VolumeError."""
    from blocksnap._native import thin_device

    problem = ""
    for attempt in range(_ATTEMPTS):
        if attempt:
            time.sleep(_PAUSE_SECONDS)
        try:
            raw = thin_device(fd, thin_id, 0)
        except KeyError:
            problem = f"there is no device {thin_id}"
        except ValueError as err:
            # Blocks of the two upper trees may be reused while they are read.
            problem = str(err)
        except OSError as err:
            raise VolumeError(f"cannot read the metadata of the thin pool: {err.strerror}") from err
        else:
            return DeviceFacts(
                pool_time=raw[0],
                pool_transaction=raw[1],
                needs_check=bool(raw[2] & _NEEDS_CHECK),
                held_root=raw[3],
                chunk_size=raw[4],
                mapping_root=raw[8],
                mapped_chunks=raw[9],
                transaction=raw[10],
                created=raw[11],
            )
    raise VolumeError(
        f"the metadata of the thin pool makes no sense: {problem}",
        resolution="look at the pool: dmsetup status, and the kernel log",
    )


def _scan(fd: int, identity: ThinIdentity, *, since: int, size: int) -> tuple[ExtentList, bytes]:
    """Walk the snapshot's tree and make sure that nothing moved meanwhile."""
    from blocksnap._native import thin_scan

    nr_chunks = -(-size // identity.chunk_size)
    problem = "it changes all the time"
    for attempt in range(_ATTEMPTS):
        if attempt:
            time.sleep(_PAUSE_SECONDS)
        before = read_facts(fd, identity.snapshot_id)
        if before.created != identity.snapshot_time:
            raise VolumeError("the snapshot was replaced while its changes were read")
        try:
            changed, bitmap, _ = thin_scan(fd, identity.snapshot_id, since, nr_chunks, 0)
        except (KeyError, ValueError) as err:
            problem = str(err)
            continue
        except OSError as err:
            raise VolumeError(f"cannot read the metadata of the thin pool: {err.strerror}") from err
        after = read_facts(fd, identity.snapshot_id)
        if not before.is_same_tree(after):
            continue
        found = int.from_bytes(bitmap, "little").bit_count()
        if found > after.mapped_chunks:
            problem = f"{found} chunks in the tree and {after.mapped_chunks} in the device's details"
            continue
        return ExtentList(changed).clip(size), bitmap
    raise VolumeError(
        f"cannot read the mappings of the snapshot: {problem}",
        resolution="run it again; if it stays so, look at the pool: dmsetup status, and the kernel log",
    )


def _fits(remembered: MappedSet, identity: ThinIdentity, parent: Parent | None) -> bool:
    if parent is None or remembered.unit != identity.chunk_size:
        return False
    nr_chunks = -(-parent.size // remembered.unit)
    return len(remembered.bitmap) >= -(-nr_chunks // 8)


def _extents(mapped: MappedSet, size: int) -> ExtentList:
    from blocksnap._native import bitmap_extents

    return ExtentList(bitmap_extents(mapped.bitmap, mapped.unit)).clip(size)


def _discarded(remembered: MappedSet, mapped: MappedSet, size: int) -> ExtentList:
    from blocksnap._native import bitmap_subtract

    gone = bitmap_subtract(remembered.bitmap, mapped.bitmap)
    # A parent of a larger size remembers chunks that are now beyond the end.
    return _extents(MappedSet(mapped.unit, gone), size)


def _with_resized(
    changed: ExtentList, allocated: ExtentList, *, unit: int, size: int, parent_size: int
) -> ExtentList:
    """Add what a change of size brings in or cuts.

    A pool knows no sizes: a volume that was shrunk and then grown shows its old mappings again, with
    their old times, so all that is mapped from the parent's end on counts as changed, and so does the
    chunk at the end.
    """
    if size == parent_size:
        return changed
    first = min(size - 1, parent_size) // unit * unit if size else 0
    return changed.union(allocated.intersect(ExtentList.of([(first, size - first)])))
