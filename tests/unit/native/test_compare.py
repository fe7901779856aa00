"""compare_files against a comparison byte by byte, and as what has to be written over the base."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from blocksnap import _native
from blocksnap.extents.model import ExtentList

PAGE = 4096
FILE_PAGES = 32

Piece = tuple[int, int, bytes]
"""Where, how long, and which byte it is filled with."""

pieces = st.lists(
    st.tuples(
        st.integers(0, FILE_PAGES * PAGE), st.integers(1, 3 * PAGE), st.sampled_from([b"\0", b"a", b"b"])
    ),
    max_size=6,
)


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[tuple[int, int]]:
    opened = [os.open(tmp_path / name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC) for name in ("base", "later")]
    try:
        yield opened[0], opened[1]
    finally:
        for fd in opened:
            os.close(fd)


def fill(fd: int, content: list[Piece], size: int) -> bytes:
    os.truncate(fd, 0)
    os.truncate(fd, size)
    for offset, length, byte in content:
        # Nothing beyond the size.
        os.pwrite(fd, byte * max(0, min(length, size - offset)), offset)
    return os.pread(fd, size, 0)


def expected(was: bytes, now: bytes, block: int) -> ExtentList:
    was = was[: len(now)].ljust(len(now), b"\0")
    return ExtentList.of(
        (at, min(block, len(now) - at))
        for at in range(0, len(now), block)
        if was[at : at + block] != now[at : at + block]
    )


@settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
@given(
    common=pieces,
    base=pieces,
    later=pieces,
    base_size=st.integers(0, FILE_PAGES * PAGE),
    size=st.integers(0, FILE_PAGES * PAGE),
    block=st.sampled_from([PAGE, 2 * PAGE, 3 * PAGE, 1 << 20]),
)
def test_the_answer_is_what_has_to_be_written(
    pair: tuple[int, int],
    common: list[Piece],
    base: list[Piece],
    later: list[Piece],
    base_size: int,
    size: int,
    block: int,
) -> None:
    was = fill(pair[0], common + base, base_size)
    now = fill(pair[1], common + later, size)
    changed, base_bytes, bytes_ = _native.compare_files(*pair, block)
    assert ExtentList(changed) == expected(was, now, block)
    assert base_bytes <= base_size
    assert bytes_ <= size


@pytest.mark.parametrize("size", [PAGE * 300, PAGE * 2000 + 700])
def test_past_the_page_cache(tmp_path: Path, size: int) -> None:
    content = os.urandom(size)
    other = bytearray(content)
    other[0] ^= 1
    other[-1] ^= 1
    for name, data in (("base", content), ("later", other)):
        (tmp_path / name).write_bytes(data)
    try:
        opened = [os.open(tmp_path / name, os.O_RDONLY | os.O_DIRECT) for name in ("base", "later")]
    except OSError as err:
        if err.errno != errno.EINVAL:
            raise
        pytest.skip("the filesystem of the temporary folder has no O_DIRECT")
    try:
        changed, base_bytes, bytes_ = _native.compare_files(*opened, PAGE)
    finally:
        for fd in opened:
            os.close(fd)
    assert ExtentList(changed) == expected(content, bytes(other), PAGE)
    assert base_bytes == bytes_ == size


def test_errors_name_the_call(pair: tuple[int, int]) -> None:
    with pytest.raises(OSError, match="Bad file descriptor"):
        _native.compare_files(-1, pair[0], PAGE)
    with pytest.raises(ValueError, match="multiple of 4096"):
        _native.compare_files(*pair, 1000)
    null = os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC)
    try:
        with pytest.raises(OSError, match="Block device required"):
            _native.compare_files(pair[0], null, PAGE)
    finally:
        os.close(null)
