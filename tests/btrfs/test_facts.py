"""What btrfs-tree relies on in the kernel, fact by fact: docs/kernel-facts.md lists them."""

from __future__ import annotations

import errno
import fcntl
import os
import struct
from pathlib import Path

import pytest

from blocksnap import _native
from blocksnap.extents.btrfs import find_subvolume_changes
from blocksnap.extents.btrfs_changes import InodeChange
from blocksnap.system.btrfs import subvolume_info
from support import btrfs_calls as calls
from support.btrfs_lab import BtrfsLab
from support.btrfs_reference import Extent, read_extents
from support.btrfs_rounds import opened
from support.loops import call

TREE_SEARCH_V2 = 0xC0709411
INODE_REF = 12
KIB = 1024


def inode_in(snapshot: Path, path: Path) -> InodeChange:
    """Return everything that the tree of a snapshot says of one file."""
    number = path.stat().st_ino
    with opened(snapshot) as fd:
        for change in find_subvolume_changes(fd, None).walk:
            if change.number == number:
                assert isinstance(change, InodeChange)
                return change
    raise AssertionError(f"{path} is not in {snapshot}")


def extents_in(snapshot: Path, path: Path) -> list[Extent]:
    return read_extents(inode_in(snapshot, path).state)


def touched_since(snapshot: Path, transaction: int) -> set[int]:
    with opened(snapshot) as fd:
        return set(memoryview(_native.btrfs_touched(fd, transaction)[0]).cast("Q"))


def transaction_of(snapshot: Path) -> int:
    with opened(snapshot) as fd:
        return subvolume_info(fd).snapshot_transaction


def write_at(path: Path, offset: int, data: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(data)


def test_the_name_of_a_snapshot_in_its_source_has_the_snapshots_own_transaction(lab: BtrfsLab) -> None:
    lab.sync()
    inside = lab.live / "inside"
    calls.snapshot(str(lab.live), str(inside))
    transaction = transaction_of(inside)
    later = lab.snapshot()
    assert 256 in touched_since(later, transaction)
    # So to ask for what is newer misses it.
    assert 256 not in touched_since(later, transaction + 1)


def test_balance_moves_extents_of_read_only_snapshots_and_touches_no_inode(lab: BtrfsLab) -> None:
    file = lab.live / "file"
    file.write_bytes(os.urandom(512 * KIB))
    snapshot = lab.snapshot()
    before = extents_in(snapshot, file)
    touched = touched_since(snapshot, transaction_of(snapshot) + 1)
    with opened(snapshot) as fd:
        generation = subvolume_info(fd).generation
    call("btrfs", "balance", "start", "--force", "--full-balance", lab.mount)
    after = extents_in(snapshot, file)
    assert [e.address for e in before] != [e.address for e in after]
    assert touched_since(snapshot, transaction_of(snapshot) + 1) == touched
    with opened(snapshot) as fd:
        assert subvolume_info(fd).generation > generation


def test_dedupe_replaces_extents_of_read_only_snapshots(lab: BtrfsLab) -> None:
    one, other = lab.live / "one", lab.live / "other"
    for path in (one, other):
        path.write_bytes(b"the same" * 16 * KIB)
    snapshot = lab.snapshot()
    before = extents_in(snapshot, other)
    source, target = (os.open(snapshot / path.name, os.O_RDONLY) for path in (one, other))
    try:
        assert calls.dedupe_range(source, 0, 128 * KIB, target, 0) == 0
    finally:
        os.close(source)
        os.close(target)
    lab.sync()
    assert extents_in(snapshot, other) != before
    assert extents_in(snapshot, other)[0].address == extents_in(snapshot, one)[0].address


@pytest.mark.parametrize("keep", [True, False], ids=["kept", "deleted"])
def test_the_first_write_after_a_snapshot_makes_a_new_extent_even_without_cow(
    lab: BtrfsLab, *, keep: bool
) -> None:
    """That is so whether or not the snapshot still exists; after it, nodatacow writes in place."""
    lab.cycle("noatime,nodatacow")
    file = lab.live / "file"
    file.write_bytes(os.urandom(64 * KIB))
    first = lab.snapshot()
    before = extents_in(first, file)
    if not keep:
        lab.delete(first)
        while call("btrfs", "subvolume", "list", "-d", lab.mount):
            # Wakes up who cleans it away; by himself he comes every half a minute.
            lab.sync()
    write_at(file, 16 * KIB, os.urandom(4 * KIB))
    lab.sync()
    second = lab.snapshot("second")
    after = extents_in(second, file)
    assert len(before) == 1
    (new,) = [e for e in after if e.begin == 16 * KIB]
    assert new.generation > before[0].generation
    # In place, from then on: the extent has been written since the last snapshot that there was.
    write_at(file, 16 * KIB, os.urandom(4 * KIB))
    lab.sync()
    write_at(file, 16 * KIB, os.urandom(4 * KIB))
    lab.sync()
    third = extents_in(lab.snapshot("third"), file)
    assert next(e for e in third if e.begin == 16 * KIB).generation > new.generation


def test_preallocated_space_that_is_written_changes_its_kind(lab: BtrfsLab) -> None:
    file = lab.live / "file"
    file.write_bytes(b"")
    with file.open("r+b") as opened_file:
        calls.fallocate(opened_file.fileno(), 0, 0, 64 * KIB)
    first = lab.snapshot()
    lab.delete(first)
    write_at(file, 8 * KIB, b"w" * 4 * KIB)
    second = lab.snapshot("second")
    kinds = [(e.kind, e.begin, e.length) for e in extents_in(second, file)]
    assert kinds == [
        ("prealloc", 0, 8 * KIB),
        ("regular", 8 * KIB, 4 * KIB),
        ("prealloc", 12 * KIB, 52 * KIB),
    ]


def test_cutting_a_file_within_a_block_leaves_its_extents(lab: BtrfsLab) -> None:
    file = lab.live / "file"
    file.write_bytes(os.urandom(10_000))
    before = extents_in(lab.snapshot(), file)
    with file.open("r+b") as opened_file:
        opened_file.truncate(9_000)
    assert extents_in(lab.snapshot(), file) == before


def test_cloned_extents_keep_their_generation(lab: BtrfsLab) -> None:
    source, target = lab.live / "source", lab.live / "target"
    source.write_bytes(os.urandom(64 * KIB))
    target.write_bytes(os.urandom(64 * KIB))
    first = lab.snapshot()
    with source.open("rb") as one, target.open("r+b") as other:
        calls.clone(one.fileno(), other.fileno())
    snapshot = lab.snapshot()
    assert extents_in(snapshot, target) == extents_in(snapshot, source)
    (extent,) = extents_in(snapshot, target)
    # So what is new in the file is no newer than the snapshot before: only a comparison finds it.
    assert extent.generation <= transaction_of(first)
    assert target.stat().st_ino in touched_since(snapshot, transaction_of(first))


def test_inode_items_of_a_live_tree_are_written_late(lab: BtrfsLab) -> None:
    """Only after a commit does a tree in use tell the size of a file; that of a snapshot always does."""
    source, target = lab.live / "source", lab.live / "target"
    source.write_bytes(os.urandom(64 * KIB))
    lab.sync()
    with source.open("rb") as one, target.open("wb") as other:
        calls.clone(one.fileno(), other.fileno())
        inode = target.stat().st_ino
        fd = other.fileno()
        late = _native.btrfs_diff_file(fd, inode, fd, inode, 4096)[3]
        lab.sync()
        assert _native.btrfs_diff_file(fd, inode, fd, inode, 4096)[3] == 64 * KIB
    assert late in (0, 64 * KIB)
    assert inode_in(lab.snapshot(), target).attributes.size == 64 * KIB


def test_extents_add_up_to_what_the_inode_says(lab: BtrfsLab) -> None:
    """Holes are not counted; what is allocated beyond the end of the file is."""
    file = lab.live / "file"
    with file.open("wb") as opened_file:
        opened_file.write(os.urandom(100_000))
        opened_file.flush()
        calls.fallocate(opened_file.fileno(), calls.FALLOC_KEEP_SIZE, 1 << 20, 64 * KIB)
        calls.fallocate(
            opened_file.fileno(), calls.FALLOC_PUNCH_HOLE | calls.FALLOC_KEEP_SIZE, 8 * KIB, 8 * KIB
        )
        opened_file.truncate(200_000)
        calls.fallocate(opened_file.fileno(), calls.FALLOC_KEEP_SIZE, 1 << 20, 64 * KIB)
    snapshot = lab.snapshot()
    extents = extents_in(snapshot, file)
    # A state is written only if they do.
    assert {e.kind for e in extents} == {"regular", "prealloc"}
    assert sum(e.length for e in extents) == (snapshot / "file").stat().st_blocks * 512


def test_numbers_of_removed_inodes_are_used_again_after_a_mount(lab: BtrfsLab) -> None:
    file = lab.live / "file"
    file.write_bytes(b"1")
    number = file.stat().st_ino
    first = inode_in(lab.snapshot(), file)
    lab.delete(lab.mount / "snapshot-1")
    file.unlink()
    lab.cycle()
    file.write_bytes(b"2")
    second = inode_in(lab.snapshot("second"), file)
    assert file.stat().st_ino == number
    assert second.generation > first.generation


def test_a_search_tells_how_large_a_buffer_an_item_needs(lab: BtrfsLab) -> None:
    request = bytearray(112 + 40)
    struct.pack_into("<7Q4I", request, 0, 0, 256, 256, 0, (1 << 64) - 1, 0, (1 << 64) - 1, 1, 1, 1, 0)
    struct.pack_into("<Q", request, 104, 40)
    fd = os.open(lab.live, os.O_RDONLY)
    try:
        with pytest.raises(OSError, match=r"too large|Overflow|overflow") as caught:
            fcntl.ioctl(fd, TREE_SEARCH_V2, request)
    finally:
        os.close(fd)
    assert caught.value.errno == errno.EOVERFLOW
    assert struct.unpack_from("<Q", request, 104)[0] == 32 + 160
