"""Which chunks are read: never too few, by comparison with a chunk-by-chunk model."""

from __future__ import annotations

import tracemalloc

from hypothesis import given
from hypothesis import strategies as st

from blocksnap.extents.model import ExtentList
from blocksnap.pipeline.flow import Geometry
from blocksnap.pipeline.selection import Ranges, chunks_of, select_all, select_changed, select_either

UNIT = 4
CHUNK = 10


def extents(units: set[int], size: int) -> ExtentList:
    """Return the merged extents of 4-byte units, clipped to a size."""
    return ExtentList.of((unit * UNIT, min(UNIT, size - unit * UNIT)) for unit in units)


def touched(listed: ExtentList) -> set[int]:
    return {byte // CHUNK for offset, length in listed.pairs() for byte in range(offset, offset + length)}


def members(ranges: Ranges) -> set[int]:
    """Return the chunks of ranges, having made sure that they are sorted, disjoint and merged."""
    assert all(begin < end for begin, end in ranges)
    edges = [edge for pair in ranges for edge in pair]
    assert edges == sorted(set(edges))
    assert (len(ranges), bool(ranges)) == (len(edges) // 2, bool(edges))
    return {number for begin, end in ranges for number in range(begin, end)}


sets = st.sets(st.integers(0, 60), max_size=25)


@given(st.integers(1, 200), sets)
def test_all_allocated_chunks_and_no_others(size: int, units: set[int]) -> None:
    geometry = Geometry(size, CHUNK)
    selection = select_all(geometry, extents(units, size))
    assert members(selection.read) == touched(extents(units, size))
    assert members(selection.holes) == set(range(geometry.count)) - members(selection.read)


@given(st.integers(1, 200), st.integers(1, 200), sets, sets, sets)
def test_changed_chunks(
    size: int, parent_size: int, mapped: set[int], changed: set[int], before: set[int]
) -> None:
    allocated, discarded = extents(mapped, size), extents(before - mapped, size)
    selection = select_changed(
        Geometry(size, CHUNK),
        allocated=allocated,
        changed=extents(changed & mapped, size),
        discarded=discarded,
        parent_size=parent_size,
    )
    read, holes = members(selection.read), members(selection.holes)
    assert touched(extents(changed & mapped, size)) <= read <= touched(allocated)
    tails = {end // CHUNK for end in (parent_size, size) if end % CHUNK and end <= size}
    if parent_size == size:
        tails = set()
    assert holes == (touched(discarded) | tails) - touched(allocated)
    assert touched(discarded) | tails <= read | holes
    if parent_size == size:
        assert read <= touched(extents(changed & mapped, size)) | touched(discarded)


def test_a_short_last_chunk_without_data_is_a_hole() -> None:
    """What the parent's chunk held was beyond the new end, so nobody calls it discarded."""
    nothing = ExtentList()
    selection = select_changed(
        Geometry(45, CHUNK), allocated=nothing, changed=nothing, discarded=nothing, parent_size=100
    )
    assert (list(selection.read), list(selection.holes)) == ([], [(4, 5)])


def test_extents_are_clipped_to_the_volume() -> None:
    geometry = Geometry(95, CHUNK)
    ranges = Ranges([(0, 2), (8, 10)])
    assert list(ranges.extents(geometry)) == [(0, 20), (80, 15)]
    assert ranges.total_bytes(geometry) == 35


@given(st.integers(1, 200), sets, sets)
def test_chunks_that_either_has(size: int, one: set[int], other: set[int]) -> None:
    geometry = Geometry(size, CHUNK)
    first, second = extents(one, size), extents(other, size)
    either = select_either(chunks_of(geometry, first.pairs()), chunks_of(geometry, second.pairs()))
    assert members(either) == touched(first) | touched(second)
    assert either == Ranges(sorted(either))


def test_a_fragmented_volume_costs_what_its_result_takes() -> None:
    count = 20_000
    geometry = Geometry(2 * count * CHUNK, CHUNK)
    even = ExtentList.of((2 * number * CHUNK, CHUNK) for number in range(count))
    odd = ExtentList.of((2 * number * CHUNK + CHUNK, CHUNK) for number in range(count))
    tracemalloc.start()
    try:
        full = select_all(geometry, even)
        changed = select_changed(
            geometry, allocated=even, changed=even, discarded=odd, parent_size=geometry.size
        )
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert (len(full.read), len(full.holes)) == (len(changed.read), len(changed.holes)) == (count, count)
    # Two selections of two lists, with what their growth left over.
    assert peak < 4 * count * 16 * 1.3
