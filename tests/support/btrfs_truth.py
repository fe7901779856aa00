"""What is in a snapshot, and what differs between two: found by reading everything.

``capture`` walks a snapshot and keeps all of it in memory; the comparison is then made on what was kept, so
that a snapshot which is a child in one round and the parent in the next is read once. Meant for trees of some
hundred files and some MiB.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path

from support import btrfs_calls as calls

BLOCK = 4096
SUBVOLUME_ROOT = 256
STUB = 2
"""The inode number of a subvolume in the snapshot of the one that holds it."""

_OPENED = (stat.S_IFREG, stat.S_IFDIR)


@dataclass(frozen=True, slots=True)
class Inode:
    """Everything about one inode that a backup keeps, and what tells it from an earlier one.

    ``generation`` and ``flags`` are None for what cannot be opened without harm (devices, symlinks ...).
    """

    number: int
    generation: int | None
    mode: int
    uid: int
    gid: int
    rdev: int
    size: int
    links: int
    atime: int
    mtime: int
    ctime: int
    flags: int | None
    target: str
    xattrs: Mapping[str, bytes]
    names: frozenset[str]
    """Paths below the snapshot, without a leading slash; that of the root is empty."""
    content: bytes

    @property
    def kind(self) -> int:
        """The type bits of the mode."""
        return stat.S_IFMT(self.mode)

    @property
    def is_file(self) -> bool:
        """Whether it holds data."""
        return stat.S_ISREG(self.mode)


@dataclass(frozen=True, slots=True)
class Tree:
    """A snapshot: its inodes by number, and its stubs of subvolumes by path."""

    inodes: Mapping[int, Inode]
    stubs: frozenset[str]

    @property
    def names(self) -> dict[str, int]:
        """Inode numbers by path."""
        return {name: inode.number for inode in self.inodes.values() for name in inode.names}


@dataclass(frozen=True, slots=True)
class InodeChange:
    """How an inode that is in both snapshots differs.

    ``ranges`` are the (offset, length) of whole blocks, cut at the child's size, in which the child has other
    bytes than the parent; beyond the parent's end it is compared with zeros. So to resize the parent's file
    and to write these gives the child's. ``what`` are names of fields of Inode.
    """

    ranges: list[tuple[int, int]]
    what: frozenset[str]


@dataclass(frozen=True, slots=True)
class Difference:
    """What differs between two snapshots, by inode number. Inodes that do not differ are in none."""

    added: frozenset[int]
    removed: frozenset[int]
    changed: Mapping[int, InodeChange]


def capture(snapshot: Path | str) -> Tree:
    """Read a snapshot, all of it."""
    found: dict[int, Inode] = {}
    names: dict[int, list[str]] = {}
    stubs = set()
    for path, status in _walk(os.fspath(snapshot), ""):
        if status.st_ino == STUB:
            stubs.add(path)
            continue
        if status.st_ino not in found:
            found[status.st_ino] = _read(os.path.join(snapshot, path), status)
        names.setdefault(status.st_ino, []).append(path)
    return Tree({n: replace(i, names=frozenset(names[n])) for n, i in found.items()}, frozenset(stubs))


def _walk(root: str, path: str) -> Iterator[tuple[str, os.stat_result]]:
    if not path:
        yield "", os.lstat(root)
    with os.scandir(os.path.join(root, path)) as entries:
        for entry in entries:
            name = f"{path}/{entry.name}" if path else entry.name
            status = entry.stat(follow_symlinks=False)
            yield name, status
            if stat.S_ISDIR(status.st_mode) and status.st_ino != STUB:
                yield from _walk(root, name)


def _read(path: str, status: os.stat_result) -> Inode:
    kind = stat.S_IFMT(status.st_mode)
    generation = flags = None
    content = b""
    if kind in _OPENED:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            generation, flags = calls.inode_generation(fd), calls.inode_flags(fd)
            if kind == stat.S_IFREG:
                content = _read_all(fd, status.st_size)
        finally:
            os.close(fd)
    listed = sorted(os.listxattr(path, follow_symlinks=False))
    return Inode(
        number=status.st_ino,
        generation=generation,
        mode=status.st_mode,
        uid=status.st_uid,
        gid=status.st_gid,
        rdev=status.st_rdev,
        # The size of a directory follows from its names.
        size=0 if kind == stat.S_IFDIR else status.st_size,
        links=status.st_nlink,
        atime=status.st_atime_ns,
        mtime=status.st_mtime_ns,
        ctime=status.st_ctime_ns,
        flags=flags,
        target=os.readlink(path) if kind == stat.S_IFLNK else "",
        xattrs={name: os.getxattr(path, name, follow_symlinks=False) for name in listed},
        names=frozenset(),
        content=content,
    )


def _read_all(fd: int, size: int) -> bytes:
    parts = []
    while size:
        part = os.read(fd, size)
        assert part, "a file of a snapshot is shorter than it says"
        parts.append(part)
        size -= len(part)
    return b"".join(parts)


def differing_ranges(parent: bytes, child: bytes) -> list[tuple[int, int]]:
    """Return the (offset, length) of blocks in which ``child`` has other bytes; see InodeChange.ranges."""
    if len(parent) > len(child):
        parent = parent[: len(child)]
    if parent == child:
        return []
    parent = parent.ljust(len(child), b"\0")
    one, other = memoryview(parent), memoryview(child)
    ranges: list[tuple[int, int]] = []
    for begin in range(0, len(child), BLOCK):
        end = min(begin + BLOCK, len(child))
        if one[begin:end] == other[begin:end]:
            continue
        if ranges and sum(ranges[-1]) == begin:
            ranges[-1] = (ranges[-1][0], end - ranges[-1][0])
        else:
            ranges.append((begin, end - begin))
    return ranges


_COMPARED = [field.name for field in fields(Inode) if field.name not in ("number", "content")]


def same_inode(parent: Inode, child: Inode) -> bool:
    """Whether two of the same number are one inode, and not another that got the number anew.

    Of what has no generation the type is compared; a number is used anew only after a mount.
    """
    return parent.generation == child.generation and parent.kind == child.kind


def compare(parent: Tree, child: Tree) -> Difference:
    """Return what differs. An inode number used anew is both removed and added."""
    both = parent.inodes.keys() & child.inodes.keys()
    reused = {n for n in both if not same_inode(parent.inodes[n], child.inodes[n])}
    changed = {}
    for number in both - reused:
        before, after = parent.inodes[number], child.inodes[number]
        what = frozenset(name for name in _COMPARED if getattr(before, name) != getattr(after, name))
        ranges = differing_ranges(before.content, after.content)
        if what or ranges:
            changed[number] = InodeChange(ranges, what)
    return Difference(
        added=frozenset(child.inodes.keys() - both | reused),
        removed=frozenset(parent.inodes.keys() - both | reused),
        changed=changed,
    )
