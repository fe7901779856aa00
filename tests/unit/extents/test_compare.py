"""Two descriptors compared: the answer makes the later one out of the base."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from blocksnap.extents.changes import Changes
from blocksnap.extents.compare import compare_descriptors
from blocksnap.extents.model import ExtentList
from blocksnap.extents.scan import data_near, data_of, scan_file

PAGE = 4096
PAGES = 24


@pytest.fixture
def pair() -> Iterator[tuple[int, int]]:
    """In memory, where holes are told page by page."""
    opened = os.memfd_create("base"), os.memfd_create("later")
    yield opened
    for fd in opened:
        os.close(fd)


def write(fd: int, pages: dict[int, bytes], size: int) -> bytes:
    os.truncate(fd, 0)
    os.truncate(fd, size)
    for page, byte in pages.items():
        os.pwrite(fd, byte * max(0, min(PAGE, size - page * PAGE)), page * PAGE)
    return os.pread(fd, size, 0)


def applied(changes: Changes, base: bytes, later: bytes) -> bytes:
    result = bytearray(base[: len(later)].ljust(len(later), b"\0"))
    for offset, length in changes.changed.pairs():
        result[offset : offset + length] = later[offset : offset + length]
    for offset, length in changes.discarded.pairs():
        result[offset : offset + length] = bytes(length)
    return bytes(result)


pages = st.dictionaries(st.integers(0, PAGES), st.sampled_from([b"\0", b"a", b"b"]), max_size=PAGES)
sizes = st.integers(0, PAGES * PAGE)


@settings(
    max_examples=80,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
@given(base=pages, later=pages, base_size=sizes, size=sizes, block_pages=st.integers(1, 4))
def test_applied_to_the_base_it_gives_the_later_file(
    pair: tuple[int, int],
    base: dict[int, bytes],
    later: dict[int, bytes],
    base_size: int,
    size: int,
    block_pages: int,
) -> None:
    was, now = write(pair[0], base, base_size), write(pair[1], later, size)
    changes = compare_descriptors(*pair, block_size=block_pages * PAGE)
    assert (changes.method, changes.inherits) == ("compare", True)
    assert applied(changes, was, now) == now
    data = data_of(pair[1], size)
    assert changes.changed.intersect(data) == changes.changed
    assert not changes.discarded.intersect(data)
    # In so small a file everything is near the end.
    assert changes.allocated == data
    if was == now:
        assert not changes.changed
        assert not changes.discarded


def test_a_file_alone(pair: tuple[int, int]) -> None:
    write(pair[1], {3: b"a"}, 10 * PAGE)
    found = scan_file(pair[1], 10 * PAGE, None)
    assert (found.method, found.inherits) == ("compare", False)
    assert found.changed == found.allocated == ExtentList.of([(3 * PAGE, PAGE)])


def test_only_what_is_near_is_looked_at(pair: tuple[int, int]) -> None:
    size = 1 << 30
    write(pair[1], {}, size)
    for offset in range(0, size, 64 << 20):
        os.pwrite(pair[1], b"x" * PAGE, offset)
    near = data_near(pair[1], ExtentList.of([(5 * (64 << 20) + 9, PAGE)]), size=size, parent_size=1)
    assert near == ExtentList.of((number * (64 << 20), PAGE) for number in (0, 5, 15))
