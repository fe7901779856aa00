"""An extent that is moved keeps its generation, so it can be found where one as old was before.

Nothing that is remembered of a file tells the two apart. So once data was moved, what is remembered of the
places of extents counts for nothing.
"""

from __future__ import annotations

import mmap
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from blocksnap.extents.btrfs import SubvolumeParent, find_subvolume_changes
from blocksnap.extents.btrfs_changes import InodeChange, RememberedInode
from blocksnap.extents.btrfs_identity import BtrfsIdentity
from blocksnap.system.btrfs import filesystem_info, last_relocation, subvolume_info
from support import btrfs_calls as calls
from support.btrfs_lab import BtrfsLab, btrfs_lab
from support.btrfs_reference import Extent, read_extents
from support.btrfs_rounds import opened
from support.loops import call

PIECE = 4 << 20
_CHUNK = re.compile(r"CHUNK_ITEM (\d+)\)[^\n]*\n\s*length (\d+) owner \d+ stripe_len \d+ type DATA")


class Known(dict[int, RememberedInode]):
    """What a backup remembers of the inodes of a snapshot (InodeMemory)."""

    def recall(self, numbers: Sequence[int]) -> Mapping[int, RememberedInode]:
        """Return what is known of some of them."""
        return {number: self[number] for number in numbers if number in self}


def inodes_in(snapshot: Path, parent: SubvolumeParent | None = None) -> dict[int, InodeChange]:
    with opened(snapshot) as fd:
        answer = find_subvolume_changes(fd, parent)
        assert answer.inherits == (parent is not None), answer.reason
        return {change.number: change for change in answer.walk if isinstance(change, InodeChange)}


def remember(snapshot: Path) -> SubvolumeParent:
    known = Known(
        (number, RememberedInode(found.generation, found.attributes.size, found.state or None))
        for number, found in inodes_in(snapshot).items()
    )
    with opened(snapshot) as fd:
        binding = BtrfsIdentity.of(filesystem_info(fd), subvolume_info(fd)).to_binding()
    return SubvolumeParent(binding, known_here=True, memory=known)


def extent_of(snapshot: Path, name: str) -> Extent:
    (extent,) = read_extents(inodes_in(snapshot)[(snapshot / name).stat().st_ino].state)
    return extent


def write_piece(path: Path) -> None:
    """Write past the page cache: the place is given now, and no transaction has to end for it."""
    with mmap.mmap(-1, PIECE) as data:
        data[:] = os.urandom(PIECE)
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_DIRECT)
        try:
            assert os.write(fd, data) == PIECE
        finally:
            os.close(fd)


def fill(path: Path) -> None:
    with path.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, PIECE)


def chunk_of(lab: BtrfsLab, address: int) -> range:
    """Return the chunk of data, in the filesystem's own addresses, that has an address."""
    tree = call("btrfs", "inspect-internal", "dump-tree", "-t", "chunk", lab.device)
    chunks = [range(int(at), int(at) + int(length)) for at, length in _CHUNK.findall(tree)]
    return next(chunk for chunk in chunks if address in chunk)


@contextmanager
def two_files_of_one_transaction(folder: Path) -> Iterator[tuple[BtrfsLab, Path]]:
    """Yield a filesystem and the first snapshot: `file` in a full chunk, `other` alone in the last one.

    Whoever flushes all of the machine's filesystems meanwhile ends the transaction: then it is tried again.
    """
    for _ in range(5):
        with btrfs_lab(folder, mount="noatime,commit=300", size=1 << 30, mkfs="-m single -d single") as lab:
            lab.sync()
            write_piece(lab.live / "file")
            fillers = [lab.mount / f"fill-{number}" for number in range(48)]
            for path in fillers:
                fill(path)
            write_piece(lab.live / "other")
            first = lab.snapshot()
            file, other = extent_of(first, "file"), extent_of(first, "other")
            if file.generation != other.generation:
                continue
            chunk = chunk_of(lab, other.address)
            assert file.address not in chunk
            call("mount", "-o", "remount,commit=1", lab.mount)
            for path in fillers:
                if place_of(path) in chunk:
                    path.unlink()
            yield lab, first
            return
    raise AssertionError("a transaction was ended each time")


def place_of(path: Path) -> int:
    """Return where the first extent of a file lies, in the filesystem's own addresses."""
    lines = call("filefrag", "-v", path).splitlines()
    block = next(line.split()[3] for line in lines if line.split()[:1] == ["0:"])
    return int(block.rstrip(".:")) * 4096


def test_an_extent_that_is_moved_to_where_one_as_old_was_is_seen(tmp_path: Path) -> None:
    with two_files_of_one_transaction(tmp_path) as (lab, first):
        parent, before, other = remember(first), extent_of(first, "file"), extent_of(first, "other")
        with (lab.live / "other").open("rb") as source, (lab.live / "file").open("r+b") as target:
            calls.clone(source.fileno(), target.fileno())
        lab.delete(first)
        lab.sync()
        while call("btrfs", "subvolume", "list", "-d", lab.mount):
            lab.sync()
        call("btrfs", "balance", "start", f"-dvrange={other.address}..{other.address + 1}", lab.mount)
        second = lab.snapshot()
        # The trap: not a bit of what is remembered is different now, and all of the bytes are.
        assert extent_of(second, "file") == before
        changed = inodes_in(second, parent)[(second / "file").stat().st_ino].changed
        assert list(changed.pairs()) == [(0, PIECE)]


def test_only_what_moves_data_counts_as_a_move(lab: BtrfsLab) -> None:
    (lab.live / "file").write_bytes(os.urandom(1 << 20))
    lab.sync()
    with opened(lab.live) as fd:
        at_first = last_relocation(fd)
        call("btrfs", "filesystem", "defragment", "-c", lab.live / "file")
        lab.sync()
        assert last_relocation(fd) == at_first
        call("btrfs", "balance", "start", "-d", lab.mount)
        moved = last_relocation(fd)
        assert moved > at_first
    (lab.live / "file").write_bytes(os.urandom(1 << 20))
    lab.cycle()
    with opened(lab.live) as fd:
        assert last_relocation(fd) == moved


def test_files_that_nobody_touched_are_not_read_after_a_balance(lab: BtrfsLab) -> None:
    for name in ("file", "other"):
        (lab.live / name).write_bytes(os.urandom(1 << 20))
    first = lab.snapshot()
    parent = remember(first)
    call("btrfs", "balance", "start", "-d", lab.mount)
    with (lab.live / "file").open("r+b") as file:
        file.write(b"changed")
    second = lab.snapshot()
    found = inodes_in(second, parent)
    assert found[(second / "file").stat().st_ino].changed.total == 1 << 20
    assert (second / "other").stat().st_ino not in found
