"""Holes in a thin pool whose chunks are no power of two: there the kernel drops some of the discards."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from blocksnap.system import blockdev
from support.in_process import InProcess
from support.lvm_lab import ThinPool, thin_pool, tool, write_at

CHUNK = 192 << 10
CHUNKS = 160


@pytest.fixture(scope="module")
def pool(_lab: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ThinPool]:
    with thin_pool(tmp_path_factory.mktemp("pool"), chunk="192k") as made:
        yield made


def filled(pool: ThinPool, name: str) -> bytes:
    content = random.Random(name).randbytes(CHUNKS * CHUNK)
    pool.create(name, "32M")
    write_at(pool.node(name), 0, content)
    return content


def mapped_chunks(pool: ThinPool, name: str) -> int:
    # "START LENGTH thin MAPPED-SECTORS HIGHEST"
    status = tool("dmsetup", "status", pool.node(name))
    return int(status.split()[3]) * 512 // CHUNK


def test_what_is_cleared_is_zeros_and_mostly_unmapped(pool: ThinPool) -> None:
    content = bytearray(filled(pool, "cleared"))
    dice, held = random.Random(1), mapped_chunks(pool, "cleared")
    fd = blockdev.open_exclusive(pool.node("cleared"))
    try:
        for first in range(2, CHUNKS - 10, 8):
            begin, end = first * CHUNK - dice.randrange(CHUNK), (first + 6) * CHUNK + dice.randrange(CHUNK)
            told: list[int] = []
            blockdev.clear(fd, begin, end - begin, discard=True, progress=told.append)
            assert sum(told) == end - begin
            assert max(told) <= blockdev.PIECE_BYTES
            content[begin:end] = bytes(end - begin)
            held -= 6
        blockdev.drop_cache(fd)
        assert os.pread(fd, len(content), 0) == content
    finally:
        os.close(fd)
    assert 0 <= mapped_chunks(pool, "cleared") - held <= CHUNKS // 8


def test_a_restore_leaves_nothing_of_what_was_there(
    pool: ThinPool, blocksnap: InProcess, tmp_path: Path
) -> None:
    filled(pool, "target")
    wanted = bytearray(random.Random(2).randbytes(CHUNKS * CHUNK))
    with (tmp_path / "source").open("wb") as file:
        file.write(wanted)
        for first in range(0, CHUNKS - 10, 10):
            begin, length = first * CHUNK + 4096, 7 * CHUNK
            blockdev.punch_hole(file.fileno(), begin, length)
            wanted[begin : begin + length] = bytes(length)
    made = blocksnap.backup(str(tmp_path / "source"))["id"]
    blocksnap.done("restore", made, f"{pool.group}/target")
    with open(pool.node("target"), "rb") as device:
        assert device.read(len(wanted)) == wanted
