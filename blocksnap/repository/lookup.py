"""The index as it is searched: a few tables that cover the segments which the repository lists.

A table may cover segments that are gone, or that another table covers too; such rows are passed over, so
what is found is what the listed segments say, and nothing else. New segments are put into a table of their
own, which is merged with those that are not much larger: so tables stay few, and each row is copied a few
times in all.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol, TypeVar

from blocksnap.backends.errors import ObjectMissingError
from blocksnap.errors import BlocksnapError, StorageError
from blocksnap.repository.cache import LocalCache, scratch_table
from blocksnap.repository.errors import DamagedObjectError, NewerFormatError
from blocksnap.repository.index import Segment
from blocksnap.repository.keys import KeyRing
from blocksnap.repository.merging import Merge
from blocksnap.repository.pack import PackId
from blocksnap.repository.table import Table, TableRow, TornTableError

SMALL_ROWS = 65_536
"""Tables of fewer rows are always merged."""
RATIO = 4
"""A table is merged with what is new unless it has more than so many times its rows."""
_AT_ONCE = 1_000_000
"""Rows of new segments that are merged at a time."""
_PATIENCE = 8
_GONE, _LISTED, _LATE = 0, 1, 2
_PRESENT, _STAYS, _ASIDE = 1, 2, 4
_Result = TypeVar("_Result")


@dataclass(frozen=True, slots=True)
class Location:
    """Where a frame lies."""

    pack: PackId
    offset: int
    length: int
    type: int


class SegmentSource(Protocol):
    """The repository, as the index sees it."""

    def segment_names(self) -> list[str]:
        """List the segments that there are now."""
        ...

    def open_segment(self, name: str) -> Segment:
        """Fetch and check one; raises ObjectMissingError, DamagedObjectError, NewerFormatError."""
        ...

    def salvage(self, listed: Container[PackId]) -> Segment:
        """Make one up of the tables of the packs that no segment lists."""
        ...

    def note(self, err: BlocksnapError) -> None:
        """Remember what could be passed over."""
        ...


@dataclass(frozen=True, slots=True)
class View:
    """A table, and what of it counts: a state for each of its segments and each of its packs."""

    table: Table
    segments: bytearray
    packs: bytearray

    def found(self, row: TableRow) -> bool:
        """Tell whether a row is to be found."""
        state = self.segments[row.segment]
        return state == _LATE or (state == _LISTED and bool(self.packs[row.pack] & _PRESENT))

    def stays(self, row: TableRow) -> bool:
        """Tell whether what a row says will still be so when this run commits."""
        return self.segments[row.segment] == _LISTED and bool(self.packs[row.pack] & _STAYS)

    def is_doubtful(self, row: TableRow) -> bool:
        """Tell whether a repair has set the row's pack aside."""
        return bool(self.packs[row.pack] & _ASIDE)


@dataclass(frozen=True, slots=True)
class _Belief:
    """What a run has learned of the packs: where each is, which ones go, and which segments it knew then."""

    segments: set[str]
    sizes: dict[bytes, int]
    condemned: frozenset[bytes]


class Index:
    """All that the segments of a repository say. Look-ups may come from any thread."""

    def __init__(self, source: SegmentSource, keys: KeyRing, cache: LocalCache | None = None) -> None:
        """Begin with nothing: see ``refresh``. Without a cache tables go with the process."""
        self._source = source
        self._keys = keys
        self._cache = cache
        self._views: tuple[View, ...] | None = None
        self._listed: set[str] = set()
        self._made_up: list[Table] = []
        self._aside: frozenset[bytes] = frozenset()
        self._belief: _Belief | None = None
        self._torn = 0
        self._lock = threading.RLock()

    @property
    def tables(self) -> tuple[Table, ...]:
        """The tables that are searched, the largest first."""
        return tuple(view.table for view in self._views or ())

    @property
    def views(self) -> tuple[View, ...]:
        """What of the tables counts; it does not change any more."""
        return self._views or ()

    def refresh(self) -> None:
        """Look at what the repository lists now, and take in what is new; raises StorageError."""
        with self._lock:
            for _ in range(_PATIENCE):
                try:
                    return self._refresh()
                except ObjectMissingError as err:
                    # Replaced meanwhile, by one that was there before this one went.
                    problem: BlocksnapError = err
                except TornTableError as err:
                    problem = err
                    self._drop_all()
            raise problem

    def add(self, segment: Segment) -> None:
        """Take in a segment that this run has just stored."""
        if self._views is None:
            self.refresh()
        with self._lock:
            self._listed.add(segment.name)
            if self._belief:
                self._belief.segments.add(segment.name)
                self._belief.sizes.update((pack.writer + pack.hash, size) for pack, size in segment.packs)
            merge = Merge(self._keys)
            merge.add_segment(segment)
            try:
                self._settle(self._stored_tables(), merge)
            except TornTableError as err:
                self.distrust(err)

    def pass_over(self, condemned: frozenset[str], sizes: Mapping[str, int]) -> None:
        """Find nothing any more in packs that are missing or have another size.

        What lies in condemned packs alone is still found, since a parent may need it, but is not ``stays``.
        What is in segments that come later is found, too, and is not ``stays`` unless this run adds them.
        """
        with self._lock:
            known = {_key(name): size for name, size in sizes.items()}
            doomed = frozenset(_key(name) for name in condemned)
            self._belief = _Belief(set(self._listed), known, doomed)
            self._look(self.tables)

    def stays(self, id_: bytes) -> bool:
        """Tell whether a blob lies where it will still be when this run commits."""
        return self._search(
            lambda views: any(view.stays(row) for view in views for row in view.table.find(id_))
        )

    def find(self, id_: bytes) -> Location | None:
        """Return where a blob lies, or None."""
        return next(iter(self.find_all(id_)), None)

    def find_all(self, id_: bytes) -> list[Location]:
        """Return every place where a blob lies, the best first."""
        return self._search(partial(_find_all, id_))

    def packs(self) -> dict[PackId, int]:
        """Return the packs that stored segments list, with their sizes.

        Those of segments that are gone may be among them: they are gone too, or about to be.
        """
        return dict(
            table.pack(number) for table in self._stored_tables() for number in range(table.pack_count)
        )

    def reread(self) -> None:
        """Make all tables anew at the next refresh, and keep none.

        For those who ask what the repository itself still has, whatever this host remembers.
        """
        with self._lock:
            self._cache = None
            self._views = ()

    def set_aside(self, packs: Iterable[str]) -> None:
        """Find what lies in these packs last, and rely on it never."""
        aside = frozenset(map(_key, packs))
        if aside != self._aside:
            with self._lock:
                self._aside = aside
                if self._views is not None:
                    self._look(self.tables)

    def replace_made_up(self, segments: Sequence[Segment]) -> None:
        """Put segments that are not stored in the place of those that were there."""
        with self._lock:
            stored = self._stored_tables()
            self._made_up = []
            if segments:
                merge = Merge(self._keys)
                for segment in segments:
                    merge.add_segment(segment)
                self._made_up = [self._scratch(merge)]
            self._look(stored)

    def _search(self, search: Callable[[tuple[View, ...]], _Result]) -> _Result:
        while True:
            views = self._views
            if views is None:
                self.refresh()
                continue
            try:
                return search(views)
            except TornTableError as err:
                with self._lock:
                    if self._views is views:
                        self.distrust(err)

    def distrust(self, err: TornTableError) -> None:
        """A table has turned out to be torn: make all of them again, and keep none.

        Raises the error when that happens again and again.
        """
        with self._lock:
            self._torn += 1
            if self._torn > _PATIENCE:
                raise err
            self._drop_all()
            self.refresh()

    def _drop_all(self) -> None:
        if self._cache:
            self._cache.drop(self._cache.tables())
        # Whatever tore one may tear the next one as well.
        self._cache = None
        self._views = ()

    def _refresh(self) -> None:
        listed = set(self._source.segment_names())
        is_first = self._views is None and self._cache is not None
        tables = self._cache.tables() if is_first and self._cache else self._stored_tables()
        chosen, superfluous = choose_tables(tables, listed)
        covered = {segment.name for table in chosen for segment in table.segments}
        new, is_damaged = self._fetch(sorted(listed - covered))
        self._listed = listed
        self._settle(chosen, new)
        if self._cache:
            self._cache.drop(superfluous)
        if is_damaged and not self._made_up:
            self.replace_made_up([self._source.salvage(self.packs())])

    def _stored_tables(self) -> list[Table]:
        return [table for table in self.tables if table not in self._made_up]

    def _fetch(self, names: Sequence[str]) -> tuple[Merge, bool]:
        """Return new segments, ready to be merged, and whether there were some that cannot be read."""
        is_damaged = False
        merge = Merge(self._keys)
        parts: list[Table] = []
        for name in names:
            try:
                merge.add_segment(self._source.open_segment(name))
            except (DamagedObjectError, NewerFormatError) as err:
                is_damaged = True
                self._source.note(err)
                continue
            if merge.rows >= _AT_ONCE:
                # What was fetched may be held in memory.
                parts.append(self._scratch(merge))
                merge = Merge(self._keys)
        for part in parts:
            merge.add_table(part, {segment.name for segment in part.segments})
        return merge, is_damaged

    def _settle(self, tables: Sequence[Table], new: Merge) -> None:
        """Merge what is new with what is not much larger, and search in the result from now on."""
        fate = choose_merge([(live_rows(table, self._listed), table.rows) for table in tables], new.rows)
        claimed: set[str] = set()
        for table, goes in zip(tables, fate, strict=True):
            wanted = {segment.name for segment in table.segments} & self._listed - claimed
            claimed |= wanted
            if goes:
                new.add_table(table, wanted)
        if new.segments:
            old = [table for table, goes in zip(tables, fate, strict=True) if goes]
            kept = self._cache.keep(new) if self._cache else None
            tables = [*(table for table in tables if table not in old), kept or self._scratch(new)]
            if kept and self._cache:
                self._cache.drop(old)
        self._look(sorted(tables, key=lambda table: -table.rows))

    def _look(self, tables: Sequence[Table]) -> None:
        """Work out what of the tables counts, and search in them from now on."""
        views, claimed = [], set[str]()
        for table in tables:
            if table in self._made_up:
                continue
            segments = bytearray(len(table.segments))
            for number, segment in enumerate(table.segments):
                segments[number] = self._state(segment.name, claimed)
            claimed.update(segment.name for segment in table.segments)
            views.append(View(table, segments, self._pack_states(table)))
        for table in self._made_up:
            everything = bytearray([_LISTED]) * len(table.segments)
            views.append(View(table, everything, self._pack_states(table)))
        self._views = tuple(views)

    def _state(self, name: str, claimed: Container[str]) -> int:
        if name in claimed or name not in self._listed:
            return _GONE
        return _LISTED if self._belief is None or name in self._belief.segments else _LATE

    def _pack_states(self, table: Table) -> bytearray:
        belief, aside = self._belief, self._aside
        states = bytearray([_PRESENT | _STAYS]) * table.pack_count
        if belief is None and not aside:
            return states
        for number in range(table.pack_count):
            pack, size = table.pack(number)
            key = pack.writer + pack.hash
            if belief and belief.sizes.get(key) != size:
                states[number] = 0
            elif belief and key in belief.condemned:
                states[number] = _PRESENT
            if key in aside:
                states[number] = states[number] & _PRESENT | _ASIDE
        return states

    def _scratch(self, merge: Merge) -> Table:
        try:
            return scratch_table(merge, self._keys)
        except OSError as err:
            raise StorageError(
                f"there is no room for the index, {merge.rows} rows: {err.strerror}",
                resolution="make room in TMPDIR, or name another --cache-dir",
            ) from err


def _find_all(id_: bytes, views: Sequence[View]) -> list[Location]:
    good: list[Location] = []
    doubtful: list[Location] = []
    for view in views:
        for row in view.table.find(id_):
            if view.found(row):
                location = Location(view.table.pack(row.pack)[0], row.offset, row.length, row.type)
                (doubtful if view.is_doubtful(row) else good).append(location)
    return good + doubtful


def choose_tables(tables: Sequence[Table], listed: set[str]) -> tuple[list[Table], list[Table]]:
    """Split tables into those that are of use, together, and those that add nothing."""
    chosen: list[Table] = []
    superfluous: list[Table] = []
    covered = set[str]()
    for table in tables:
        adds = {segment.name for segment in table.segments} & listed - covered
        covered |= adds
        (chosen if adds else superfluous).append(table)
    return chosen, superfluous


def live_rows(table: Table, listed: Container[str]) -> int:
    """Return how many rows of a table are of listed segments."""
    return sum(segment.rows for segment in table.segments if segment.name in listed)


def choose_merge(tables: Sequence[tuple[int, int]], new: int) -> list[bool]:
    """Decide which tables, given by their live rows and all their rows, are merged with ``new`` rows: pure.

    Those that are mostly dead, and where there is something to be merged, the smaller ones, as long as
    they are not much larger than what they are merged with.
    """
    chosen = [live * 2 < rows for live, rows in tables]
    total = new + sum(live for (live, _), goes in zip(tables, chosen, strict=True) if goes)
    for number in sorted(range(len(tables)), key=lambda number: tables[number][0]):
        live = tables[number][0]
        if chosen[number]:
            continue
        if not total or live > max(RATIO * total, SMALL_ROWS):
            break
        chosen[number] = True
        total += live
    return chosen


def _key(name: str) -> bytes:
    """Return a pack's writer and hash from the name of its object; nothing for what is no pack."""
    try:
        pack = PackId.parse(name)
    except ValueError:
        return b""
    return pack.writer + pack.hash
