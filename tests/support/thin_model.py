"""What the engines for thin pools have to find, as plain sets: the reference that tests compare them with."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

Mappings = Mapping[int, tuple[int, int]]
"""Data block and time of each mapped chunk."""


def changed_by_tree(base: Mappings, device: Mappings) -> set[int]:
    """Return the chunks mapped now, and before not or to another block."""
    return {chunk for chunk, (block, _) in device.items() if chunk not in base or base[chunk][0] != block}


def changed_by_time(device: Mappings, since: int) -> set[int]:
    """Return the chunks mapped since a time of the pool."""
    return {chunk for chunk, (_, time) in device.items() if time >= since}


def discarded(base: Iterable[int], device: Iterable[int]) -> set[int]:
    """Return the chunks mapped before and not now."""
    return set(base) - set(device)


def apply(
    parent: Mapping[int, int], changed: Iterable[int], gone: Iterable[int], read: Mapping[int, int]
) -> dict[int, int]:
    """Bring a parent's content up to date, as a backup does: only what changed is read."""
    return {c: token for c, token in parent.items() if c not in set(gone)} | {c: read[c] for c in changed}
