"""Which part of an arriving volume is read from where: all of it, each byte once, and nothing too early."""

from __future__ import annotations

import os

from hypothesis import given
from hypothesis import strategies as st

from blocksnap.restore.arrival_devices import below_table, store_bytes

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
