"""Which rows of the index are needed: one bit for each of them, set by a walk over the maps of all backups.

Many backups are walked together, place by place: at each place the nodes that any of them has there are read,
once, and of what they lead to only what differs is looked up. A node whose bit is set has been seen with all
that is below it. So the work is that of the nodes and chunks there are, and not of how often they are shared.

The leaves of a subvolume's map are pages of inode records, and these refer to maps of their own. A page is
entered like a node, and what it refers to is walked right away, so nothing of it waits in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

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
_Found = TypeVar("_Found")


class Marker:
    """Marks what backups need, in a numbered index.

    ``trust`` says of every pack whether its rows may be believed: UNUSABLE, LAST_RESORT or TRUSTED. A row of
    the middle sort is ``accepted`` one by one. Of an id that is in no such row, and of a node that cannot be
    read, ``gives_up`` tells whether to go on without. A node that cannot be read is told to ``on_damage``
    instead, if there is one. ``nodes`` counts the nodes and pages that were read, and ``leaves`` what they
    lead to, each once.
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
        self._names = [pack.name for pack in index.packs]
        self.nodes = 0
        self.leaves = 0
        self.lost: set[bytes] = set()
        """Ids that are needed and in no usable pack."""
        self.lost_nodes: set[bytes] = set()
        """Those of them that are nodes, which may be readable all the same."""

    def is_marked(self, number: int) -> bool:
        """Tell whether a row is needed."""
        return bool(self._bits[number // 8] >> number % 8 & 1)

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
            return self._decode_page(entry, None)
        except DamageError:
            if not self._gives_up(entry):
                raise
            return []

    def _below_base(self, entry: Entry, level: int) -> list[Entry]:
        if len(entry) != _ID:
            return [entry] * FANOUT
        try:
            return self._decode(entry, level, None)
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
                self._mark_id(entry, leaf, leads_on=False)
            for each in self._enter_page(entry) if leaf == FrameType.INODES else ():
                self._walk([each.root.entry], each.root.levels - 1, each.leaf)
            return None
        is_new, row = self._mark_id(entry, FrameType.NODE, leads_on=True)
        if not is_new:
            return None
        self.nodes += 1
        return self._try(entry, lambda: self._decode(entry, level, row))

    def _enter_page(self, entry: Entry) -> list[Reference]:
        """Mark a page; return what its records refer to, if it was not entered yet."""
        is_new, row = self._mark_id(entry, FrameType.INODES, leads_on=True)
        if not is_new:
            return []
        self.nodes += 1
        return self._try(entry, lambda: self._decode_page(entry, row)) or []

    def _mark_id(self, entry: Entry, kind: FrameType, *, leads_on: bool) -> tuple[bool, NumberedRow | None]:
        """Mark an id; tell whether it was not marked yet, and the row that has it."""
        row = self._best(entry, kind)
        if row is None:
            if entry in self.lost or self._gives_up(entry):
                return False, None
            self.lost.add(entry)
            if leads_on:
                self.lost_nodes.add(entry)
        elif self.is_marked(row.number):
            return False, row
        else:
            self._bits[row.number // 8] |= 1 << row.number % 8
        if not leads_on:
            self.leaves += 1
        return True, row

    def _try(self, entry: Entry, decode: Callable[[], _Found]) -> _Found | None:
        """Return what a node or page leads to; None where it cannot be read and that is no reason to end."""
        try:
            return decode()
        except (DamageError, NewerFormatError) as err:
            if self._on_damage:
                self._on_damage(entry, err)
            elif isinstance(err, NewerFormatError) or not self._gives_up(entry):
                raise
            return None

    def _decode(self, entry: Entry, level: int, row: NumberedRow | None) -> list[Entry]:
        """Return what is below a node; one that is in no usable pack may be in another."""
        plain = self._load(entry, row, FrameType.NODE)
        return decode_node(plain, level=level, where=f"map node {entry.hex()[:16]}")

    def _decode_page(self, entry: Entry, row: NumberedRow | None) -> list[Reference]:
        plain = self._load(entry, row, FrameType.INODES)
        return page_references(plain, f"inode records {entry.hex()[:16]}")

    def _load(self, entry: Entry, row: NumberedRow | None, kind: FrameType) -> bytes:
        if row is None:
            return self._loader.load_anywhere(entry, kind)
        pack, size = self._names[row.pack], self._index.sizes[row.pack]
        return self._loader.load(entry, pack, size, row.offset, row.length, kind)

    def _best(self, id_: bytes, kind: FrameType) -> NumberedRow | None:
        """Return the row of an id that is to be marked."""
        last_resort = None
        for row in self._index.find(id_):
            trust = self._trust[row.pack]
            if row.type != kind:
                continue
            if trust == TRUSTED:
                return row
            if trust == LAST_RESORT and last_resort is None and self._accepts(row, id_):
                last_resort = row
        return last_resort


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
