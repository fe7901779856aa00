"""Copy frames from one pack to another, as they are: nothing is opened, and no key to the data is needed."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field

from blocksnap.errors import DamageError
from blocksnap.repository.errors import DamagedObjectError, NewerFormatError
from blocksnap.repository.frame import FrameHeader, FrameType
from blocksnap.repository.keys import Right
from blocksnap.repository.marking import Marker
from blocksnap.repository.numbered import NumberedIndex, NumberedRow
from blocksnap.repository.pack import hash_pack
from blocksnap.repository.repository import Repository
from blocksnap.repository.victims import PackUse
from blocksnap.repository.writer import RepositoryWriter


@dataclass(frozen=True, slots=True)
class Moved:
    """Which packs need not stay now, and what kept others from being copied.

    ``precious`` are packs that hold what a damaged one holds too, perhaps unharmed: they have to stay.
    """

    packs: tuple[PackUse, ...]
    problems: tuple[DamageError, ...]
    precious: frozenset[str]


@dataclass(slots=True)
class _Twins:
    """Tells which frames need not be copied, as the same blob stays elsewhere.

    A row is the word of whoever holds a key, and so is the header of a frame: what is relied on was opened.
    Without the key to it every frame that claims a needed id is copied.
    """

    repository: Repository
    index: NumberedIndex
    marker: Marker
    leaving: Collection[int]
    copied: set[bytes] = field(default_factory=set)
    """Of those that have twins, and were opened."""

    def has_other(self, id_: bytes, row: NumberedRow, frame: memoryview) -> bool:
        """Tell whether a proven frame with this id stays, or was copied before."""
        others = [
            each
            for each in self.index.find(id_)
            if (each.pack, each.offset) != (row.pack, row.offset) and self.marker.is_marked(each.number)
        ]
        if not others:
            return False
        kind = FrameType(row.type)
        if kind == FrameType.DATA and not self.repository.keys.may(Right.READ):
            return False
        if id_ in self.copied or any(self._is_proven(id_, kind, other) for other in others):
            return True
        if self._opens(id_, kind, frame):
            self.copied.add(id_)
        return False

    def _is_proven(self, id_: bytes, kind: FrameType, row: NumberedRow) -> bool:
        if row.type != kind or row.pack in self.leaving:
            return False
        frame = memoryview(bytearray(row.length))
        try:
            self.repository.read_range(self.index.packs[row.pack].name, row.offset, frame)
        except DamageError:
            return False
        return self._opens(id_, kind, frame)

    def _opens(self, id_: bytes, kind: FrameType, frame: memoryview) -> bool:
        try:
            self.repository.opener().open(frame, where="frame to copy", kind=kind, id_=id_)
        except (DamageError, NewerFormatError):
            return False
        return True


def copy_needed(
    repository: Repository,
    writer: RepositoryWriter,
    index: NumberedIndex,
    marker: Marker,
    packs: Collection[PackUse],
    advance: Callable[[int], None],
) -> Moved:
    """Copy the marked frames of these packs; they are durable and indexed when this returns.

    A pack whose bytes are not those that its name promises stays as it is.
    """
    wanted = {pack.name: pack for pack in packs}
    rows = {name: array("Q") for name in wanted}
    names = [pack.name for pack in index.packs]
    chosen = {number: rows[name] for number, name in enumerate(names) if name in rows}
    for _, number, pack, _, _, _ in index.entries() if chosen else ():
        if pack in chosen and marker.is_marked(number):
            chosen[pack].append(number)
    twins = _Twins(repository, index, marker, chosen.keys())
    moved, problems, precious = [], [], set[str]()
    for name in sorted(wanted):
        try:
            _copy_pack(twins, writer, name, wanted[name].size, map(index.row, rows[name]), advance)
        except DamageError as err:
            problems.append(err)
            for number in rows[name]:
                id_, _ = index.row(number)
                precious.update(names[twin.pack] for twin in index.find(id_))
            continue
        moved.append(wanted[name])
    writer.flush()
    return Moved(tuple(moved), tuple(problems), frozenset(precious))


def _copy_pack(
    twins: _Twins,
    writer: RepositoryWriter,
    name: str,
    size: int,
    rows: Iterable[tuple[bytes, NumberedRow]],
    advance: Callable[[int], None],
) -> None:
    # A frame that was harmed would get a new, whole pack around it, and a check without keys find nothing.
    read_range = twins.repository.read_range
    if not hash_pack(read_range, name, size):
        raise DamagedObjectError(name, "its bytes do not have the hash in its name")
    for id_, row in sorted(rows, key=lambda found: found[1].offset):
        frame = memoryview(bytearray(row.length))
        read_range(name, row.offset, frame)
        header = FrameHeader.parse(frame, where=f"frame at {row.offset} of {name}")
        if (header.id, header.type, header.frame_length) != (id_, row.type, row.length):
            raise DamagedObjectError(name, f"another frame than the index says lies at {row.offset}")
        if not twins.has_other(id_, row, frame):
            writer.store(FrameType(row.type), id_, frame, header.plain_length)
        advance(row.length)
