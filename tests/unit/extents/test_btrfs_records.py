"""States of inodes: the vectors of docs/design.md, and that what is written is read."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from blocksnap.extents.btrfs_changes import Entry, EntryKind, RememberedInode
from blocksnap.extents.btrfs_records import read_listing, read_records, write_listing, write_memory
from support.btrfs_reference import Extent, compare, read_extents, write_extents

BLOCK = 4096
EXTENTS_VECTOR = bytes.fromhex("010c 000001 020102 0d00201280400300 01010402020101")
EXTENTS = [
    Extent("inline", 0, BLOCK, 0),
    Extent("prealloc", 2 * BLOCK, 2 * BLOCK, 0),
    Extent("regular", 4 * BLOCK, 32 * BLOCK, 3, 9, 4096 * BLOCK, 3 * BLOCK, 0),
    Extent("regular", 37 * BLOCK, 4 * BLOCK, 0, 10, 4100 * BLOCK, BLOCK, BLOCK),
]
LISTING_VECTOR = bytes.fromhex("81 02820401 01 61 010202 03 646972")
LISTING = [Entry(b"a", 257, "file", 2), Entry(b"dir", 258, "directory", 3)]
KINDS: list[EntryKind] = ["file", "directory", "symlink", "subvolume", "fifo", "unknown"]

entries = st.lists(
    st.builds(
        Entry,
        st.binary(min_size=1, max_size=255),
        st.integers(256, (1 << 64) - 257),
        st.sampled_from(KINDS),
        st.integers(2, (1 << 64) - 1),
    ),
    unique_by=lambda entry: entry.index,
)


def test_the_vectors() -> None:
    assert read_extents(EXTENTS_VECTOR) == EXTENTS
    assert write_extents(EXTENTS) == EXTENTS_VECTOR
    assert list(read_listing(LISTING_VECTOR)) == LISTING
    assert write_listing(LISTING) == LISTING_VECTOR


@settings(deadline=None)
@given(entries)
def test_a_listing_comes_back(names: list[Entry]) -> None:
    assert list(read_listing(write_listing(names))) == sorted(names, key=lambda entry: entry.index)


@settings(deadline=None)
@given(st.binary(max_size=60))
def test_hostile_listings_end(data: bytes) -> None:
    try:
        found = list(read_listing(b"\x81" + data))
    except ValueError:
        return
    assert [entry.index for entry in found] == sorted({entry.index for entry in found})


def test_what_is_no_listing() -> None:
    for state in (
        b"",
        EXTENTS_VECTOR,
        LISTING_VECTOR[:-1],
        b"\x81\x00\x00\x01\x01a",
        b"\x81\x02\x00\x09\x01a",
    ):
        with pytest.raises(ValueError, match=r"directory|number"):
            list(read_listing(state))
    for name in (b"", b"n" * 256):
        with pytest.raises(ValueError, match="no name"):
            write_listing([Entry(name, 257, "file", 2)])


def test_memory_is_written_in_order() -> None:
    known = {300: RememberedInode(7, 5, None), 256: RememberedInode(6, 20, LISTING_VECTOR)}
    length = len(LISTING_VECTOR)
    assert write_memory(known) == (
        struct.pack("<4Q", 256, 6, 20, length) + LISTING_VECTOR + struct.pack("<4Q", 300, 7, 5, (1 << 64) - 1)
    )


def test_a_record_is_taken_apart() -> None:
    parts = [
        struct.pack("<QQ", 0, 4096),
        b"",
        struct.pack("<QQBB", 2, 257, 8, 3) + b"sub",
        b"",
        struct.pack("<QH", 256, 4) + b"name",
        struct.pack("<HH", 6, 3) + b"user.xabc",
        b"",
        b"state",
    ]
    head = struct.pack(
        "<5Q4q4I5I8Q",
        *(257, 9, 5000, 8 << 20 | 17, 3),
        *(-1, 2, 3, 4),
        *(5, 6, 7, 8),
        *(0o100644, 10, 11, 2, 1),
        *map(len, parts),
    )
    (change,) = read_records(head + b"".join(parts))
    assert (change.number, change.generation, change.is_new) == (257, 9, True)
    assert list(change.changed.pairs()) == [(0, 4096)]
    assert change.added == (Entry(b"sub", 257, "subvolume", 2),)
    assert [(link.parent, link.name) for link in change.links] == [(256, b"name")]
    assert change.xattrs == ((b"user.x", b"abc"),)
    assert change.state == b"state"
    attributes = change.attributes
    assert (attributes.size, attributes.flags, attributes.nlink) == (5000, 3, 2)
    assert attributes.rdev == 8 << 8 | 17
    assert (attributes.atime, attributes.ctime) == (-(10**9) + 5, 2 * 10**9 + 6)
    assert change.is_file
    assert not change.is_directory


def test_the_reference_itself() -> None:
    changed, holes = compare(EXTENTS, 41 * BLOCK, EXTENTS, 41 * BLOCK)
    assert (changed, holes) == ({0}, set())
    changed, holes = compare(EXTENTS, 41 * BLOCK, EXTENTS[2:], 41 * BLOCK - 1)
    assert (changed, holes) == ({40}, {0})
