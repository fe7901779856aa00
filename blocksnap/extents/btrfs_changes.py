"""What changed in a btrfs subvolume, inode by inode: the answer that every btrfs engine gives.

A backup of a subvolume is a map from inode number to inode record, so the answer is a stream of inodes,
each with all that its new record needs: attributes, names, extended attributes, and which bytes to read.
It is made while it is walked, so that memory is bounded by one batch of inodes and not by their number. A
set of bytes may always be too wide, never too narrow; the set of inodes too.
"""

from __future__ import annotations

import stat
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Literal, Protocol

from blocksnap.extents.changes import Method
from blocksnap.extents.model import ExtentList

EntryKind = Literal[
    "unknown", "file", "directory", "character", "block", "fifo", "socket", "symlink", "subvolume"
]
ROOT_DIRECTORY: Final = 256
"""Inode number of the top directory of every subvolume."""


@dataclass(frozen=True, slots=True)
class Attributes:
    """The fields of an INODE_ITEM that a restore sets; times are nanoseconds since the epoch.

    ``flags`` are btrfs's own inode flags (btrfs_tree.h, BTRFS_INODE_NODATACOW and so on); ``size`` is i_size
    in bytes, which for a directory counts its names; ``rdev`` is a device number as ``os.makedev`` makes it.
    """

    mode: int
    uid: int
    gid: int
    nlink: int
    rdev: int
    flags: int
    size: int
    atime: int
    mtime: int
    ctime: int
    otime: int


@dataclass(frozen=True, slots=True)
class Entry:
    """A name in a directory.

    ``index`` is its place in the directory (DIR_INDEX). For a nested subvolume ``inode`` is the id of its
    tree; a snapshot holds an empty directory in its place.
    """

    name: bytes
    inode: int
    kind: EntryKind
    index: int


@dataclass(frozen=True, slots=True)
class Link:
    """One of the names of an inode: hard links have several."""

    parent: int
    name: bytes


@dataclass(frozen=True, slots=True)
class InodeChange:
    """An inode of the later snapshot that may differ from the one of this number in the parent.

    All but the two extent lists and the two lists of entries is the present state, complete, so a record is
    replaced and not patched. ``is_new`` tells that the parent has no such inode, or another one under this
    number (``generation`` tells them apart): then nothing of the parent's is kept.

    For regular files ``changed`` are the bytes that hold data and may differ from the parent's, and ``holes``
    those that read as zeros now and held data in the parent; both are within ``[0, size)``, and what is in
    neither is as it was, or zeros where the parent's file had ended. For directories ``added`` and
    ``removed`` are names; one that leads to another inode now is in both.

    ``state`` is what to remember until the next backup: of a regular file where its extents are, of a
    directory its listing (docs/design.md, section 4); empty when the engine was not asked for it.
    """

    number: int
    generation: int
    is_new: bool
    attributes: Attributes
    links: tuple[Link, ...]
    xattrs: tuple[tuple[bytes, bytes], ...]
    changed: ExtentList = ExtentList()  # noqa: RUF009 - immutable
    holes: ExtentList = ExtentList()  # noqa: RUF009 - immutable
    added: tuple[Entry, ...] = ()
    removed: tuple[Entry, ...] = ()
    target: bytes = b""
    """Of a symbolic link."""
    state: bytes = b""

    @property
    def is_file(self) -> bool:
        """Whether it is a regular file."""
        return stat.S_ISREG(self.attributes.mode)

    @property
    def is_directory(self) -> bool:
        """Whether it is a directory."""
        return stat.S_ISDIR(self.attributes.mode)


@dataclass(frozen=True, slots=True)
class InodeRemoval:
    """An inode of the parent that the later snapshot does not have.

    When another one has its number now, that is an ``InodeChange`` with ``is_new``, and there is no removal.
    """

    number: int


Change = InodeChange | InodeRemoval


@dataclass(frozen=True, slots=True)
class Witness:
    """An inode of a snapshot that tells the next backup whether it is of the same history.

    ``transaction`` (transid) and ``changed_at`` (ctime in nanoseconds) are those of its last change,
    ``directory`` is the number of one in which it has a name.
    """

    inode: int
    generation: int
    transaction: int
    changed_at: int
    directory: int


@dataclass(frozen=True, slots=True)
class SubvolumeChanges:
    """The answer of an engine for one snapshot.

    ``walk`` is walked once: directories come first, then removals, then all other inodes, each of the three
    in ascending order of numbers. (Removals come last of what was in a directory whose number something else
    has now, which is then told as new and with the names that it lost.) It raises VolumeError when the
    kernel's answers make no sense. When ``inherits`` is False nothing of the parent may be taken over: every
    inode of the snapshot comes, as new.
    """

    method: Method
    reason: str
    inherits: bool
    walk: Iterator[Change]
    witnesses: Sequence[Witness] = ()
    """Inodes that tell the next backup of the history of this snapshot."""


@dataclass(frozen=True, slots=True)
class RememberedInode:
    """What the parent backup knows of an inode; ``state`` is None when it has none that can be used.

    A regular file without a state is read again whole if it was touched. A directory always has one.
    """

    generation: int
    size: int
    state: bytes | None
    changed_at: int | None = None
    """Its ctime in nanoseconds, where that is known."""


class InodeMemory(Protocol):
    """The inode records of the parent backup."""

    def recall(self, numbers: Sequence[int]) -> Mapping[int, RememberedInode]:
        """Return what is known of some inodes; those that the parent did not have are left out."""
        ...
