"""Where a file of a subvolume had data, preallocated room and holes, by its remembered state.

The layout of a state is in docs/design.md, 4.5. Of a hostile or unknown one nothing is believed: then the
file gets its content, and what was a hole is one again wherever a whole chunk was.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Literal, NamedTuple

from blocksnap.repository.compact import read_number

_VERSION = 1
_KINDS: tuple[ExtentKind, ...] = ("inline", "data", "preallocated")
_LARGEST_BLOCK_BITS = 16
ExtentKind = Literal["inline", "data", "preallocated"]


class LaidOut(NamedTuple):
    """An extent of a file, in bytes; between extents there are holes."""

    kind: ExtentKind
    offset: int
    length: int


def read_layout(state: bytes) -> Iterator[LaidOut]:
    """Yield the extents of a file, ascending; no more where the state makes no sense."""
    with contextlib.suppress(ValueError, IndexError):
        yield from _extents(state)


def is_layout(state: bytes) -> bool:
    """Tell whether a state tells all extents of a file."""
    try:
        for _ in _extents(state):
            pass
    except (ValueError, IndexError):
        return False
    return True


def room_of(state: bytes) -> int | None:
    """Return how many bytes the extents of a file have; nothing where a state does not tell all of them."""
    try:
        return sum(extent.length for extent in _extents(state))
    except (ValueError, IndexError):
        return None


def _extents(state: bytes) -> Iterator[LaidOut]:
    if state[0] != _VERSION or state[1] > _LARGEST_BLOCK_BITS:
        raise ValueError("a state of another version")
    block, at, end = 1 << state[1], 2, 0
    while at < len(state):
        kind = state[at] % 4
        gap, at = read_number(state, at + 1)
        length, at = read_number(state, at)
        if kind == 1:
            # Generation, address, length on disk, offset in the extent: of the filesystem it came from.
            for _ in range(4):
                _, at = read_number(state, at)
        begin = end + gap
        end = begin + length
        if not length or end * block >= 1 << 63:
            raise ValueError("an extent that cannot be")
        yield LaidOut(_KINDS[kind], begin * block, length * block)
