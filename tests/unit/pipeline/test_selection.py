"""Which chunks are read: never too few, by comparison with a chunk-by-chunk model."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from blocksnap.pipeline.flow import Geometry
from blocksnap.pipeline.selection import Selection, select_all, select_changed

UNIT = 4
CHUNK = 10


def extents(units: set[int], size: int) -> list[tuple[int, int]]:
    """Return the merged extents of 4-byte units, clipped to a size."""
    found: list[tuple[int, int]] = []
    for unit in sorted(units):
        begin, end = unit * UNIT, min(unit * UNIT + UNIT, size)
        if begin >= end:
            continue
        if found and sum(found[-1]) == begin:
            found[-1] = (found[-1][0], found[-1][1] + end - begin)
        else:
            found.append((begin, end - begin))
    return found


def touched(listed: list[tuple[int, int]]) -> set[int]:
    return {byte // CHUNK for offset, length in listed for byte in range(offset, offset + length)}


def members(ranges: tuple[tuple[int, int], ...]) -> set[int]:
    chunks = [number for begin, end in ranges for number in range(begin, end)]
    assert chunks == sorted(set(chunks))
    return set(chunks)


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
    assert holes == touched(discarded) - touched(allocated)
    assert touched(discarded) <= read | holes
    if parent_size != size:
        for tail in (parent_size, size):
            if tail % CHUNK and tail <= size and tail // CHUNK in touched(allocated):
                assert tail // CHUNK in read
    else:
        assert read <= touched(extents(changed & mapped, size)) | touched(discarded)


def test_extents_are_clipped_to_the_volume() -> None:
    geometry = Geometry(95, CHUNK)
    assert list(Selection(((0, 2), (8, 10)), ()).extents(geometry)) == [(0, 20), (80, 15)]
