from __future__ import annotations

import pytest

from blocksnap.volumes.classic_store import SMALLEST_STORE, StoreFacts, largest_store, plan_store
from blocksnap.volumes.errors import NoRoomForStoreError

MIB, GIB = 1 << 20, 1 << 30
EXTENT = 4 * MIB


def facts(volume_size: int, free: int = 1 << 50, rate: float = 0.0, base: int | None = None) -> StoreFacts:
    return StoreFacts(volume_size, free, EXTENT, rate, base)


@pytest.mark.parametrize(
    ("given", "size", "reason"),
    [
        (facts(100 * GIB), 15 * GIB, "15 % of the volume"),
        (facts(40 * MIB), SMALLEST_STORE, "the least that is taken"),
        (facts(8 * MIB), 12 * MIB, "it cannot overflow"),
        # It takes 2,048 s to read 100 GiB at the slowest, and 10 MiB are written in each of them.
        (facts(100 * GIB, rate=10 * MIB), 40 * GIB, "twice what is written while it is read, 10485760 bytes"),
        (facts(100 * GIB, rate=100 * MIB), 102804 * MIB, "it cannot overflow"),
        (facts(100 * GIB, base=12 * GIB), 24 * GIB, "twice what the base's store came to hold"),
        (facts(100 * GIB, base=7 * GIB), 15 * GIB, "15 % of the volume"),
        (facts(100 * GIB, free=10 * GIB), 8 * GIB, "80 % of what is free; 16106127360 bytes were wanted"),
        (facts(100 * GIB, free=20 * MIB), SMALLEST_STORE, "80 % of what is free"),
    ],
)
def test_a_store_is_as_large_as_the_largest_guess(given: StoreFacts, size: int, reason: str) -> None:
    plan = plan_store("vg0/data", given, 15.0)
    assert plan.size == size
    assert reason in plan.reason


def test_there_is_room_for_the_smallest_or_none_at_all() -> None:
    with pytest.raises(
        NoRoomForStoreError, match="vg0/data: its volume group has 16777216 bytes free"
    ) as caught:
        plan_store("vg0/data", facts(100 * GIB, free=16 * MIB), 15.0)
    assert caught.value.exit_code == 14
    # What a small volume needs at most is less.
    assert plan_store("vg0/data", facts(2 * MIB, free=8 * MIB), 15.0).size == EXTENT


def test_the_largest_store_has_room_for_each_chunk_and_its_entry() -> None:
    # An area of 256 entries, whether it is full or not, is followed by another.
    assert largest_store(4096) == 3 * 4096
    assert largest_store(256 * 4096) == (1 + 2 + 256) * 4096
    assert largest_store(257 * 4096 - 1) == (1 + 2 + 257) * 4096
