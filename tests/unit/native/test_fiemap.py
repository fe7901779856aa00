"""fiemap_diff_records against a model that knows every sector."""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from blocksnap import _native

SECTOR = 512
SECTORS = 64
LAST, DELALLOC, UNWRITTEN, MERGED, SHARED = 1, 4, 0x800, 0x1000, 0x2000

Record = tuple[int, int, int, int]
"""Where in the file, where on the device, how long (in sectors), and flags."""


def packed(records: list[Record]) -> bytes:
    return b"".join(
        struct.pack("<QQQ16xI12x", at * SECTOR, place * SECTOR, length * SECTOR, flags)
        for at, place, length, flags in records
    )


@st.composite
def maps(draw: st.DrawFn) -> list[Record]:
    """A map of a file in few places of the device, so that many are the same in two of them."""
    records, at = [], 0
    while at < SECTORS and draw(st.booleans()):
        at += draw(st.integers(0, 5))
        length = draw(st.integers(1, 12))
        place = at + draw(st.sampled_from([0, 0, 100, 101, 200]))
        flags = draw(st.sampled_from([0, 0, SHARED, MERGED, LAST, UNWRITTEN, UNWRITTEN | SHARED]))
        records.append((at, place, length, flags))
        at += length
    return records


def places(records: list[Record], size: int) -> list[int | None]:
    """Where on the device every byte of a file is; None where it is zero, so that nothing is there."""
    found: list[int | None] = [None] * size
    for at, place, length, flags in records:
        if not flags & UNWRITTEN:
            for byte in range(at * SECTOR, min((at + length) * SECTOR, size)):
                found[byte] = place * SECTOR + byte - at * SECTOR
    return found


def extents(wanted: list[bool]) -> list[tuple[int, int]]:
    runs, at = [], 0
    for value, group in groupby(wanted):
        length = len(list(group))
        if value:
            runs.append((at, length))
        at += length
    return runs


def unpacked(answer: bytes) -> list[tuple[int, int]]:
    return list(struct.iter_unpack("<QQ", answer))


@settings(max_examples=150, deadline=None)
@given(
    base=maps(),
    later=maps(),
    base_size=st.integers(0, SECTORS * SECTOR),
    size=st.integers(0, SECTORS * SECTOR),
    at_once=st.integers(1, 9),
)
def test_the_diff_is_that_of_the_model(
    base: list[Record], later: list[Record], base_size: int, size: int, at_once: int
) -> None:
    was, now = places(base, base_size), places(later, size)
    was += [None] * size
    changed = [there is not None and there != before for there, before in zip(now, was, strict=False)]
    discarded = [
        there is None and before is not None for there, before in zip(now, was[:base_size], strict=False)
    ]
    answer = _native.fiemap_diff_records(packed(base), base_size, packed(later), size, at_once)
    assert unpacked(answer[0]) == extents(changed)
    assert unpacked(answer[1]) == extents(discarded)
    assert answer[2] <= len(base)
    assert answer[3] <= len(later)


@settings(max_examples=100, deadline=None)
@given(base=maps(), later=maps(), at=st.integers(0, 8), junk=st.binary(min_size=56, max_size=56))
def test_a_record_of_anything_is_refused_or_harmless(
    base: list[Record], later: list[Record], at: int, junk: bytes
) -> None:
    broken = packed(later[:at]) + junk + packed(later[at:])
    size = SECTORS * SECTOR
    for maps_ in ((packed(base), broken), (broken, packed(base))):
        try:
            changed, discarded, _, _ = _native.fiemap_diff_records(maps_[0], size, maps_[1], size, 3)
        except ValueError as err:
            assert "the extent map of " in str(err)
            continue
        for offset, length in unpacked(changed) + unpacked(discarded):
            assert 0 <= offset < offset + length <= size


def test_which_map_and_where() -> None:
    good, bad = packed([(0, 5, 2, 0)]), packed([(0, 5, 2, 0), (2, 9, 1, DELALLOC)])
    with pytest.raises(ValueError, match=r"the extent map of the base, byte 1024: .*delayed"):
        _native.fiemap_diff_records(bad, 4096, good, 4096, 5)
    with pytest.raises(ValueError, match=r"the extent map of the later file, byte 1024: .*delayed"):
        _native.fiemap_diff_records(good, 4096, bad, 4096, 5)


@pytest.fixture
def fd(tmp_path: Path) -> Iterator[int]:
    descriptor = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def test_descriptors_that_will_not_do(fd: int) -> None:
    with pytest.raises(OSError, match="fstat: Bad file descriptor"):
        _native.fiemap_diff(-1, fd)
    device = os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC)
    try:
        with pytest.raises(ValueError, match="not a regular file"):
            _native.fiemap_diff(device, fd)
    finally:
        os.close(device)
