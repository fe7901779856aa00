"""Which chunks of a file are read, and which become holes unread: held against the bytes themselves."""

from __future__ import annotations

import stat

from hypothesis import given, settings
from hypothesis import strategies as st

from blocksnap.extents.btrfs_changes import Attributes, InodeChange
from blocksnap.extents.model import ExtentList
from blocksnap.operations.tree_storing import select_chunks
from blocksnap.repository.inodes import InodeRecord

BLOCK, CHUNK = 4, 16
"""Small ones, for the same arithmetic."""


def change(size: int, changed: ExtentList, holes: ExtentList) -> InodeChange:
    attributes = Attributes(stat.S_IFREG, 0, 0, 1, 0, 0, size, 0, 0, 0, 0)
    return InodeChange(300, 1, False, attributes, (), (), changed, holes)


def record(size: int) -> InodeRecord:
    return InodeRecord(300, 1, stat.S_IFREG, 0, 0, 1, 0, size, (0, 0), 0, 0, 0, 0)


blocks = st.lists(st.sampled_from("dDh"), max_size=24).map("".join)
"""A file before and after: blocks of data, of other data, and holes."""


def content(layout: str, size: int) -> bytes:
    plain = {"d": b"d" * BLOCK, "D": b"D" * BLOCK, "h": bytes(BLOCK)}
    return b"".join(plain[kind] for kind in layout).ljust(size, b"\0")[:size]


def extents(numbers: list[int], size: int) -> ExtentList:
    return ExtentList.of((n * BLOCK, BLOCK) for n in numbers).clip(size)


@settings(max_examples=400)
@given(blocks, st.integers(0, 3), blocks, st.integers(0, 3))
def test_a_map_that_is_patched_is_the_map_of_the_file(old: str, old_cut: int, new: str, new_cut: int) -> None:
    sizes = [max(len(layout) * BLOCK - cut, 0) for layout, cut in ((old, old_cut), (new, new_cut))]
    before, after = content(old, sizes[0]), content(new, sizes[1])
    width = max(len(old), len(new))
    was, now = old.ljust(width, "h"), new.ljust(width, "h")
    differing = [n for n in range(width) if was[n] != now[n]]
    edges = (
        [max(size - 1, 0) // BLOCK for size in sizes] + [sizes[0] // BLOCK] if sizes[0] != sizes[1] else []
    )
    data = [n for n in sorted({*differing, *edges}) if n < width and now[n] != "h"]
    gone = [n for n in differing if now[n] == "h" and n * BLOCK < sizes[1]]
    read, holes = select_chunks(
        change(sizes[1], extents(data, sizes[1]), extents(gone, sizes[1])), record(sizes[0]), CHUNK
    )
    count = -(-sizes[1] // CHUNK)
    chunks = {n: before[n * CHUNK : (n + 1) * CHUNK] for n in range(-(-sizes[0] // CHUNK)) if n < count}
    for begin, end in read:
        assert end <= count
        chunks |= {n: after[n * CHUNK : (n + 1) * CHUNK] for n in range(begin, end)}
    for begin, end in holes:
        assert end <= count
        chunks |= {n: bytes(min(CHUNK, sizes[1] - n * CHUNK)) for n in range(begin, end)}
    taken = [n for begin, end in (*read, *holes) for n in range(begin, end)]
    assert len(taken) == len(set(taken)), "no chunk is both"
    for number in range(count):
        expected = after[number * CHUNK : (number + 1) * CHUNK]
        # What nobody has set is a hole, which has no length of its own.
        found = chunks.get(number, bytes(len(expected)))
        if any(found) or any(expected):
            assert found == expected, number


def test_a_new_file_is_read_where_it_has_data() -> None:
    assert select_chunks(change(100, extents([0, 9], 100), ExtentList()), None, CHUNK) == (
        ((0, 1), (2, 3)),
        (),
    )
    assert select_chunks(change(0, ExtentList(), ExtentList()), None, CHUNK) == ((), ())


def test_a_hole_of_a_terabyte_is_not_read() -> None:
    size = 1 << 40
    holes = ExtentList.of([(4096, size - 4096)])
    read, empty = select_chunks(change(size, ExtentList(), holes), record(size), 1 << 17)
    assert (read, empty) == (((0, 1),), ((1, size >> 17),))
