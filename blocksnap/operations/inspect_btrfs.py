"""Show what differs between two btrfs snapshots: by file, and by inode."""

from __future__ import annotations

import os
import posixpath
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Literal

from blocksnap.errors import UsageError
from blocksnap.extents.btrfs import compare_snapshots
from blocksnap.extents.btrfs_changes import (
    ROOT_DIRECTORY,
    Change,
    Entry,
    InodeChange,
    InodeRemoval,
    SubvolumeChanges,
)
from blocksnap.extents.btrfs_send import compare_by_send
from blocksnap.extents.changes import Method
from blocksnap.operations.inspection import Stopwatch
from blocksnap.system.btrfs import BtrfsError, directory_path, open_subvolume


@dataclass(frozen=True, slots=True)
class SubvolumeInspection:
    """How one snapshot differs from another; ``changes`` are all of them, ``paths`` names of the inodes."""

    engine: Method
    reason: str
    inherits: bool
    seconds: float
    changes: tuple[Change, ...]
    paths: dict[int, bytes]

    def lines(self) -> Iterator[bytes]:
        """Return a line ``begin length path`` for each extent of a file that may differ.

        Control characters and backslashes in a path are escaped as in Python, so that a line stays one.
        """
        for change in self._inodes():
            path = _escaped(self.paths[change.number])
            for offset, length in change.changed.union(change.holes).pairs():
                yield b"%d %d %b" % (offset, length, path)

    def _extents(self) -> Iterator[list[int | str]]:
        for change in self._inodes():
            path = os.fsdecode(self.paths[change.number])
            for offset, length in change.changed.union(change.holes).pairs():
                yield [offset, length, path]

    def document(self) -> dict[str, object]:
        """Return all of it for JSON; paths and names that are not UTF-8 have surrogates."""
        inodes = [self._inode_document(change) for change in self._inodes()]
        return {
            "engine": self.engine,
            "reason": self.reason,
            "inherits": self.inherits,
            "seconds": self.seconds,
            "changed_bytes": sum(change.changed.total for change in self._inodes()),
            "hole_bytes": sum(change.holes.total for change in self._inodes()),
            "count": sum(len(change.changed) for change in self._inodes()),
            "extents": list(self._extents()),
            "inodes": inodes,
            "removed": [change.number for change in self.changes if isinstance(change, InodeRemoval)],
        }

    def _inodes(self) -> Iterator[InodeChange]:
        return (change for change in self.changes if isinstance(change, InodeChange))

    def _inode_document(self, change: InodeChange) -> dict[str, object]:
        attributes = change.attributes
        return {
            "inode": change.number,
            "generation": change.generation,
            "new": change.is_new,
            "path": os.fsdecode(self.paths[change.number]),
            "names": [[link.parent, os.fsdecode(link.name)] for link in change.links],
            **{name: getattr(attributes, name) for name in attributes.__slots__},
            "xattrs": {os.fsdecode(name): value.hex() for name, value in change.xattrs},
            "target": os.fsdecode(change.target),
            "changed": [list(pair) for pair in change.changed.pairs()],
            "holes": [list(pair) for pair in change.holes.pairs()],
            "added": [_entry_document(entry) for entry in change.added],
            "removed": [_entry_document(entry) for entry in change.removed],
        }


Engine = Literal["tree", "send"]
_ENGINES: dict[Engine, Callable[[int, int], SubvolumeChanges]] = {
    "tree": compare_snapshots,
    "send": compare_by_send,
}


def inspect_btrfs_diff(base: str, snapshot: str, engine: Engine = "tree") -> SubvolumeInspection:
    """Compare two read-only snapshots, by their trees (of one subvolume) or by the kernel's send.

    Raises UsageError for a path that is no subvolume or a snapshot that may not be compared, VolumeError
    when the kernel refuses or answers nonsense.
    """
    return inspect_snapshots(base, snapshot, _ENGINES[engine])


def inspect_snapshots(
    base: str, snapshot: str, engine: Callable[[int, int], SubvolumeChanges]
) -> SubvolumeInspection:
    """Compare two snapshots with an engine that gets the descriptors of the later and of the earlier one."""
    with ExitStack() as stack:
        base_fd, fd = (_opened(stack, path) for path in (base, snapshot))
        watch = Stopwatch()
        answer = engine(fd, base_fd)
        changes = tuple(answer.walk)
        seconds = watch.seconds
        paths = dict(_paths(fd, changes))
    return SubvolumeInspection(answer.method, answer.reason, answer.inherits, seconds, changes, paths)


def _opened(stack: ExitStack, path: str) -> int:
    if not os.path.isdir(path):
        raise UsageError(f"there is no directory {path}")
    fd = open_subvolume(path)
    stack.callback(os.close, fd)
    return fd


def _paths(fd: int, changes: Iterable[Change]) -> Iterator[tuple[int, bytes]]:
    """Find a path for each inode: that of the directory in which it has its first name, and the name."""
    folders: dict[int, bytes] = {ROOT_DIRECTORY: b""}
    for change in changes:
        if isinstance(change, InodeRemoval):
            continue
        if change.number == ROOT_DIRECTORY or not change.links:
            yield change.number, b""
            continue
        link = change.links[0]
        if link.parent not in folders:
            folders[link.parent] = _folder(fd, link.parent)
        yield change.number, posixpath.join(folders[link.parent], link.name)


def _folder(fd: int, number: int) -> bytes:
    try:
        return directory_path(fd, number)
    except BtrfsError:
        # Its path is longer than the kernel gives out.
        return b"<inode %d>" % number


def _entry_document(entry: Entry) -> dict[str, object]:
    return {"name": os.fsdecode(entry.name), "inode": entry.inode, "kind": entry.kind}


def _escaped(path: bytes) -> bytes:
    if not any(byte < 32 or byte in b"\\\x7f" for byte in path):
        return path
    return b"".join(
        repr(bytes((byte,)))[2:-1].encode() if byte < 32 or byte in b"\\\x7f" else bytes((byte,))
        for byte in path
    )
