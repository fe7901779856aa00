"""Extent lists against sets of bytes."""

from __future__ import annotations

import tracemalloc

from hypothesis import given
from hypothesis import strategies as st

from blocksnap.extents.model import Extent, ExtentList

END = 80
pairs = st.lists(st.tuples(st.integers(0, END), st.integers(-2, 12)), max_size=15)
lists = pairs.map(ExtentList.of)


def members(extents: ExtentList) -> set[int]:
    """Return the bytes of a list, having made sure that it is sorted, disjoint and merged."""
    previous = -1
    for extent in extents:
        assert extent.length > 0
        assert extent.offset > previous
        previous = extent.end
    return {byte for extent in extents for byte in range(extent.offset, extent.end)}


@given(pairs)
def test_any_pairs_make_a_list(listed: list[tuple[int, int]]) -> None:
    extents = ExtentList.of(listed)
    found = members(extents)
    assert found == {byte for offset, length in listed for byte in range(offset, offset + length)}
    assert extents.total == len(found)
    assert list(extents.pairs()) == [(extent.offset, extent.length) for extent in extents]
    assert len(list(extents)) == len(extents)
    assert bool(extents) == bool(found)
    again = ExtentList(extents.packed)
    assert (again, hash(again)) == (extents, hash(extents))


@given(lists, lists)
def test_union_and_intersection(one: ExtentList, other: ExtentList) -> None:
    assert members(one.union(other)) == members(one) | members(other)
    assert members(one.intersect(other)) == members(one) & members(other)
    assert one.union(other) == other.union(one)
    assert one.intersect(other) == other.intersect(one)


@given(lists, st.integers(0, END + 15))
def test_clipping(extents: ExtentList, length: int) -> None:
    assert members(extents.clip(length)) == {byte for byte in members(extents) if byte < length}


@given(lists, st.integers(1, 20), st.integers(0, END + 15))
def test_alignment(extents: ExtentList, unit: int, limit: int) -> None:
    wide = {
        byte
        for touched in members(extents)
        for byte in range(touched // unit * unit, touched // unit * unit + unit)
        if byte < limit
    }
    assert members(extents.align(unit, limit=limit)) == wide


def test_offsets_have_64_bits() -> None:
    extents = ExtentList.of([((1 << 63) - 512, 512), (1 << 62, 1)])
    assert list(extents) == [Extent(1 << 62, 1), Extent((1 << 63) - 512, 512)]
    assert extents.clip(1 << 63) is extents


def test_long_lists_are_never_unpacked() -> None:
    count = 20_000
    even = ExtentList.of((8 * number, 4) for number in range(count))
    odd = ExtentList.of((8 * number + 5, 2) for number in range(count))
    tracemalloc.start()
    try:
        assert len(even.union(odd)) == 2 * count
        assert not even.intersect(odd)
        assert even.align(16, limit=8 * count) == ExtentList.whole(8 * count)
        assert len(even.clip(4 * count)) == count // 2
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 2 * count * 16 * 3
