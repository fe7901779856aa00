"""What one engine for btrfs says, held against what the other says about the same two snapshots."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from blocksnap.extents.btrfs_changes import Change, InodeChange
from support.btrfs_truth import BLOCK, Tree


@dataclass(slots=True)
class Coverage:
    """The outcome for one pair of snapshots.

    ``problems`` are inodes, or bytes that really differ, that only the other engine told of. ``common`` are
    the blocks of 4 KiB that both told, ``only_one`` and ``only_other`` those that one of them did; of
    ``only_other`` all have equal bytes when there is no problem.
    """

    problems: list[str] = field(default_factory=list)
    common: int = 0
    only_one: int = 0
    only_other: int = 0


def covers(one: Iterable[Change], other: Iterable[Change], parent: Tree, child: Tree) -> Coverage:
    """Say whether ``one`` (btrfs-tree) leaves out nothing that ``other`` (btrfs-send) reports.

    Of bytes it may leave out those that are equal in both snapshots: the kernel reports an extent as a whole
    when a neighbour's write has cut it into two.
    """
    found = Coverage()
    mine = {change.number: change for change in one}
    for change in other:
        counterpart = mine.pop(change.number, None)
        if type(counterpart) is not type(change):
            found.problems.append(f"inode {change.number}: {_named(change)}, not {_named(counterpart)}")
        elif isinstance(change, InodeChange) and isinstance(counterpart, InodeChange):
            _compare(counterpart, change, parent, child, found)
    for change in mine.values():
        if isinstance(change, InodeChange):
            found.only_one += len(_blocks(change))
    return found


def _named(change: Change | None) -> str:
    return "nothing" if change is None else type(change).__name__


def _compare(one: InodeChange, other: InodeChange, parent: Tree, child: Tree, found: Coverage) -> None:
    if one.is_new != other.is_new:
        found.problems.append(f"inode {one.number}: is_new is {one.is_new} and {other.is_new}")
    mine, theirs = _blocks(one), _blocks(other)
    found.common += len(mine & theirs)
    found.only_one += len(mine - theirs)
    found.only_other += len(theirs - mine)
    if not theirs - mine:
        return
    before = b"" if one.is_new else parent.inodes[one.number].content
    after = child.inodes[one.number].content
    # What an engine does not name is as it was, or zeros where the parent's file had ended.
    before = before[: len(after)].ljust(len(after), b"\0")
    for block in sorted(theirs - mine):
        part = slice(block * BLOCK, (block + 1) * BLOCK)
        if before[part] != after[part]:
            found.problems.append(f"inode {one.number}: block {block} differs, and only one engine says so")


def _blocks(change: InodeChange) -> set[int]:
    """Return the numbers of the blocks that an engine says are not as they were."""
    return {
        block
        for offset, length in change.changed.union(change.holes).pairs()
        for block in range(offset // BLOCK, -(-(offset + length) // BLOCK))
    }
