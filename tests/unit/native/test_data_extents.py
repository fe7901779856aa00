"""data_extents finds what is allocated in a sparse file."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from blocksnap import _native
from blocksnap.extents.model import ExtentList

# A multiple of the allocation unit of every filesystem the tests meet.
PIECE = 65536


@pytest.fixture
def fd(tmp_path: Path) -> Iterator[int]:
    descriptor = os.open(tmp_path / "sparse", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def has_holes(fd: int) -> bool:
    """Whether the filesystem tells holes from data at all."""
    os.truncate(fd, PIECE)
    return _native.data_extents(fd, 0, PIECE) == b""


@settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
@given(
    pieces=st.sets(st.integers(0, 63)),
    size=st.integers(0, 64 * PIECE),
    offset=st.integers(0, 70 * PIECE),
    length=st.integers(0, 70 * PIECE),
)
def test_sparse_file(fd: int, pieces: set[int], size: int, offset: int, length: int) -> None:
    os.truncate(fd, 0)
    if not has_holes(fd):
        pytest.skip("the filesystem of the temporary folder has no holes")
    os.truncate(fd, 64 * PIECE)
    for piece in pieces:
        os.pwrite(fd, b"x" * PIECE, piece * PIECE)
    os.truncate(fd, size)
    written = ExtentList.of((piece * PIECE, PIECE) for piece in pieces).clip(size)
    expected = written.intersect(ExtentList.of([(offset, length)]))
    found = ExtentList(_native.data_extents(fd, offset, length))
    # The last piece may be cut within a block, whose rest still counts as data of the file.
    assert found == expected


def test_what_cannot_tell_is_all_data() -> None:
    fd = os.open("/proc/self/stat", os.O_RDONLY | os.O_CLOEXEC)
    try:
        assert ExtentList(_native.data_extents(fd, 10, 20)) == ExtentList.of([(10, 20)])
    finally:
        os.close(fd)


def test_errors_name_the_call(fd: int) -> None:
    with pytest.raises(OSError, match="lseek: Bad file descriptor"):
        _native.data_extents(-1, 0, 1)
    with pytest.raises(OSError, match="lseek: Value too large"):
        _native.data_extents(fd, (1 << 63) - 1, 1)
    with pytest.raises(OverflowError):
        _native.data_extents(fd, -1, 1)
    reader, writer = os.pipe()
    try:
        with pytest.raises(OSError, match="lseek: Illegal seek"):
            _native.data_extents(reader, 0, 1)
    finally:
        os.close(reader)
        os.close(writer)
