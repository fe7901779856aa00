"""How much below the roots of maps is lost, and where.

A node may stand in any number of places, in many maps and in one. What is lost below it is reckoned once and
remembered by its id, so the work is that of the nodes there are, and not of the chunks that the maps have
room for. Ranges come in order, merged, as many as are asked for.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator
from dataclasses import dataclass

from blocksnap.errors import DamageError
from blocksnap.repository.blockmap import FANOUT, Entry, MapReader, MapRoot
from blocksnap.repository.errors import NewerFormatError

_ID = 32


@dataclass(frozen=True, slots=True)
class Measure:
    """How many chunks are lost, in how many ranges, and the first of them and the end of the last."""

    chunks: int = 0
    ranges: int = 0
    begin: int = 0
    end: int = 0

    def joined(self, other: Measure) -> Measure:
        """Return this and what comes behind it as one."""
        if not (self.chunks and other.chunks):
            return self if self.chunks else other
        ranges = self.ranges + other.ranges - (self.end == other.begin)
        return Measure(self.chunks + other.chunks, ranges, self.begin, other.end)

    def shifted(self, by: int) -> Measure:
        """Return the same in another place."""
        return Measure(self.chunks, self.ranges, self.begin + by, self.end + by) if self.chunks else self


NOTHING = Measure()


class MapLosses:
    """Finds the ``chunks`` that are lost, and what is below ``nodes`` that are, or that cannot be read.

    Of what a later version wrote nothing is known to be lost.
    """

    def __init__(self, reader: MapReader, chunks: Container[bytes], nodes: Container[bytes]) -> None:
        self._reader = reader
        self._chunks = chunks
        self._nodes = nodes
        self._known: dict[int, dict[Entry, Measure]] = {}
        """Of inner nodes, by level, as if each began at 0. The lowest ones are read once for each above."""

    def measure(self, root: MapRoot, begin: int, end: int) -> Measure:
        """Return how much of the chunks ``[begin, end)`` of a map is lost."""
        return self._measure(root.entry, root.levels, 0, (begin, end))

    def ranges(self, root: MapRoot, begin: int, end: int) -> Iterator[tuple[int, int]]:
        """Yield the ranges of chunks that are lost of ``[begin, end)``."""
        return merged(self._ranges(root.entry, root.levels, 0, (begin, end)))

    def _measure(self, entry: Entry, level: int, at: int, wanted: tuple[int, int]) -> Measure:
        span = FANOUT**level
        first, last = max(at, wanted[0]), min(at + span, wanted[1])
        if first >= last or len(entry) != _ID:
            return NOTHING
        known = self._known.setdefault(level, {}) if level > 1 and last - first == span else None
        if known is not None and (found := known.get(entry)) is not None:
            return found.shifted(at)
        found = NOTHING
        for child, begin, end in self._below(entry, level, at, (first, last)):
            if child is None:
                found = found.joined(Measure(end - begin, 1, begin, end))
            else:
                found = found.joined(self._measure(child, level - 1, begin, wanted))
        if known is not None:
            known[entry] = found.shifted(-at)
        return found

    def _ranges(
        self, entry: Entry, level: int, at: int, wanted: tuple[int, int]
    ) -> Iterator[tuple[int, int]]:
        found = self._measure(entry, level, at, wanted)
        if found.ranges < 2:
            if found.chunks:
                yield found.begin, found.end
            return
        for child, begin, end in self._below(entry, level, at, wanted):
            if child is None:
                yield begin, end
            else:
                yield from self._ranges(child, level - 1, begin, wanted)

    def _below(
        self, entry: Entry, level: int, at: int, wanted: tuple[int, int]
    ) -> Iterator[tuple[Entry | None, int, int]]:
        """Yield what has to be looked at below an entry, in order; no entry for what is lost."""
        span = FANOUT**level
        first, last = max(at, wanted[0]), min(at + span, wanted[1])
        if entry in (self._nodes if level else self._chunks):
            yield None, first, last
            return
        if not level:
            return
        try:
            children = self._reader.node(entry, level - 1)
        except DamageError:
            yield None, first, last
            return
        except NewerFormatError:
            return
        below, lost = span // FANOUT, self._chunks
        for slot in range((first - at) // below, -(-(last - at) // below)):
            child, begin = children[slot], at + slot * below
            if len(child) != _ID:
                continue
            if level > 1:
                yield child, begin, begin + below
            elif child in lost:
                yield None, begin, begin + 1


def merged(ranges: Iterable[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """Join ranges that touch; they come in order."""
    begin = end = -1
    for first, last in ranges:
        if first != end:
            if end > begin:
                yield begin, end
            begin = first
        end = last
    if end > begin:
        yield begin, end
