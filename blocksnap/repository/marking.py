"""Which rows of the index are needed: one bit for each of them, set by a walk over the maps of all backups.

Many backups are walked together, place by place: at each place the nodes that any of them has there are read,
once, and of what they lead to only what differs is looked up. A second bit, one for each type of leaf and
each level, says that a node was entered: then all that is below it was seen as what leads to such leaves. So
the work is that of the nodes and chunks there are, and not of how often they are shared.

Nothing here is proven but nodes and pages: rows, and which map a backup leads to, are the word of whoever
holds a key. So every row of a needed id is marked, as the true one may be any of them; and what was entered
under one type of leaf says nothing about another.

The leaves of a subvolume's map are pages of inode records, and these refer to maps of their own. A page is
entered like a node, and what it refers to is walked right away, so nothing of it waits in memory.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import NoReturn, TypeVar

from blocksnap.errors import BlocksnapError, DamageError
from blocksnap.repository.blockmap import FANOUT, HOLE, Entry, MapRoot, decode_node
from blocksnap.repository.documents import Backup, Root
from blocksnap.repository.errors import NewerFormatError
from blocksnap.repository.frame import FrameType
from blocksnap.repository.inodes import Reference, page_references
from blocksnap.repository.nodes import NodeLoader
from blocksnap.repository.numbered import NumberedIndex, NumberedRow

UNUSABLE, LAST_RESORT, TRUSTED = 0, 1, 2
"""How far the rows of a pack are to be believed."""
TOGETHER = 256
"""Backups that are walked together: each has a stream of nodes of its own, which is read in blocks."""
_ID = 32
_NAMED = 5
_Found = TypeVar("_Found")


class Marker:
    """Marks what backups need, in a numbered index.

    ``trust`` says of every pack whether its rows may be believed: UNUSABLE, LAST_RESORT or TRUSTED. A row of
    the middle sort is ``accepted`` one by one. Of an id that is in no such row, and of a node that cannot be
    read, ``gives_up`` tells whether to go on without. A node that cannot be read is told to ``on_damage``
    instead, if there is one. ``nodes`` counts the nodes and pages that were read, and ``leaves`` what they
    lead to, each once. Ids that are needed as one type, or at one level, and stored as another are
    ``mistaken``: no loss that could be given up, but a map that is wrong. Whoever needs such an id as what it
    is may find it, or have lost it: that is judged apart, whatever comes first.
    """

    def __init__(
        self,
        index: NumberedIndex,
        trust: Sequence[int],
        loader: NodeLoader,
        *,
        accepts: Callable[[NumberedRow, bytes], bool] = lambda _row, _id: True,
        gives_up: Callable[[bytes], bool] = lambda _: False,
        on_damage: Callable[[bytes, BlocksnapError], None] | None = None,
    ) -> None:
        self._index = index
        self._trust = trust
        self._loader = loader
        self._accepts = accepts
        self._gives_up = gives_up
        self._on_damage = on_damage
        self._bits = bytearray(-(-len(index) // 8))
        self._entered: defaultdict[tuple[int, FrameType], bytearray] = defaultdict(
            lambda: bytearray(len(self._bits))
        )
        """By level, too: a node that was entered at its own says nothing of a map that has it at another."""
        self._stuck: set[tuple[bytes, int, FrameType]] = set()
        """Nodes that could not be entered, or have no row, by level and type of leaf."""
        self._names = [pack.name for pack in index.packs]
        self.nodes = 0
        self.leaves = 0
        self.lost: set[bytes] = set()
        """Ids that are in no usable pack, and nowhere as something else than is needed."""
        self.lost_nodes: set[bytes] = set()
        """Those of them that are nodes, which may be readable all the same."""
        self.mistaken: set[bytes] = set()
        """Ids that are stored, but as something else than is needed; needed as what they are, lost or not."""

    def is_marked(self, number: int) -> bool:
        """Tell whether a row is needed."""
        return _has(self._bits, number)

    def mark(self, roots: Iterable[MapRoot], leaf: FrameType) -> None:
        """Mark everything below roots whose leaves lead to blobs of one type; raises DamageError."""
        by_levels: dict[int, dict[Entry, None]] = {}
        for root in roots:
            by_levels.setdefault(root.levels, {})[root.entry] = None
        for levels, entries in sorted(by_levels.items()):
            waiting = list(entries)
            for begin in range(0, len(waiting), TOGETHER):
                self._walk(waiting[begin : begin + TOGETHER], levels - 1, leaf)

    def mark_difference(self, root: MapRoot, base: MapRoot, leaf: FrameType) -> None:
        """Mark what is below a root but not, at the same place, below another of as many levels."""
        if root.levels != base.levels:
            self.mark([root], leaf)
            return
        stack: list[tuple[Entry, Entry, int]] = [(root.entry, base.entry, root.levels - 1)]
        while stack:
            entry, other, level = stack.pop()
            if len(entry) != _ID or entry == other:
                continue
            if level < 0 and leaf == FrameType.INODES:
                self._mark_page_difference(entry, other)
                continue
            entries = self._enter(entry, level, leaf)
            if entries is None:
                continue
            below = self._below_base(other, level)
            stack.extend((mine, its, level - 1) for mine, its in zip(entries, below, strict=True))

    def _mark_page_difference(self, entry: Entry, base: Entry) -> None:
        """Mark a page, and what its records refer to but not those of the same inodes in another."""
        references = self._enter_page(entry)
        known = {(each.slot, each.part): each for each in self._page_of_base(base) if references}
        for each in references:
            other = known.get((each.slot, each.part))
            if other is not None and other.leaf == each.leaf:
                self.mark_difference(each.root, other.root, each.leaf)
            else:
                self._walk([each.root.entry], each.root.levels - 1, each.leaf)

    def _page_of_base(self, entry: Entry) -> list[Reference]:
        if len(entry) != _ID:
            return []
        try:
            return _references(entry, self._load(entry, None, FrameType.INODES))
        except DamageError:
            if not self._gives_up(entry):
                raise
            return []

    def _below_base(self, entry: Entry, level: int) -> list[Entry]:
        if len(entry) != _ID:
            return [entry] * FANOUT
        try:
            return _children(entry, level, self._load(entry, None, FrameType.NODE))
        except DamageError:
            if not self._gives_up(entry):
                raise
            return [HOLE] * FANOUT

    def _walk(self, entries: Iterable[Entry], level: int, leaf: FrameType) -> None:
        stack = [(entries, level)]
        while stack:
            group, level = stack.pop()
            found = [
                below
                for entry in group
                if len(entry) == _ID and (below := self._enter(entry, level, leaf)) is not None
            ]
            slots = (dict.fromkeys(slot) for slot in zip(*found, strict=True))
            if level == 0:
                for slot in slots:
                    for entry in slot:
                        if len(entry) == _ID:
                            self._enter(entry, -1, leaf)
            else:
                stack.extend((slot, level - 1) for slot in reversed(list(slots)))

    def _enter(self, entry: Entry, level: int, leaf: FrameType) -> list[Entry] | None:
        """Mark an entry; return what is below it, if it is a node that was not entered yet.

        What a page of inode records refers to is marked with it.
        """
        if level < 0:
            if leaf != FrameType.INODES:
                self._mark_leaf(entry, leaf)
            for each in self._enter_page(entry) if leaf == FrameType.INODES else ():
                self._walk([each.root.entry], each.root.levels - 1, each.leaf)
            return None
        is_new, row = self._mark_node(entry, FrameType.NODE, level, leaf)
        if not is_new:
            return None
        return self._try(entry, FrameType.NODE, partial(_children, entry, level), (level, leaf, row))

    def _enter_page(self, entry: Entry) -> list[Reference]:
        """Mark a page; return what its records refer to, if it was not entered yet."""
        is_new, row = self._mark_node(entry, FrameType.INODES, -1, FrameType.INODES)
        if not is_new:
            return []
        kind = FrameType.INODES
        return self._try(entry, kind, partial(_references, entry), (-1, kind, row)) or []

    def _mark_leaf(self, entry: Entry, kind: FrameType) -> None:
        rows = self._rows_of(entry, kind)
        if rows:
            self.leaves += self._mark(rows)
        elif entry not in self.lost and not self._is_mistaken(entry, kind) and not self._gives_up(entry):
            self.lost.add(entry)
            self.leaves += 1

    def _mark_node(
        self, entry: Entry, kind: FrameType, level: int, leaf: FrameType
    ) -> tuple[bool, NumberedRow | None]:
        """Mark a node or page; tell whether it has to be entered, and a row that has it."""
        if (entry, level, leaf) in self._stuck:
            return False, None
        rows = self._rows_of(entry, kind)
        if rows:
            self._mark(rows)
            row, entered = rows[0], self._entered[level, leaf]
            if _has(entered, row.number):
                return False, row
            _set(entered, row.number)
            self.nodes += 1
            return True, row
        self._stuck.add((entry, level, leaf))
        if self._is_mistaken(entry, kind):
            return False, None
        if entry not in self.lost:
            if self._gives_up(entry):
                return False, None
            self.lost.add(entry)
            self.lost_nodes.add(entry)
        self.nodes += 1
        return True, None

    def _mark(self, rows: Iterable[NumberedRow]) -> bool:
        """Mark rows of one id, all that it has; tell whether they were not marked yet."""
        is_new = False
        for row in rows:
            if not self.is_marked(row.number):
                is_new = True
                _set(self._bits, row.number)
        return is_new

    def _is_mistaken(self, entry: Entry, kind: FrameType) -> bool:
        """Tell whether an id that has no usable row of a type has some of others."""
        types = {row.type for row in self._index.find(entry) if self._trust[row.pack] != UNUSABLE}
        if not types or kind in types:
            return False
        self.mistaken.add(entry)
        return True

    def _try(
        self,
        entry: Entry,
        kind: FrameType,
        decode: Callable[[bytes], _Found],
        entered: tuple[int, FrameType, NumberedRow | None],
    ) -> _Found | None:
        """Return what a node or page leads to; None where it cannot be read and that is no reason to end."""
        level, leaf, row = entered
        try:
            plain = self._load(entry, row, kind)
            try:
                return decode(plain)
            except DamageError:
                # It is what its id says, and whole: what is wrong is the map that has it here.
                self.mistaken.add(entry)
        except (DamageError, NewerFormatError) as err:
            if self._on_damage:
                self._on_damage(entry, err)
            elif isinstance(err, NewerFormatError) or not self._gives_up(entry):
                raise
        # As something else, at the level where it belongs, it may be whole.
        self._stuck.add((entry, level, leaf))
        if row is not None:
            _clear(self._entered[level, leaf], row.number)
        return None

    def _load(self, entry: Entry, row: NumberedRow | None, kind: FrameType) -> bytes:
        if row is None:
            return self._loader.load_anywhere(entry, kind)
        pack, size = self._names[row.pack], self._index.sizes[row.pack]
        return self._loader.load(entry, pack, size, row.offset, row.length, kind)

    def _rows_of(self, id_: bytes, kind: FrameType) -> list[NumberedRow]:
        """Return the rows of an id that are to be marked: all that are trusted, each place once, or one."""
        found: dict[tuple[int, int, int], NumberedRow] = {}
        last_resort = None
        for row in self._index.find(id_):
            trust = self._trust[row.pack]
            if row.type != kind:
                continue
            if trust == TRUSTED:
                found.setdefault((row.pack, row.offset, row.length), row)
            elif trust == LAST_RESORT and not found and last_resort is None and self._accepts(row, id_):
                last_resort = row
        return list(found.values()) or ([last_resort] if last_resort else [])


def _children(entry: Entry, level: int, plain: bytes) -> list[Entry]:
    return decode_node(plain, level=level, where=f"map node {entry.hex()[:16]}")


def _references(entry: Entry, plain: bytes) -> list[Reference]:
    return page_references(plain, f"inode records {entry.hex()[:16]}")


def _has(bits: bytearray, number: int) -> bool:
    return bool(bits[number >> 3] >> (number & 7) & 1)


def _set(bits: bytearray, number: int) -> None:
    bits[number >> 3] |= 1 << (number & 7)


def _clear(bits: bytearray, number: int) -> None:
    bits[number >> 3] &= ~(1 << (number & 7))


def maps_of(backup: Backup) -> dict[FrameType, Root]:
    """Return all maps of a backup, by what their leaves lead to.

    Whoever marks, checks or copies what a backup needs goes by this.
    """
    maps = {FrameType.DATA if backup.inodes is None else FrameType.INODES: backup.map}
    if backup.mapped is not None:
        maps[FrameType.ATTACHMENT] = backup.mapped.map
    return maps


def mark_backups(marker: Marker, backups: Iterable[Backup], roots: Callable[[Root], MapRoot]) -> None:
    """Mark everything that backups need; raises DamageError."""
    by_leaf: dict[FrameType, list[MapRoot]] = {}
    for backup in backups:
        for leaf, root in maps_of(backup).items():
            by_leaf.setdefault(leaf, []).append(roots(root))
    for leaf, found in sorted(by_leaf.items()):
        marker.mark(found, leaf)


def require_nothing_lost(marker: Marker) -> None:
    """Raise DamageError when something that is needed lies in no pack."""
    if marker.lost:
        raise DamageError(
            f"{len(marker.lost)} chunks or map nodes that backups need are in no pack",
            resolution="nothing was deleted; run: blocksnap check, then: blocksnap repair",
        )


def mistaken_backups(
    backups: Sequence[Backup], new_marker: Callable[[], Marker], roots: Callable[[Root], MapRoot]
) -> Iterator[Backup]:
    """Yield the backups whose maps lead to what is stored as something else.

    They are halved, and halved again where one of them does: a node that all share is read some twenty times
    for one such of a thousand, and not a thousand times.
    """
    waiting = [backups]
    while waiting:
        some = waiting.pop()
        marker = new_marker()
        mark_backups(marker, some, roots)
        if marker.mistaken and len(some) == 1:
            yield some[0]
        elif marker.mistaken:
            half = len(some) // 2
            waiting += [some[half:], some[:half]]


def raise_mistaken(
    backups: Sequence[Backup], new_marker: Callable[[], Marker], roots: Callable[[Root], MapRoot]
) -> NoReturn:
    """Raise DamageError that names the backups whose maps lead to what is stored as something else."""
    wrong = list(mistaken_backups(backups, new_marker, roots))
    names = ", ".join(f"{each.id[:8]} of {each.volume.name}" for each in wrong[:_NAMED])
    raise DamageError(
        f"the maps of {len(wrong)} backups lead to what is stored as something else: {names}",
        resolution="nothing was deleted; no such backup can be restored and no program of ours makes one: "
        "find out who did (blocksnap show), and give it up: blocksnap forget ID",
    )
