"""What changed on an LVM thin volume, told by the pool's mapping trees.

The pool counts snapshots: its time. A snapshot gets the time that its creation makes, T, and from
then on the kernel writes nothing in place that was mapped before T: the first write to such a chunk
maps it anew, with a time of T or later, whether or not the snapshot still exists. So with nothing
kept on the pool, everything that changed since a snapshot of time T is what is mapped with a time
>= T, plus what was mapped then and is not mapped any more (discards leave no trace but that). That is
``thin-time``, and it costs a walk of all mappings.

Where the parent's snapshot was kept as a base, ``thin-tree`` compares the two trees and costs what has
changed. ``thin_identity`` has what either may be trusted for.
"""

from __future__ import annotations

from dataclasses import dataclass

from blocksnap.errors import VolumeError
from blocksnap.extents.changes import Changes, Parent, neighbourhood
from blocksnap.extents.mapped_set import PAGE_BYTES, MappedSet, cut
from blocksnap.extents.model import ExtentList
from blocksnap.extents.thin_identity import (
    BaseSnapshot,
    Compare,
    Inherit,
    LostBase,
    ThinIdentity,
    Walk,
    decide,
    decide_base,
)
from blocksnap.extents.thin_metadata import DisturbedTreeError, NoDeviceInPoolError, ThinMetadata


def find_thin_changes(
    metadata: ThinMetadata,
    identity: ThinIdentity,
    size: int,
    parent: Parent | None,
    base: BaseSnapshot | LostBase | None = None,
    *,
    external_origin: bool,
) -> Changes:
    """Say what of a snapshot to read.

    ``base`` is the snapshot that the parent's run left as a base, or why it is not there; None when it left
    none. Raises VolumeError when the metadata cannot be read consistently.
    """
    if external_origin:
        # What the volume does not map reads as the bytes of its external origin.
        reason = "the volume has an external origin, whose bytes show where it maps nothing itself"
        whole = ExtentList.whole(size)
        return Changes(
            "compare", reason, inherits=False, allocated=whole, changed=whole, discarded=ExtentList()
        )
    if parent is None:
        return _all(metadata, identity, size, "first backup of this volume")
    remembered = _remembered(identity, parent)
    doubt = ""
    if base is not None and remembered is not None:
        found = _by_base(metadata, identity, size, parent, remembered, base)
        if isinstance(found, Changes):
            return found
        doubt = f"; the base is not used: {found.reason}"
    by_time = decide(identity, parent.binding, known_here=parent.known_here)
    if not isinstance(by_time, Inherit):
        return _all(metadata, identity, size, by_time.reason + doubt)
    if remembered is None:
        return _all(metadata, identity, size, "the parent backup does not remember which chunks were mapped")
    return _by_time(metadata, identity, size, parent, remembered, by_time.since, by_time.reason + doubt)


def _by_base(
    metadata: ThinMetadata,
    identity: ThinIdentity,
    size: int,
    parent: Parent,
    remembered: MappedSet,
    base: BaseSnapshot | LostBase,
) -> Changes | Compare:
    """Compare with the base if it is what the parent backup was taken of, before and after the comparison."""
    if isinstance(base, LostBase):
        return Compare(base.reason)
    decision = decide_base(identity, parent.binding, base, known_here=parent.known_here)
    if not isinstance(decision, Walk):
        return decision
    try:
        found = _by_tree(metadata, identity, size, parent, remembered, decision)
        still_there = metadata.facts(base.thin_id).is_same_tree(base.facts)
    except (DisturbedTreeError, NoDeviceInPoolError) as err:
        return Compare(f"the base snapshot could not be compared with: {err.brief}")
    if not still_there:
        return Compare("the base snapshot was changed while it was compared with")
    return found or Compare("the parent backup remembers more mapped chunks than there are")


def _remembered(identity: ThinIdentity, parent: Parent) -> MappedSet | None:
    """Return the parent's set of mapped chunks, if it is whole and of the pool's chunks.

    It is fetched from the repository, so only where something of the parent can be taken over.
    """
    if ThinIdentity.from_binding(parent.binding) is None or not parent.known_here:
        return None
    mapped = parent.load_mapped()
    if mapped is None or mapped.unit != identity.chunk_size:
        return None
    nr_chunks = -(-parent.size // mapped.unit)
    return mapped if mapped.length >= -(-nr_chunks // 8) else None


def _all(metadata: ThinMetadata, identity: ThinIdentity, size: int, reason: str) -> Changes:
    """Return everything that is mapped."""
    found = _scan(metadata, identity, since=0, size=size)
    allocated = found.changed
    return Changes(
        "compare",
        reason,
        inherits=False,
        allocated=allocated,
        changed=allocated,
        discarded=ExtentList(),
        mapped=found.mapped,
    )


def _by_time(
    metadata: ThinMetadata,
    identity: ThinIdentity,
    size: int,
    parent: Parent,
    remembered: MappedSet,
    since: int,
    reason: str,
) -> Changes:
    found = _scan(metadata, identity, since=since, size=size, remembered=remembered)
    changed, discarded = found.changed, found.discarded
    if size != parent.size:
        # A pool knows no sizes: a volume that was shrunk and then grown shows its old mappings again, with
        # their old times. So all that is mapped from the parent's last chunk on counts as changed.
        first = _first_resized(size, parent.size, identity.chunk_size)
        changed = changed.union(_mapped_in(found.mapped, first, size - first, size))
    return Changes(
        "thin-time",
        reason,
        inherits=True,
        allocated=changed.union(_near(found.mapped, discarded, size, parent.size)),
        changed=changed,
        discarded=discarded,
        mapped=found.mapped,
    )


def _by_tree(
    metadata: ThinMetadata,
    identity: ThinIdentity,
    size: int,
    parent: Parent,
    remembered: MappedSet,
    decision: Walk,
) -> Changes | None:
    """Compare the trees; what is mapped follows from the parent's set and the difference.

    None when that set cannot be right.
    """
    unit = identity.chunk_size
    nr_chunks = -(-size // unit)
    changed, discarded = metadata.compare(decision.base.thin_id, identity.snapshot_id, nr_chunks=nr_chunks)
    if size != parent.size:
        # See _by_time; mappings that both trees share are in neither list.
        first = _first_resized(size, parent.size, unit) // unit
        changed = changed.union(metadata.mapped(identity.snapshot_id, first, nr_chunks))
    _require_same(metadata, identity)
    mapped = remembered.updated(nr_chunks, changed, discarded)
    if mapped.mapped_units() > identity.snapshot_mapped:
        return None
    changed, discarded = changed.clip(size), discarded.clip(size)
    return Changes(
        "thin-tree",
        decision.reason,
        inherits=True,
        allocated=changed.union(_near(mapped, discarded, size, parent.size)),
        changed=changed,
        discarded=discarded,
        mapped=mapped,
    )


@dataclass(frozen=True, slots=True)
class _Found:
    """What a walk of all mappings told."""

    changed: ExtentList
    discarded: ExtentList
    mapped: MappedSet


def _scan(
    metadata: ThinMetadata,
    identity: ThinIdentity,
    *,
    since: int,
    size: int,
    remembered: MappedSet | None = None,
) -> _Found:
    """Walk all mappings, window by window, and compare with what is remembered."""
    from blocksnap._native import bitmap_extents, bitmap_subtract

    unit = identity.chunk_size
    nr_chunks = -(-size // unit)
    before = remembered or MappedSet(unit, 0)
    changed = discarded = ExtentList()
    pages: dict[int, bytes] = {}
    for window in metadata.scan(identity.snapshot_id, since=since, nr_chunks=nr_chunks):
        at = window.first_chunk // 8
        gone = bitmap_subtract(before.read(at, len(window.bitmap)), window.bitmap)
        changed = changed.union(window.changed)
        discarded = discarded.union(ExtentList(bitmap_extents(gone, unit, window.first_chunk)))
        windows_pages = cut(window.bitmap, at // PAGE_BYTES)
        pages |= {number: page for number, page in windows_pages if page != before.page(number)}
    _require_same(metadata, identity)
    mapped = MappedSet(unit, -(-nr_chunks // 8), remembered.page if remembered else None, pages)
    # A parent of a larger size remembers chunks that are now beyond the end.
    return _Found(changed.clip(size), discarded.clip(size), mapped)


def _require_same(metadata: ThinMetadata, identity: ThinIdentity) -> None:
    """Raise VolumeError when the snapshot is not the one that was identified."""
    facts = metadata.facts(identity.snapshot_id)
    if (facts.created, facts.transaction, facts.device_root) != (
        identity.snapshot_time,
        identity.snapshot_transaction,
        identity.snapshot_root,
    ):
        raise VolumeError(
            "the snapshot was replaced or written to while its changes were read",
            resolution="run it again, and find out who else works on the snapshots of this volume",
        )


def _first_resized(size: int, parent_size: int, unit: int) -> int:
    """Return where the chunk begins that a change of size cuts or fills up."""
    return min(size - 1, parent_size) // unit * unit if size else 0


def _near(mapped: MappedSet, discarded: ExtentList, size: int, parent_size: int) -> ExtentList:
    """Return what is mapped in the neighbourhood of what was discarded and of the ends."""
    windows = neighbourhood(discarded, size=size, parent_size=parent_size)
    # They are sorted, and do not touch.
    return ExtentList(b"".join(_mapped_in(mapped, *window, size).packed for window in windows.pairs()))


def _mapped_in(mapped: MappedSet, offset: int, length: int, size: int) -> ExtentList:
    return mapped.extents(offset, length).intersect(ExtentList.of([(offset, length)])).clip(size)
