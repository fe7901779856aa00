"""An overlay reads as the image with what was written over it, whatever the order and the edges."""

from __future__ import annotations

import random
from contextlib import closing

from hypothesis import given
from hypothesis import strategies as st

from blocksnap.restore.overlay import BLOCK_BYTES, Overlay

SIZE = 10 * BLOCK_BYTES + 512
IMAGE = random.Random(2).randbytes(SIZE)
WRITES = st.lists(st.tuples(st.integers(0, SIZE), st.binary(max_size=3 * BLOCK_BYTES)), max_size=12)


@given(WRITES, st.integers(0, SIZE), st.integers(0, SIZE))
def test_it_reads_as_if_it_had_been_written(
    writes: list[tuple[int, bytes]], offset: int, length: int
) -> None:
    with closing(Overlay(SIZE, lambda begin, size: IMAGE[begin : begin + size])) as overlay:
        expected = bytearray(IMAGE)
        for at, data in writes:
            room = max(SIZE - at, 0)
            assert overlay.write(at, data) == min(len(data), room)
            expected[at : at + min(len(data), room)] = data[:room]
        assert overlay.read(offset, length) == expected[offset : offset + length]
        assert overlay.read(0, SIZE + 1) == expected


def test_blocks_that_are_written_whole_are_not_read() -> None:
    def refuse(begin: int, size: int) -> bytes:
        raise AssertionError((begin, size))

    with closing(Overlay(SIZE, refuse)) as overlay:
        overlay.write(BLOCK_BYTES, b"x" * 2 * BLOCK_BYTES)
        overlay.write(10 * BLOCK_BYTES, b"y" * 512)
        assert overlay.read(BLOCK_BYTES, BLOCK_BYTES) == b"x" * BLOCK_BYTES
        assert overlay.read(10 * BLOCK_BYTES, 4096) == b"y" * 512
