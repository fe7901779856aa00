"""What tells one thin volume and its history from all others, and what may be inherited from a parent.

Two ways lead from a parent backup to what changed since. By **times** (``decide``) nothing is kept on
the pool, so everything hangs on the history being one: the same device of the same pool, whose counters never
ran backwards. By **tree** (``decide_base``) the parent's snapshot is still there and is compared with the new
one, so that only it has to be proven to be what was backed up: a snapshot that was written, discarded or
merged since has another root, because the first change to it must copy its root block.

For times:

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

from dataclasses import asdict, dataclass

from blocksnap.extents.changes import Binding, JsonValue, read_fields
from blocksnap.extents.thin_metadata import DeviceFacts

TIME_LIMIT = 1 << 24
"""A mapping has 24 bits for the time; the superblock has 32.

The kernel does not check it (dm-thin-metadata.c, pack_block_time): beyond that it ors the time's upper bits
into the block number of every mapping it makes, so that chunks read, and are written, where others lie.
"""
_COUNTED_OUT = "the pool has taken more snapshots than the times in its mappings can count"


@dataclass(frozen=True, slots=True)
class ThinIdentity:
    """What tells one snapshot of one thin volume, and the history it belongs to, from all others.

    ``devices`` are those of the pool, as ``id@transaction`` of their making. The
    snapshot's UUID, root, transaction and mapped chunks prove it untouched when it is kept as a base.
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
    snapshot_uuid: str
    snapshot_root: int
    snapshot_transaction: int
    snapshot_mapped: int
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
        values = read_fields(cls, binding)
        return cls(**values) if values and binding.get("source") == "lvm-thin" else None


@dataclass(frozen=True, slots=True)
class BaseSnapshot:
    """A snapshot that an earlier run left on the pool, as it is found now."""

    lv_uuid: str
    thin_id: int
    facts: DeviceFacts


@dataclass(frozen=True, slots=True)
class LostBase:
    """The parent's run left a base, which is not there any more, and why."""

    reason: str


@dataclass(frozen=True, slots=True)
class Inherit:
    """Chunks mapped before pool time ``since`` are those of the parent."""

    since: int
    reason: str


@dataclass(frozen=True, slots=True)
class Compare:
    """Nothing of the parent may be taken over unread."""

    reason: str


@dataclass(frozen=True, slots=True)
class Walk:
    """What changed since the parent is what differs between the trees of the base and of the snapshot."""

    base: BaseSnapshot
    reason: str


def decide_base(
    current: ThinIdentity, parent: Binding, base: BaseSnapshot, *, known_here: bool
) -> Walk | Compare:
    """Decide whether the base snapshot is what the parent backup was taken of, untouched since."""
    known = ThinIdentity.from_binding(parent)
    if known is None:
        return Compare("the parent backup does not say what thin volume it was taken of")
    doubt = _doubt_about_base(current, known, base)
    if doubt is None and not known_here:
        doubt = "this host has no record of the parent backup: its state was lost, rolled back or cloned"
    if doubt:
        return Compare(doubt)
    return Walk(base, "the parent's snapshot was kept as base and nobody has touched it")


def _doubt_about_base(current: ThinIdentity, known: ThinIdentity, base: BaseSnapshot) -> str | None:
    doubts = (
        (
            (current.vg_uuid, current.lv_uuid, current.pool_uuid)
            != (known.vg_uuid, known.lv_uuid, known.pool_uuid),
            "this is another logical volume or pool than at the parent backup",
        ),
        (
            (current.metadata_uuid, current.metadata_place) != (known.metadata_uuid, known.metadata_place),
            "the pool's metadata was moved or replaced since the parent backup, as a repair does",
        ),
        (current.chunk_size != known.chunk_size, "the pool has another chunk size than at the parent backup"),
        # The same block does not mean the same content any more.
        (max(current.pool_time, known.pool_time) >= TIME_LIMIT, _COUNTED_OUT),
        (
            current.pool_transaction < known.pool_transaction or current.pool_time < known.pool_time,
            "the pool's counters went backwards since the parent backup",
        ),
        (
            (base.lv_uuid, base.thin_id) != (known.snapshot_uuid, known.snapshot_id),
            "the base snapshot is not that of the parent backup",
        ),
        (
            (base.facts.transaction, base.facts.created) != (known.snapshot_transaction, known.snapshot_time),
            "the pool made the base snapshot's device anew since the parent backup",
        ),
        (
            (base.facts.device_root, base.facts.mapped_chunks)
            != (known.snapshot_root, known.snapshot_mapped),
            "the base snapshot was changed since the parent backup",
        ),
    )
    return next((reason for found, reason in doubts if found), None)


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
            max(current.pool_time, known.pool_time, current.snapshot_time) >= TIME_LIMIT,
            _COUNTED_OUT,
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
