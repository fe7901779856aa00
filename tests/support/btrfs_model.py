"""A backup of a btrfs subvolume as plain values, brought up to date by what an engine answers.

It never looks at a snapshot but for the bytes that the engine tells it to read. So if, after any number of
rounds, it is equal to the truth, nothing was missed.
"""

from __future__ import annotations

import stat
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from blocksnap.extents.btrfs_changes import (
    ROOT_DIRECTORY,
    Attributes,
    Entry,
    InodeChange,
    InodeRemoval,
    Link,
    RememberedInode,
    SubvolumeChanges,
)
from blocksnap.extents.model import ExtentList
from support import btrfs_calls as calls
from support import btrfs_reference as reference
from support.btrfs_truth import BLOCK, Difference, Inode, Tree, compare

# linux/btrfs_tree.h, BTRFS_INODE_*, and what lsattr shows of it.
_FLAGS = {
    1 << 1: calls.FLAG_NODATACOW,
    1 << 3: calls.FLAG_NOCOMPRESS,
    1 << 5: calls.FLAG_SYNC,
    1 << 6: calls.FLAG_IMMUTABLE,
    1 << 7: calls.FLAG_APPEND,
    1 << 8: calls.FLAG_NODUMP,
    1 << 9: calls.FLAG_NOATIME,
    1 << 10: calls.FLAG_DIRSYNC,
    1 << 11: calls.FLAG_COMPRESS,
    1 << 32: calls.FLAG_VERITY,
}


@dataclass(slots=True)
class Record:
    """What a backup has of one inode."""

    generation: int
    attributes: Attributes
    links: frozenset[Link]
    xattrs: Mapping[bytes, bytes]
    content: bytes
    entries: dict[int, Entry]
    target: bytes
    state: bytes


@dataclass(slots=True)
class Tally:
    """What a number of rounds came to, in blocks of 4 KiB."""

    rounds: int = 0
    changed: int = 0
    """Blocks that really differ."""
    reported: int = 0
    missed: int = 0
    touched: int = 0
    """Inodes in the answers."""

    @property
    def excess(self) -> int:
        """Blocks that were reported and do not differ."""
        return self.reported - self.changed + self.missed

    def add(self, other: Tally) -> None:
        """Add the numbers of another."""
        for name in ("rounds", "changed", "reported", "missed", "touched"):
            setattr(self, name, getattr(self, name) + getattr(other, name))


@dataclass(slots=True)
class Backup:
    """The records of the last backup, and the tree it was taken of.

    ``from_memory`` tells that answers are made of the states in the records, so that they can be checked
    against the reference; the extents of a kept base may have moved since its state was written.
    """

    records: dict[int, Record] = field(default_factory=dict)
    tree: Tree = field(default_factory=lambda: Tree({}, frozenset()))
    from_memory: bool = False

    def recall(self, numbers: Sequence[int]) -> Mapping[int, RememberedInode]:
        """Return what is remembered, as InodeMemory asks."""
        known = ((number, self.records.get(number)) for number in numbers)
        return {
            number: RememberedInode(
                record.generation, record.attributes.size, record.state or None, record.attributes.ctime
            )
            for number, record in known
            if record is not None
        }

    def update(self, answer: SubvolumeChanges, child: Tree) -> Tally:
        """Apply an answer, reading from ``child`` only what it names, and compare with all of ``child``."""
        truth = compare(self.tree, child) if answer.inherits else compare(Tree({}, frozenset()), child)
        if not answer.inherits:
            self.records.clear()
        tally = Tally(rounds=1)
        order: list[tuple[int, int]] = []
        removals: set[int] = set()
        for change in answer.walk:
            if isinstance(change, InodeRemoval):
                assert change.number not in removals
                removals.add(change.number)
                order.append((1, change.number))
                del self.records[change.number]
            else:
                order.append((0 if change.is_directory else 2, change.number))
                self._apply(change, child)
                _count(tally, change, truth, child)
        assert order == sorted(order) or any(inode in removals for _, inode in order[-1:])
        reused = {number for number in truth.removed if number in child.inodes}
        assert removals == truth.removed - reused
        self.tree = child
        check(self.records, child)
        return tally

    def _apply(self, change: InodeChange, child: Tree) -> None:
        old = None if change.is_new else self.records[change.number]
        assert old is None or old.generation == change.generation
        if self.from_memory:
            _check_against_reference(change, old)
        size = change.attributes.size
        content = b""
        if change.is_file:
            check_extents(change.changed, size)
            check_extents(change.holes, size)
            assert not change.changed.intersect(change.holes)
            patched = bytearray((old.content if old else b"")[:size].ljust(size, b"\0"))
            for offset, length in change.changed.pairs():
                patched[offset : offset + length] = child.inodes[change.number].content[
                    offset : offset + length
                ]
            for offset, length in change.holes.pairs():
                patched[offset : offset + length] = bytes(length)
            content = bytes(patched)
        entries = dict(old.entries) if old else {}
        for entry in change.removed:
            if old:
                assert entries.pop(entry.index) == entry
        for entry in change.added:
            assert entry.index not in entries
            entries[entry.index] = entry
        self.records[change.number] = Record(
            generation=change.generation,
            attributes=change.attributes,
            links=frozenset(change.links),
            xattrs=dict(change.xattrs),
            content=content,
            entries=entries,
            target=change.target,
            state=change.state,
        )


def _check_against_reference(change: InodeChange, old: Record | None) -> None:
    """The answer is what plain Python finds in the two states, block by block.

    Or it is all of the file: states count for nothing once the filesystem has moved data.
    """
    if not change.is_file or not change.state or (old is not None and not old.state):
        return
    present, size = reference.read_extents(change.state), change.attributes.size
    old_size = old.attributes.size if old else 0
    changed, holes = reference.compare(
        reference.read_extents(old.state if old else b""), old_size, present, size
    )
    data, _ = reference.compare([], 0, present, size)
    rest = set(range(-(-min(size, old_size) // BLOCK))) - data
    answer = set(_blocks(change.changed.pairs())), set(_blocks(change.holes.pairs()))
    assert answer in ((changed, holes), (data, rest)), change.number


def _count(tally: Tally, change: InodeChange, truth: Difference, child: Tree) -> None:
    """Add what an answer says of one inode, beside what is true."""
    tally.touched += 1
    if not change.is_file or change.number in truth.added:
        return
    reported = set(_blocks(change.changed.union(change.holes).pairs()))
    known = truth.changed.get(change.number)
    real = set(_blocks(known.ranges)) if known else set()
    tally.changed += len(real)
    tally.reported += len(reported)
    tally.missed += len(real - reported)
    assert child.inodes[change.number].size == change.attributes.size


def _blocks(ranges: Iterable[tuple[int, int]]) -> Iterator[int]:
    for offset, length in ranges:
        yield from range(offset // BLOCK, -(-(offset + length) // BLOCK))


def check_extents(extents: ExtentList, size: int) -> None:
    """Extents are sorted, merged, not empty and within the file."""
    last = -1
    for offset, length in extents.pairs():
        assert offset > last
        assert length > 0
        last = offset + length
    assert last <= size


def check(records: Mapping[int, Record], child: Tree) -> None:
    """Compare records with the truth, byte for byte and attribute for attribute."""
    assert records.keys() == child.inodes.keys()
    names, stubs = _paths(records)
    assert stubs == child.stubs
    for number, inode in child.inodes.items():
        _check_inode(records[number], inode)
        assert names[number] == set(inode.names), (number, inode.names)
    links: dict[int, set[Link]] = {}
    for number, record in records.items():
        for entry in record.entries.values():
            if entry.kind != "subvolume":
                links.setdefault(entry.inode, set()).add(Link(number, entry.name))
    for number, record in records.items():
        # The top directory's own link leads to itself.
        assert number == ROOT_DIRECTORY or record.links == links[number], (number, record.links)


def _check_inode(record: Record, inode: Inode) -> None:
    attributes = record.attributes
    assert record.content == inode.content, (inode.number, inode.names)
    found = (
        attributes.mode, attributes.uid, attributes.gid, attributes.rdev, attributes.nlink,
        attributes.atime, attributes.mtime, attributes.ctime,
    )  # fmt: skip
    wanted = (
        inode.mode, inode.uid, inode.gid, inode.rdev, inode.links, inode.atime, inode.mtime, inode.ctime
    )  # fmt: skip
    assert found == wanted, (inode.number, inode.names)
    assert record.target == inode.target.encode(errors="surrogateescape")
    assert {name.decode(): value for name, value in record.xattrs.items()} == dict(inode.xattrs)
    if not stat.S_ISDIR(inode.mode):
        assert attributes.size == inode.size
    if inode.generation is not None:
        assert record.generation & 0xFFFFFFFF == inode.generation
    if inode.flags is not None:
        # An item can say both that a file is to be compressed and that it cannot; its property, applied when
        # the kernel reads the inode, has the last word.
        both = calls.FLAG_COMPRESS | calls.FLAG_NOCOMPRESS
        decided = both if b"btrfs.compression" in record.xattrs else 0
        assert _shown(attributes.flags) & ~decided == inode.flags & ~decided, (inode.number, inode.names)


def _shown(flags: int) -> int:
    return sum(shown for bit, shown in _FLAGS.items() if flags & bit)


def _paths(records: Mapping[int, Record]) -> tuple[dict[int, set[str]], set[str]]:
    """Return the paths of every inode, found from the top, and those of nested subvolumes."""
    found: dict[int, set[str]] = {ROOT_DIRECTORY: {""}}
    stubs: set[str] = set()
    pending = [(ROOT_DIRECTORY, "")]
    while pending:
        number, path = pending.pop()
        for entry in records[number].entries.values():
            name = entry.name.decode(errors="surrogateescape")
            below = f"{path}/{name}" if path else name
            if entry.kind == "subvolume":
                stubs.add(below)
                continue
            found.setdefault(entry.inode, set()).add(below)
            if entry.kind == "directory":
                pending.append((entry.inode, below))
    return found, stubs
