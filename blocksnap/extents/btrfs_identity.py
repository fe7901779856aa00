"""What tells one btrfs snapshot and its history from all others, and what may be inherited from a parent.

Both ways rest on one subvolume having gone on from the parent's snapshot to the present one: both name the
same source, and the later one has the later transaction. A rollback that puts a snapshot in the place of
the source gives it another UUID; a filesystem that was restored from an older image goes on counting, so a
host that has no record of the parent backup trusts nothing. Where the disks alone were rolled back, under a
host that was not, the subvolume itself does not remember that the parent's snapshot was taken of it.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

from blocksnap.extents.changes import Binding, JsonValue, read_fields
from blocksnap.system.btrfs import FilesystemInfo, SubvolumeInfo


@dataclass(frozen=True, slots=True)
class BtrfsIdentity:
    """A snapshot: UUIDs of filesystem, source and snapshot as 32 digits, and its transaction (otransid)."""

    filesystem: str
    source: str
    snapshot: str
    transaction: int

    @classmethod
    def of(cls, filesystem: FilesystemInfo, snapshot: SubvolumeInfo) -> BtrfsIdentity:
        """Return the identity of a snapshot as it is found."""
        return cls(
            filesystem=filesystem.uuid.hex,
            source=snapshot.parent_uuid.hex,
            snapshot=snapshot.uuid.hex,
            transaction=snapshot.snapshot_transaction,
        )

    def to_binding(self) -> dict[str, JsonValue]:
        """Return the form that is stored in the manifest."""
        return {"source_kind": "btrfs", **asdict(self)}

    @classmethod
    def from_binding(cls, binding: Binding) -> BtrfsIdentity | None:
        """Return the identity in a manifest; None when it is not one, or not whole."""
        values = read_fields(cls, binding)
        return cls(**values) if values and binding.get("source_kind") == "btrfs" else None


@dataclass(frozen=True, slots=True)
class Inherit:
    """Inodes last changed before transaction ``since`` are those of the parent."""

    since: int
    reason: str


@dataclass(frozen=True, slots=True)
class Compare:
    """Nothing of the parent may be taken over unread."""

    reason: str


_NOBODY = "0" * 32


def decide(
    current: BtrfsIdentity, parent: Binding, *, known_here: bool, last_snapshot: int | None = None
) -> Inherit | Compare:
    """Decide whether what was remembered of the parent's snapshot tells what changed since.

    ``known_here`` tells that this host wrote the parent's run down when it was committed, ``last_snapshot``
    is the transaction of the last snapshot of the subvolume before this one, where that was looked at.
    """
    known = BtrfsIdentity.from_binding(parent)
    if known is None:
        return Compare("the parent backup does not say what btrfs snapshot it was taken of")
    doubt = _doubt(current, known)
    if doubt is None and current.transaction == known.transaction:
        doubt = "the snapshot is not younger than that of the parent backup"
    if doubt is None and last_snapshot is not None and last_snapshot < known.transaction:
        doubt = "the subvolume knows nothing of the parent's snapshot: the filesystem was rolled back"
    if doubt is None and not known_here:
        doubt = "this host has no record of the parent backup: its state was lost, rolled back or cloned"
    if doubt:
        return Compare(doubt)
    return Inherit(known.transaction, f"same subvolume and history since transaction {known.transaction}")


def decide_base(current: BtrfsIdentity, base: BtrfsIdentity) -> Inherit | Compare:
    """Decide whether two snapshots that are both there can be compared by what is new in the later one."""
    doubt = _doubt(current, base)
    if doubt:
        return Compare(doubt)
    return Inherit(base.transaction, f"compared with the snapshot of transaction {base.transaction}")


def decide_kept(
    current: BtrfsIdentity, parent: Binding, base: BtrfsIdentity, *, base_is_read_only: bool
) -> Inherit | Compare:
    """Decide the same where the earlier snapshot was left as the base of a parent backup."""
    known = BtrfsIdentity.from_binding(parent)
    if known is None:
        return Compare("the parent backup does not say what btrfs snapshot it was taken of")
    if known != base:
        return Compare("the base snapshot is not that of the parent backup")
    if not base_is_read_only:
        return Compare("the base snapshot was made writable")
    return decide_base(current, base)


def _doubt(current: BtrfsIdentity, known: BtrfsIdentity) -> str | None:
    doubts = (
        (current.filesystem != known.filesystem, "the snapshots are on different filesystems"),
        (_NOBODY in (current.source, known.source), "a subvolume that is no snapshot has no history"),
        (current.source != known.source, "the snapshots were not taken of the same subvolume"),
        (current.transaction < known.transaction, "the snapshot is older than the one it is compared with"),
    )
    return next((reason for found, reason in doubts if found), None)
