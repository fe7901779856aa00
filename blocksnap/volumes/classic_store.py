"""How large the exception store of a classic snapshot is made, and how full it is.

A store that is too small makes the snapshot worthless, and one that is too large takes space which the
volume group may need; nothing but a guess at what will be written can tell. So the size is the largest of
three guesses, and the guard watches the store while the snapshot is read: a share of the volume, twice what
was observed to be written in the time that reading takes, and, where a base was kept, twice what its own
store holds, since the next one has to last as long.
"""

from __future__ import annotations

from dataclasses import dataclass

from blocksnap.volumes.errors import NoRoomForStoreError

SMALLEST_STORE = 16 << 20
_READ_RATE = 50 << 20
"""Bytes a second, at the slowest that a backup is expected to read."""
_MARGIN = 2
_FREE_SHARE = 0.8
"""Of what is free in the volume group: the rest is left to whoever has to extend something meanwhile."""
_ENTRY_BYTES = 16
_SMALLEST_CHUNK = 4096


@dataclass(frozen=True, slots=True)
class StoreFacts:
    """What the size of a store is decided by; sizes in bytes, ``write_rate`` in bytes a second.

    ``base_used`` is what the store of a base that was kept until now holds, None where none was.
    """

    volume_size: int
    free: int
    extent_size: int
    write_rate: float
    base_used: int | None


@dataclass(frozen=True, slots=True)
class StoreSize:
    """How large a store is made, and why."""

    size: int
    reason: str


def plan_store(name: str, facts: StoreFacts, percent: float) -> StoreSize:
    """Decide how large the store of a snapshot of a volume is made; ``percent`` is of the volume.

    A multiple of the group's extents. Raises NoRoomForStoreError when there is not even room for a small one.
    """
    whole = _round_up(largest_store(facts.volume_size), facts.extent_size)
    expected = facts.write_rate * facts.volume_size / _READ_RATE
    guesses = [
        (SMALLEST_STORE, "the least that is taken"),
        (int(facts.volume_size * percent / 100), f"{percent:g} % of the volume"),
        (
            int(expected * _MARGIN),
            f"twice what is written while it is read, {facts.write_rate:.0f} bytes a second as observed",
        ),
    ]
    if facts.base_used is not None:
        guesses.append((facts.base_used * _MARGIN, "twice what the base's store came to hold"))
    wanted, reason = max(guesses)
    size = _round_up(wanted, facts.extent_size)
    if size >= whole:
        size, reason = whole, "as large as the volume: it cannot overflow"
    room = int(facts.free * _FREE_SHARE) // facts.extent_size * facts.extent_size
    if size <= room:
        return StoreSize(size, reason)
    least = min(_round_up(SMALLEST_STORE, facts.extent_size), whole)
    if room < least:
        raise NoRoomForStoreError(name, facts.free, least)
    short = f"{100 * _FREE_SHARE:g} % of what is free; {size} bytes were wanted: {reason}"
    return StoreSize(room, short)


def largest_store(volume_size: int) -> int:
    """Return what a store needs that has room for every chunk of a volume, at LVM's smallest chunk size.

    A header, and for each chunk its content and an entry of 16 bytes in areas of a chunk.
    """
    chunks = -(-volume_size // _SMALLEST_CHUNK)
    areas = chunks * _ENTRY_BYTES // _SMALLEST_CHUNK + 1
    return (1 + areas + chunks) * _SMALLEST_CHUNK


def _round_up(size: int, unit: int) -> int:
    return -(-size // unit) * unit
