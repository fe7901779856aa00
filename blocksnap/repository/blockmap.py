"""Block maps: from chunk number to chunk id, as a position-fixed Merkle radix tree.

Every node has 64 entries. An entry of a leaf (level 0) stands for one chunk, an entry of a node at level
n for 64**n chunks. An entry is a hole (unallocated), a zero (chunks of zeros), or the id of a
chunk or node; a node all of whose entries are holes, or zeros, is never stored: its parent holds
the one byte. Positions are fixed, so an unchanged subtree has the same id in every backup and is stored
once, and the root's id authenticates everything below it (docs/design.md, "Block maps").

Node plaintext: u8 level, u8 1, u16 number of ids, 4 zero bytes; 64 kind bytes (0 hole, 1 zero, 2 id);
the ids, 32 bytes each, in order.
"""

from __future__ import annotations

import struct
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from blocksnap.errors import DamageError
from blocksnap.repository.errors import DamagedObjectError, NewerFormatError

FANOUT = 64
HOLE = b"\x00"
ZERO = b"\x01"
"""Entries that are not ids; an id has 32 bytes."""

Entry = bytes
_HEADER = struct.Struct("<BBHI")
_KIND_ID = 2
_ID = 32
_ALL_IDS = bytes([_KIND_ID]) * FANOUT
_CACHED_NODES = 2048


@dataclass(frozen=True, slots=True)
class MapRoot:
    """A map by its root entry and the number of levels below it (at least one)."""

    levels: int
    entry: Entry

    @property
    def capacity(self) -> int:
        """Number of chunks it has room for."""
        return int(FANOUT**self.levels)


def levels_for(count: int) -> int:
    """Return how many levels a map of ``count`` chunks has."""
    levels = 1
    while FANOUT**levels < count:
        levels += 1
    return levels


def empty_map(count: int) -> MapRoot:
    """Return the map of ``count`` chunks that are all holes."""
    return MapRoot(levels_for(count), HOLE)


def encode_node(level: int, entries: list[Entry]) -> bytes:
    """Return a node's plaintext."""
    packed = b"".join(entries)
    if len(packed) == FANOUT * _ID:
        # Most nodes are full of ids.
        return _HEADER.pack(level, 1, FANOUT, 0) + _ALL_IDS + packed
    kinds = bytes(_KIND_ID if len(entry) == _ID else entry[0] for entry in entries)
    ids = [entry for entry in entries if len(entry) == _ID]
    return _HEADER.pack(level, 1, len(ids), 0) + kinds + b"".join(ids)


def decode_node(plain: bytes | memoryview, *, level: int, where: str) -> list[Entry]:
    """Return a node's 64 entries.

    Raises DamagedObjectError when it is not a node of this level, NewerFormatError for a later version.
    """
    if len(plain) >= 2 and plain[1] > 1:
        raise NewerFormatError(where, f"map nodes of version {plain[1]}")
    if len(plain) < _HEADER.size + FANOUT:
        raise DamagedObjectError(where, "the map node is too short")
    found_level, version, ids, zero = _HEADER.unpack_from(plain)
    kinds = bytes(plain[_HEADER.size : _HEADER.size + FANOUT])
    body = bytes(plain[_HEADER.size + FANOUT :])
    if version != 1 or zero or found_level != level:
        raise DamagedObjectError(where, f"it is not a map node of level {level}")
    if kinds.count(_KIND_ID) != ids or len(body) != ids * _ID or max(kinds) > _KIND_ID:
        raise DamagedObjectError(where, "the map node contradicts itself")
    if kinds == _ALL_IDS:
        return [body[at : at + _ID] for at in range(0, FANOUT * _ID, _ID)]
    entries: list[Entry] = []
    position = 0
    for kind in kinds:
        if kind == _KIND_ID:
            entries.append(body[position : position + _ID])
            position += _ID
        else:
            entries.append(ZERO if kind else HOLE)
    return entries


class MapReader:
    """Reads maps; keeps recently used nodes.

    ``load`` returns a node's plaintext by its id, or raises DamageError.
    """

    def __init__(self, load: Callable[[bytes], bytes | memoryview]) -> None:
        self._load = load
        self._nodes: OrderedDict[bytes, list[Entry]] = OrderedDict()

    def node(self, entry: Entry, level: int) -> list[Entry]:
        """Return the entries below an entry; shared, not to be changed by the caller."""
        if len(entry) != _ID:
            return [entry] * FANOUT
        key = entry + bytes([level])
        found = self._nodes.get(key)
        if found is None:
            found = decode_node(self._load(entry), level=level, where=f"map node {entry.hex()[:16]}")
            self._nodes[key] = found
            if len(self._nodes) > _CACHED_NODES:
                self._nodes.popitem(last=False)
        else:
            self._nodes.move_to_end(key)
        return found

    def entry(self, root: MapRoot, number: int) -> Entry:
        """Return the entry of one chunk; chunks beyond the map's capacity are holes."""
        if number >= root.capacity:
            return HOLE
        entry = root.entry
        for level in range(root.levels - 1, -1, -1):
            if len(entry) != _ID:
                return entry
            entry = self.node(entry, level)[number // FANOUT**level % FANOUT]
        return entry

    def runs(
        self,
        root: MapRoot,
        begin: int,
        end: int,
        on_damage: Callable[[int, int, DamageError], None] | None = None,
    ) -> Iterator[tuple[int, int, Entry]]:
        """Yield ``(number, count, entry)`` covering ``[begin, end)`` in order.

        Chunks come one by one; holes and zeros as long as a subtree, not merged further. What lies below a
        node that cannot be loaded is told to ``on_damage``, as a range of chunks, and comes as zeros.
        """
        if begin < end:
            last = min(end, root.capacity)
            yield from self._runs(root.entry, root.levels, 0, (begin, last), on_damage or _refuse)
            if end > root.capacity:
                first = max(begin, root.capacity)
                yield first, end - first, HOLE

    def _runs(
        self,
        entry: Entry,
        level: int,
        at: int,
        wanted: tuple[int, int],
        on_damage: Callable[[int, int, DamageError], None],
    ) -> Iterator[tuple[int, int, Entry]]:
        span = FANOUT**level
        first, last = max(at, wanted[0]), min(at + span, wanted[1])
        if first >= last:
            return
        if len(entry) != _ID or level == 0:
            yield first, last - first, entry
            return
        try:
            children = self.node(entry, level - 1)
        except DamageError as err:
            on_damage(first, last, err)
            yield first, last - first, ZERO
            return
        below = span // FANOUT
        # Whoever asks for a few chunks at a time asks often: only what is wanted is looked at.
        for slot in range((first - at) // below, -(-(last - at) // below)):
            child, start = children[slot], at + slot * below
            if level > 1 and len(child) == _ID:
                yield from self._runs(child, level - 1, start, wanted, on_damage)
            else:
                begin = max(start, first)
                yield begin, min(start + below, last) - begin, child

    def differences(self, one: MapRoot, other: MapRoot, count: int) -> Iterator[tuple[int, int]]:
        """Yield the ranges of chunks below ``count`` in which two maps differ; holes and zeros are equal.

        Subtrees that both share are not read: it costs what differs.
        """
        levels = max(one.levels, other.levels)
        mine, theirs = (one.entry, one.levels), (other.entry, other.levels)
        yield from self._differences(mine, theirs, levels, 0, count)

    def _differences(
        self, one: tuple[Entry, int], other: tuple[Entry, int], level: int, at: int, end: int
    ) -> Iterator[tuple[int, int]]:
        """Compare what is below two entries, each with the number of levels of the map that it leads to."""
        if at >= end or one == other or (len(one[0]) != _ID and len(other[0]) != _ID):
            return
        if level == 0:
            yield at, at + 1
            return
        span = FANOUT ** (level - 1)
        below = zip(self._below(*one, level), self._below(*other, level), strict=True)
        for slot, (mine, theirs) in enumerate(below):
            yield from self._differences(mine, theirs, level - 1, at + slot * span, end)

    def _below(self, entry: Entry, height: int, level: int) -> list[tuple[Entry, int]]:
        if height < level:
            # The map is lower than the other one: it is the first of many, and all the others are holes.
            return [(entry, height), *[(HOLE, height)] * (FANOUT - 1)]
        return [(child, level - 1) for child in self.node(entry, level - 1)]


def _refuse(_begin: int, _end: int, err: DamageError) -> None:
    raise err


@dataclass(slots=True)
class _OpenNode:
    index: int
    original: Entry
    before: list[Entry]
    entries: list[Entry]


class MapWriter:
    """Builds the map of a new backup from its parent's, in ascending order, in O(depth) memory.

    Only nodes on a changed path are loaded and stored: ``store`` takes a node's plaintext and returns its id.
    """

    def __init__(
        self, reader: MapReader, parent: MapRoot | None, count: int, store: Callable[[bytes], bytes]
    ) -> None:
        self._reader = reader
        self._store = store
        self._count = count
        self._levels = levels_for(count)
        self._open: list[_OpenNode | None] = [None] * self._levels
        self._position = 0
        self.nodes_written = 0
        self._root = HOLE
        self._trim = parent is not None
        if parent:
            self._adopt(parent)

    def set(self, number: int, entry: Entry) -> bool:
        """Set one chunk; tell whether that differs from the parent."""
        self._advance(number, 1)
        node = self._enter(0, number)
        slot = number % FANOUT
        changed = node.before[slot] != entry
        node.entries[slot] = entry
        return changed

    def fill(self, begin: int, end: int, entry: Entry) -> None:
        """Set the chunks ``[begin, end)`` to HOLE or ZERO, whole subtrees at a time."""
        self._advance(begin, end - begin)
        while begin < end:
            level = 0
            while level + 1 < self._levels and begin % FANOUT ** (level + 1) == 0:
                if end - begin < FANOUT ** (level + 1):
                    break
                level += 1
            node = self._enter(level, begin)
            node.entries[begin // FANOUT**level % FANOUT] = entry
            begin += FANOUT**level

    def finish(self) -> MapRoot:
        """Store what is open and return the new root."""
        capacity = FANOUT**self._levels
        if self._trim and self._position <= self._count < capacity:
            # A parent that was longer leaves nothing beyond the new end.
            self.fill(self._count, capacity, HOLE)
        self._close(self._levels)
        return MapRoot(self._levels, self._root)

    def _adopt(self, parent: MapRoot) -> None:
        """Begin with the parent's entries, below more levels or fewer as the volume has grown or shrunk."""
        entry, levels = parent.entry, parent.levels
        while levels > self._levels:
            levels -= 1
            entry = self._reader.node(entry, levels)[0]
        if levels == self._levels or entry == HOLE:
            self._root = entry
            return
        for level in range(levels, self._levels):
            holes = [HOLE] * FANOUT
            self._open[level] = _OpenNode(0, HOLE, holes, list(holes))
            if level == levels:
                self._open[level] = _OpenNode(0, HOLE, holes, [entry, *holes[1:]])

    def _advance(self, number: int, count: int) -> None:
        if number < self._position:
            raise ValueError(f"chunk {number} comes after {self._position}")
        self._position = number + count

    def _enter(self, level: int, number: int) -> _OpenNode:
        """Open the node of ``level`` on the path to a chunk; what is off that path is finished."""
        keep = self._levels
        for above in range(self._levels - 1, level - 1, -1):
            node = self._open[above]
            if node is None or node.index != number // FANOUT ** (above + 1):
                break
            keep = above
        self._close(keep)
        for missing in range(keep - 1, level - 1, -1):
            index = number // FANOUT ** (missing + 1)
            over = self._open[missing + 1] if missing + 1 < self._levels else None
            original = over.entries[index % FANOUT] if over else self._root
            before = self._reader.node(original, missing)
            self._open[missing] = _OpenNode(index, original, before, list(before))
        found = self._open[level]
        if found is None:
            raise ValueError(f"chunk {number} is outside the map")
        return found

    def _close(self, levels: int) -> None:
        """Close the open nodes below ``levels``, lowest first."""
        for level in range(levels):
            node = self._open[level]
            if node is None:
                continue
            self._open[level] = None
            entry = node.original if node.entries == node.before else self._save(level, node.entries)
            if level + 1 < self._levels:
                above = self._open[level + 1]
                if above is None:
                    raise ValueError("a map node is open without the one above it")
                above.entries[node.index % FANOUT] = entry
            else:
                self._root = entry

    def _save(self, level: int, entries: list[Entry]) -> Entry:
        first = entries[0]
        if len(first) != _ID and entries.count(first) == FANOUT:
            return first
        self.nodes_written += 1
        return self._store(encode_node(level, entries))
