"""Whether the snapshots of several subvolumes are of one instant, which the kernel does not promise.

They are when nothing was written to the earlier ones until the last was taken. What was written shows in the
generation of a subvolume, but late: btrfs does so with its inodes when the data is on the disk, so what is
dirty has to be written out first (docs/design.md, section 4.8).
"""

from __future__ import annotations

from collections.abc import Sequence

from blocksnap.volumes.base import Snapshot, TreeSnapshot, Volume, is_tree

Taken = tuple[Volume, Snapshot]


def find_torn(taken: Sequence[Taken]) -> tuple[str, ...]:
    """Return the names of volumes that were written to between their own and the last snapshot.

    The last of their filesystem, that is. ``taken`` is in the order in which they were taken. Call it right
    after the last, before anybody goes on who stood still: what is written until it has looked counts too.
    Raises BlocksnapError.
    """
    by_filesystem: dict[object, list[tuple[Volume, TreeSnapshot]]] = {}
    for volume, snapshot in taken:
        if is_tree(snapshot):
            by_filesystem.setdefault(snapshot.binding.get("filesystem"), []).append((volume, snapshot))
    torn: list[str] = []
    for *earlier, (_, last) in by_filesystem.values():
        if earlier and all(snapshot.source_is_as_it_was() for _, snapshot in earlier):
            last.flush_source()
        torn += [volume.name for volume, snapshot in earlier if not snapshot.source_is_as_it_was()]
    return tuple(sorted(torn))
