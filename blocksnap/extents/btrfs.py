"""What changed in a btrfs subvolume, told by its own tree: ``btrfs-tree``.

Whatever is done to an inode after a snapshot gives its INODE_ITEM the number of a later transaction, so the
inodes that may differ are found by reading those leaves of the new snapshot that are as young: what is old
is not read at all. Of these inodes all items are compared, with those of the parent's snapshot where it was
kept, and otherwise with what was remembered of them. Neither a removed item nor a removed inode leaves a
trace in the tree; they are told by what the parent had. Why that is enough, and what it rests on, is in
docs/design.md.
"""

from __future__ import annotations

import errno
import stat
from array import array
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import TypeVar

from blocksnap.errors import VolumeError
from blocksnap.extents.btrfs_changes import (
    Change,
    Entry,
    InodeChange,
    InodeMemory,
    InodeRemoval,
    RememberedInode,
    SubvolumeChanges,
    Witness,
)
from blocksnap.extents.btrfs_identity import (
    BtrfsIdentity,
    Compare,
    Inherit,
    decide,
    decide_base,
    decide_kept,
)
from blocksnap.extents.btrfs_records import LISTING, read_listing, read_records, write_memory
from blocksnap.extents.btrfs_witnesses import choose, from_binding, hear, newest, unseen
from blocksnap.extents.changes import Binding
from blocksnap.extents.model import ExtentList
from blocksnap.system.btrfs import (
    InodeStamp,
    commit,
    exclusive_operation,
    filesystem_info,
    inode_directory,
    inode_stamp,
    last_relocation,
    subvolume_info,
)

_Answer = TypeVar("_Answer")
_BATCH = 1024
"""Inodes that are compared, and recalled from memory, at a time."""
_RECORDS = 4 << 20
"""Bytes of records after which a batch is cut: one large file can have that many extents."""
_ATTEMPTS = 5
_NO_BASE = -1
_SECTOR = 4096


@dataclass(frozen=True, slots=True)
class SubvolumeParent:
    """What the parent backup remembers of its snapshot; ``known_here`` as for any volume (Parent)."""

    binding: Binding
    known_here: bool
    memory: InodeMemory


@dataclass(frozen=True, slots=True)
class FileChanges:
    """What changed in one file, and what to remember of it (empty when that could not be told)."""

    size: int
    changed: ExtentList
    holes: ExtentList
    state: bytes


def find_subvolume_changes(
    fd: int,
    parent: SubvolumeParent | None,
    base_fd: int | None = None,
    *,
    remember: bool = True,
    last_snapshot: int | None = None,
) -> SubvolumeChanges:
    """Say what of a read-only snapshot differs from its parent backup.

    ``base_fd`` is a snapshot that an earlier run left as the parent's base, if there is one;
    ``last_snapshot`` what the subvolume said before the snapshot was taken (system.btrfs). With
    ``remember`` the answer has the states that the next run needs where no base is kept. Needs
    CAP_SYS_ADMIN; raises VolumeError when the snapshot is writable or the kernel's answers make no sense.
    """
    trees = _Trees(fd, base_fd)
    if parent is None:
        return _everything(trees, "first backup of this volume", remember=remember)
    doubt = ""
    if base_fd is not None:
        decision = decide_kept(
            trees.identity,
            parent.binding,
            BtrfsIdentity.of(filesystem_info(base_fd), subvolume_info(base_fd)),
            base_is_read_only=subvolume_info(base_fd).read_only,
        )
        if not isinstance(decision, Compare):
            return _compared(trees, None, decision, remember=remember)
        doubt = f"; the base is not used: {decision.reason}"
        trees = _Trees(fd, None)
    by_memory = decide(
        trees.identity, parent.binding, known_here=parent.known_here, last_snapshot=last_snapshot
    )
    if isinstance(by_memory, Compare):
        return _everything(trees, by_memory.reason, remember=remember)
    return _remembered(trees, parent, replace(by_memory, reason=by_memory.reason + doubt), remember=remember)


def compare_snapshots(fd: int, base_fd: int, *, remember: bool = False) -> SubvolumeChanges:
    """Say how a read-only snapshot differs from an earlier one of the same subvolume.

    ``inherits`` is False, and the answer is all that the snapshot has, when they are not such a pair.
    Raises as ``find_subvolume_changes``.
    """
    trees = _Trees(fd, base_fd)
    base = subvolume_info(base_fd)
    decision = decide_base(trees.identity, BtrfsIdentity.of(filesystem_info(base_fd), base))
    if not base.read_only:
        decision = Compare("the earlier snapshot is writable")
    if isinstance(decision, Compare):
        return _everything(_Trees(fd, None), decision.reason, remember=remember)
    return _compared(trees, None, decision, remember=remember)


def compare_files(base_fd: int, base_inode: int, fd: int, inode: int) -> FileChanges:
    """Say how a file differs from an earlier state of itself, both of which nobody writes to.

    They are the same file in two snapshots, or two clones (FICLONE) of one. A clone as the earlier one must
    have been there ever since it was made: while it is, btrfs writes to none of its extents. Each
    descriptor is open on the file or on anything else in its subvolume. FIEMAP has no generations and would
    miss changes.

    Raises VolumeError when an inode is no regular file, data is moved all the while, or the kernel's answers
    make no sense.
    """
    from blocksnap._native import btrfs_diff_file

    trees = _Trees(fd, base_fd, read_only=False)
    commit(fd)
    changed, holes, state, size = trees.in_place(
        lambda: btrfs_diff_file(base_fd, base_inode, fd, inode, trees.sector_size)
    )
    return FileChanges(size, ExtentList(changed), ExtentList(holes), state)


def _everything(trees: _Trees, reason: str, *, remember: bool) -> SubvolumeChanges:
    found = trees.touched(0)
    walk = _Walk(trees, None, found, 0, remember=remember).run()
    witnesses = trees.witnesses(found, ()) if remember else ()
    return SubvolumeChanges("compare", reason, inherits=False, walk=walk, witnesses=witnesses)


def _compared(
    trees: _Trees, memory: InodeMemory | None, decision: Inherit, *, remember: bool
) -> SubvolumeChanges:
    walk = _Walk(trees, memory, trees.touched(decision.since), decision.since, remember=remember).run()
    return SubvolumeChanges("btrfs-tree", decision.reason, inherits=True, walk=walk)


def _remembered(
    trees: _Trees, parent: SubvolumeParent, decision: Inherit, *, remember: bool
) -> SubvolumeChanges:
    """Go by what the parent remembers, unless the snapshot contradicts its history."""
    since = decision.since
    before = from_binding(parent.binding)
    hearing = hear(before, since, trees.stamp)
    contradiction = hearing.contradiction
    found = trees.touched(hearing.look_since(since) if before and not contradiction else since)
    touched, untouched = found.parted(since)
    if before and not contradiction:
        youngest = sorted(newest(untouched.aged()))
        stamps = [(number, trees.stamp(number)) for number in youngest]
        contradiction = unseen(stamps, parent.memory.recall(youngest))
    if contradiction:
        reason = f"the filesystem was rolled back since the parent backup: {contradiction}"
        return _everything(trees, reason, remember=remember)
    walk = _Walk(trees, parent.memory, touched, since, remember=remember).run()
    known = set(untouched.numbers)
    standing = [each for each in hearing.standing if each.inode not in known]
    witnesses = trees.witnesses(found, standing) if remember else ()
    return SubvolumeChanges("btrfs-tree", decision.reason, inherits=True, walk=walk, witnesses=witnesses)


@dataclass(frozen=True, slots=True)
class _Inodes:
    """Inodes of a snapshot, ascending, with the transaction of the last change and the mode of each."""

    numbers: Sequence[int]
    transactions: Sequence[int]
    modes: Sequence[int]

    def aged(self) -> Iterator[tuple[int, int]]:
        """Return the number of each with its transaction."""
        return zip(self.numbers, self.transactions, strict=True)

    def parted(self, since: int) -> tuple[_Inodes, _Inodes]:
        """Part those that may have changed after a snapshot of transaction ``since`` from the others."""
        later, earlier = (tuple(array(code) for code in "QQI") for _ in range(2))
        for inode in zip(self.numbers, self.transactions, self.modes, strict=True):
            is_later = inode[1] > since or (inode[1] == since and stat.S_ISDIR(inode[2]))
            for column, value in zip(later if is_later else earlier, inode, strict=True):
                column.append(value)
        return _Inodes(*later), _Inodes(*earlier)


class _Trees:
    """The present snapshot and, where there is one, the base, read while nobody moves their blocks.

    Balance and dedupe put other extents in place of those of read-only snapshots too. The bytes stay the
    same, and an answer that saw both places is at most too wide (bs_btrfs_adds_up has the one case in which
    it would not be); it is worth a few more attempts.
    """

    def __init__(self, fd: int, base_fd: int | None, *, read_only: bool = True) -> None:
        self.fd = fd
        self.base_fd = base_fd
        filesystem, self._snapshot = filesystem_info(fd), subvolume_info(fd)
        self._filesystem = filesystem.uuid
        self.sector_size = filesystem.sector_size
        self.identity = BtrfsIdentity.of(filesystem, self._snapshot)
        if read_only and not self._snapshot.read_only:
            raise VolumeError(
                "the subvolume is writable, so what is in it changes while it is read",
                resolution="take a read-only snapshot of it: btrfs subvolume snapshot -r",
            )

    def undisturbed(self, read: Callable[[], _Answer]) -> _Answer:
        """Read until nothing was moved meanwhile, or a few times."""
        answer: list[_Answer] = []
        problem = ""
        for _ in range(_ATTEMPTS):
            before = self._marks()
            try:
                answer = [read()]
            except ValueError as err:
                problem = str(err)
                continue
            except OSError as err:
                missing = err.errno == errno.EPERM
                raise VolumeError(
                    f"cannot read the tree of a btrfs subvolume: {err.strerror}",
                    resolution="run it as root, outside of a user namespace" if missing else None,
                ) from err
            if self._marks() == before:
                break
        if not answer:
            raise VolumeError(
                f"the tree of a btrfs subvolume makes no sense: {problem}",
                resolution="run it again; if it stays so, look at the filesystem: btrfs scrub, kernel log",
            )
        return answer[0]

    def in_place(self, read: Callable[[], _Answer]) -> _Answer:
        """Read while no data is moved at all, where an answer that saw two places could be too narrow.

        A place that the one file had and lost would be given to the other meanwhile.
        """
        for _ in range(_ATTEMPTS):
            before = last_relocation(self.fd)
            answer = self.undisturbed(read)
            if last_relocation(self.fd) == before:
                return answer
        raise VolumeError(
            "the filesystem moved data all the while its extents were read",
            resolution="run it again when no balance is running",
        )

    def touched(self, since: int) -> _Inodes:
        """Return the inodes that may have changed since a snapshot of transaction ``since``; 0 for all."""
        from blocksnap._native import btrfs_touched

        numbers, transactions, modes, _ = self.undisturbed(lambda: btrfs_touched(self.fd, since))
        return _Inodes(
            memoryview(numbers).cast("Q"), memoryview(transactions).cast("Q"), memoryview(modes).cast("I")
        )

    def stamp(self, inode: int) -> InodeStamp | None:
        """Return what the snapshot has of an inode."""
        return inode_stamp(self.fd, self._snapshot.tree_id, inode)

    def witnesses(self, found: _Inodes, standing: Sequence[Witness]) -> tuple[Witness, ...]:
        """Choose the witnesses of this snapshot, of what was found and of those of the parent that stand."""
        own = self.identity.transaction
        ages = chain(found.aged(), ((each.inode, each.transaction) for each in standing))
        chosen = []
        for number in choose(ages, own):
            stamp = self.stamp(number)
            directory = inode_directory(self.fd, self._snapshot.tree_id, number)
            # A snapshot that is named in its own source touches a directory there after the copy.
            if stamp is None or directory is None or (stamp.is_directory and stamp.transaction == own):
                continue
            chosen.append(Witness(number, stamp.generation, stamp.transaction, stamp.changed_at, directory))
        return tuple(chosen)

    def moved_since(self, transaction: int) -> bool:
        """Tell whether an extent that is older may have been given a place after a transaction."""
        return last_relocation(self.fd) > transaction

    def require_same(self) -> None:
        """Raise VolumeError when the snapshot was replaced or made writable since it was opened."""
        now = subvolume_info(self.fd)
        if (now.uuid, now.read_only) != (self._snapshot.uuid, self._snapshot.read_only):
            raise VolumeError(
                "the snapshot was made writable while its changes were read",
                resolution="run it again, and find out who else works on the snapshots of this subvolume",
            )

    def _marks(self) -> tuple[int, int, str]:
        base = 0 if self.base_fd is None else subvolume_info(self.base_fd).generation
        return subvolume_info(self.fd).generation, base, exclusive_operation(self._filesystem)


def _without_extents(known: RememberedInode) -> RememberedInode:
    return known if known.state and known.state[0] == LISTING else replace(known, state=None)


class _Walk:
    """One comparison: touched directories, what was removed, everything else."""

    def __init__(
        self, trees: _Trees, memory: InodeMemory | None, found: _Inodes, since: int, *, remember: bool
    ) -> None:
        self._trees = trees
        self._memory = memory
        self._remember = remember
        self._found = found
        self._touched = found.numbers
        self._since = since
        self._moved = False

    def run(self) -> Iterator[Change]:
        directories, others = array("Q"), array("Q")
        for number, mode in zip(self._touched, self._found.modes, strict=True):
            (directories if stat.S_ISDIR(mode) else others).append(number)
        for part in (directories, others):
            gone: dict[int, bool] = {}
            for change in self._compare(part):
                self._note_gone(change.removed, gone)
                yield change
            # Among the others only what has the number of a directory that is gone has lost names.
            yield from self._removals(gone)
        self._trees.require_same()

    def _compare(self, numbers: array[int]) -> Iterator[InodeChange]:
        from blocksnap._native import btrfs_diff

        trees = self._trees
        base_fd = _NO_BASE if trees.base_fd is None else trees.base_fd

        def compare(batch: array[int], known: Mapping[int, RememberedInode]) -> tuple[bytes, int]:
            packed, memory = batch.tobytes(), write_memory(known)
            return trees.undisturbed(
                lambda: btrfs_diff(
                    trees.fd, base_fd, packed, memory, trees.sector_size, self._remember, _RECORDS
                )
            )

        at = 0
        while at < len(numbers):
            batch = numbers[at : at + _BATCH]
            if self._memory is None:
                records, done = compare(batch, {})
            else:
                records, done = self._compare_remembered(batch, self._memory.recall(batch), compare)
            at += done
            yield from read_records(records)

    def _compare_remembered(
        self,
        batch: array[int],
        known: Mapping[int, RememberedInode],
        compare: Callable[[array[int], Mapping[int, RememberedInode]], tuple[bytes, int]],
    ) -> tuple[bytes, int]:
        """Compare with what is remembered of some inodes, of their extents only if no data was moved since.

        An extent that is moved keeps its generation. So a file that was made to share another's extents,
        as old as its own, may find them where its own were, and look as if nothing had happened.
        """
        if not self._moved:
            answer = compare(batch, known)
            self._moved = self._trees.moved_since(self._since)
            if not self._moved:
                return answer
        return compare(batch, {number: _without_extents(inode) for number, inode in known.items()})

    def _note_gone(self, removed: Iterable[Entry], gone: dict[int, bool]) -> None:
        """Add the inodes of removed names that are not in the snapshot under another: those were touched."""
        for entry in removed:
            if entry.kind != "subvolume" and not self._is_touched(entry.inode):
                gone[entry.inode] = entry.kind == "directory"

    def _removals(self, gone: dict[int, bool]) -> Iterator[InodeRemoval]:
        """Return all that is gone: with a directory what was in it, unless it was moved elsewhere before."""
        pending = sorted(number for number, is_directory in gone.items() if is_directory)
        while pending:
            found: dict[int, bool] = {}
            for entry in self._names_before(pending):
                self._note_gone((entry,), found)
            pending = sorted(n for n, is_directory in found.items() if is_directory and n not in gone)
            gone |= found
        yield from map(InodeRemoval, sorted(gone))

    def _names_before(self, directories: Sequence[int]) -> Iterator[Entry]:
        """Return the names that directories had in the parent."""
        from blocksnap._native import btrfs_diff

        trees = self._trees
        for at in range(0, len(directories), _BATCH):
            batch = array("Q", directories[at : at + _BATCH])
            if self._memory is not None:
                for known in self._memory.recall(batch).values():
                    if known.state:
                        yield from read_listing(known.state)
            while trees.base_fd is not None and batch:
                packed = batch.tobytes()
                records, done = trees.undisturbed(
                    lambda packed=packed: btrfs_diff(  # type: ignore[misc]
                        trees.base_fd, _NO_BASE, packed, b"", trees.sector_size, False, _RECORDS
                    )
                )
                batch = batch[done:]
                for record in read_records(records):
                    yield from record.added

    def _is_touched(self, number: int) -> bool:
        at = bisect_left(self._touched, number)
        return at < len(self._touched) and self._touched[at] == number
