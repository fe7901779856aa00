"""Which part of an arriving volume is read from where: all of it, each byte once, and nothing too early."""

from __future__ import annotations

import os
import struct
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blocksnap.restore.arrival_devices import below_table
from blocksnap.restore.exception_store import (
    StoreUnreadableError,
    is_nearly_full,
    store_bytes,
    take_up_store,
)

LOCAL, REMOTE = os.makedev(253, 7), os.makedev(43, 0)
SECTORS = st.integers(0, 1 << 30)


@given(st.lists(SECTORS, min_size=4, max_size=4, unique=True))
def test_the_table_covers_the_volume_once(cuts: list[int]) -> None:
    head, reached, size, lv = (cut * 512 for cut in sorted(cuts))
    table = below_table(lv_bytes=lv, size=size, head=head, reached=reached, local=LOCAL, remote=REMOTE)
    at, local = 0, []
    for line in table.splitlines():
        begin, length, target, device, offset = line.split()
        assert (int(begin), target, offset) == (at, "linear", begin)
        if device == "253:7":
            local.append((at * 512, (at + int(length)) * 512))
        at += int(length)
    assert at * 512 == lv
    # Just what has arrived, and what lies behind the backup.
    assert local == [each for each in ((head, reached), (size, lv)) if each[0] < each[1]]


def test_nothing_and_everything_is_one_line() -> None:
    nothing = below_table(lv_bytes=8192, size=8192, head=4096, reached=0, local=LOCAL, remote=REMOTE)
    assert nothing == "0 16 linear 43:0 0"
    everything = below_table(lv_bytes=8192, size=0, head=0, reached=0, local=LOCAL, remote=LOCAL)
    assert everything == "0 16 linear 253:7 0"


def test_a_store_takes_every_block_of_the_volume() -> None:
    for size in (512, 4096, 1 << 20, 3 << 40):
        chunks = -(-size // 4096)
        # A header, and a list of 256 exceptions before each 256 chunks.
        assert store_bytes(size) >= (1 + chunks + -(-chunks // 256)) * 4096


def test_what_a_volume_that_was_made_smaller_has_lost_is_remote() -> None:
    table = below_table(
        lv_bytes=16384, size=12288, head=4096, reached=12288, local=LOCAL, remote=REMOTE, capacity=8192
    )
    assert table.splitlines() == [
        "0 8 linear 43:0 0",
        "8 8 linear 253:7 8",
        "16 8 linear 43:0 16",
        "24 8 error",
    ]


@pytest.mark.parametrize("count", [0, 1, 255, 256, 300])
def test_a_store_that_was_given_up_is_taken_up_with_what_its_list_says(tmp_path: Path, count: int) -> None:
    """Also where a write of the list was cut, so that something follows its end."""
    exceptions = [(number * 3, number + 2 + number // 256) for number in range(count)]
    areas = bytearray(2 * 257 * 4096)
    for number, pair in enumerate(exceptions):
        struct.pack_into("<QQ", areas, number // 256 * 257 * 4096 + number % 256 * 16, *pair)
    torn = bytearray(areas)
    area, place = divmod(count, 256)
    if place < 250:
        struct.pack_into("<QQ", torn, area * 257 * 4096 + (place + 3) * 16, 7, 9)
    header = struct.pack("<4sIII", b"SnAp", 0, 1, 8).ljust(4096, b"\0")
    store = tmp_path / "store"
    store.write_bytes(header + torn)
    assert take_up_store(str(store))
    found = store.read_bytes()
    assert found[:16] == struct.pack("<4sIII", b"SnAp", 1, 1, 8)
    assert found[4096:] == areas
    # Also where the kernel could not write the mark.
    store.write_bytes(found[:4096] + torn)
    assert not take_up_store(str(store))
    assert store.read_bytes() == found


@pytest.mark.parametrize(("count", "is_full"), [(0, False), (255, False), (700, False), (769, True)])
def test_a_store_that_was_full_tells_it_by_its_list(tmp_path: Path, count: int, is_full: bool) -> None:
    """Of 1,024 chunks: 256 are room enough."""
    areas = bytearray(1023 * 4096)
    for number in range(count):
        place = number + 2 + number // 256
        struct.pack_into("<QQ", areas, number // 256 * 257 * 4096 + number % 256 * 16, 5 * number, place)
    store = tmp_path / "store"
    store.write_bytes(struct.pack("<4sIII", b"SnAp", 1, 1, 8).ljust(4096, b"\0") + areas)
    assert is_nearly_full(str(store)) == is_full


def test_what_is_no_store_is_left_alone(tmp_path: Path) -> None:
    store = tmp_path / "store"
    store.write_bytes(bytes(8192))
    assert not take_up_store(str(store))
    assert not is_nearly_full(str(store))
    assert store.read_bytes() == bytes(8192)
    with pytest.raises(StoreUnreadableError, match="No such file"):
        take_up_store(str(tmp_path / "none"))
