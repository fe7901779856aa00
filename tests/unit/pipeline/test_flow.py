"""The flow of chunks: order, completeness, zero chunks, and ends of every kind."""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from blocksnap.errors import VolumeError
from blocksnap.pipeline.flow import Flow, Geometry
from support.standing import wait_until

CHUNK = 16 << 10


class Sink:
    overhead = 4

    def __init__(self) -> None:
        self.claimed: set[bytes] = set()
        self.stored: dict[bytes, bytes] = {}
        self.lock = threading.Lock()
        self.fail_at: int | None = None

    def identify(self, plain: memoryview) -> bytes:
        return hashlib.sha256(plain).digest()

    def claim(self, id_: bytes) -> bool:
        with self.lock:
            if id_ in self.claimed:
                return False
            self.claimed.add(id_)
            return True

    def new_sealer(self) -> Sink:
        return self

    def seal_into(self, id_: bytes, plain: memoryview, out: memoryview) -> int:
        if self.fail_at is not None and len(self.claimed) >= self.fail_at:
            raise OSError("sealing failed")
        out[:4] = b"SEAL"
        out[4 : 4 + len(plain)] = plain
        return 4 + len(plain)

    def store(self, id_: bytes, frame: memoryview, plain_length: int) -> None:
        assert frame[:4] == b"SEAL"
        self.stored[id_] = bytes(frame[4:])
        assert len(self.stored[id_]) == plain_length


@contextmanager
def opened(path: Path, content: bytes) -> Iterator[int]:
    path.write_bytes(content)
    fd = os.open(path, os.O_RDONLY)
    try:
        yield fd
    finally:
        os.close(fd)


@settings(max_examples=15, deadline=None)
@given(
    st.integers(1, 80 * CHUNK),
    st.lists(st.integers(0, 79), max_size=30, unique=True),
    st.integers(0, 3),
)
def test_every_chunk_comes_once_in_order(
    tmp_path_factory: pytest.TempPathFactory, size: int, wanted: list[int], seed: int
) -> None:
    geometry = Geometry(size, CHUNK)
    block = hashlib.sha256(bytes([seed])).digest() * (CHUNK // 32)
    content = b"".join(block if n % 3 else bytes(CHUNK) for n in range(geometry.count))[:size]
    numbers = sorted(n for n in wanted if n < geometry.count)
    sink = Sink()
    with opened(tmp_path_factory.mktemp("flow") / "v", content) as fd:
        with Flow(fd, geometry, [(n * CHUNK, geometry.length(n)) for n in numbers], sink) as flow:
            results = list(flow.results())
    assert [r.number for r in results] == numbers
    assert flow.read_bytes == sum(geometry.length(n) for n in numbers)
    for result in results:
        expected = content[result.number * CHUNK : result.number * CHUNK + result.length]
        if result.id is None:
            assert not any(expected)
        else:
            assert sink.stored[result.id] == expected


def test_a_volume_that_ends_early_is_an_error(tmp_path: Path) -> None:
    with opened(tmp_path / "v", b"x" * CHUNK * 3) as fd:
        with (
            pytest.raises(VolumeError, match="ended"),
            Flow(fd, Geometry(CHUNK * 9, CHUNK), [(0, CHUNK * 9)], Sink()) as flow,
        ):
            list(flow.results())


def test_a_failing_read_is_an_error(tmp_path: Path) -> None:
    fd = os.open(tmp_path, os.O_RDONLY)
    try:
        with (
            pytest.raises(VolumeError, match="cannot read"),
            Flow(fd, Geometry(CHUNK, CHUNK), [(0, CHUNK)], Sink()) as flow,
        ):
            list(flow.results())
    finally:
        os.close(fd)


def test_a_failing_worker_ends_the_flow(tmp_path: Path) -> None:
    sink = Sink()
    sink.fail_at = 70
    content = os.urandom(CHUNK * 200)
    before = threading.active_count()
    with opened(tmp_path / "v", content) as fd:
        with (
            pytest.raises(OSError, match="sealing failed"),
            Flow(fd, Geometry(len(content), CHUNK), [(0, len(content))], sink) as flow,
        ):
            list(flow.results())
    assert wait_until(lambda: threading.active_count() <= before)


def test_a_caller_that_stops_early_leaves_no_threads(tmp_path: Path) -> None:
    before = threading.active_count()
    with opened(tmp_path / "v", os.urandom(CHUNK * 500)) as fd:
        with Flow(fd, Geometry(CHUNK * 500, CHUNK), [(0, CHUNK * 500)], Sink()) as flow:
            next(flow.results())
    assert wait_until(lambda: threading.active_count() <= before)


def test_large_chunks_have_slots_of_their_size(tmp_path: Path) -> None:
    content = os.urandom((4 << 20) * 2 + 5)
    sink = Sink()
    with opened(tmp_path / "v", content) as fd:
        with Flow(fd, Geometry(len(content), 4 << 20), [(0, len(content))], sink) as flow:
            ids = [result.id for result in flow.results()]
    assert b"".join(sink.stored[id_] for id_ in ids if id_) == content
