"""Which ranges of a backup are known to be lost, and still are."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain, islice

from blocksnap.operations.catalogue import map_root
from blocksnap.pipeline.flow import Geometry
from blocksnap.pipeline.selection import Ranges
from blocksnap.repository.blockmap import MapReader
from blocksnap.repository.documents import Backup
from blocksnap.repository.lookup import Index
from blocksnap.repository.map_losses import NOTHING, MapLosses, Measure, merged
from blocksnap.repository.repository import Repository

_MOST = 50_000
"""Ranges that are held of one backup: a chunk that is lost once may stand in a map millions of times."""


@dataclass(frozen=True, slots=True)
class CurrentLosses:
    """What is lost: ``total`` in figures, and the ``first`` ranges of chunks, which may be all there are.

    Nodes are read for the one and again for the other: of a storage that fails now and then they may differ.
    """

    geometry: Geometry
    total: Measure = NOTHING
    first: Ranges = Ranges()  # noqa: RUF009 - immutable

    @property
    def total_bytes(self) -> int:
        """How many bytes are lost."""
        geometry = self.geometry
        beyond = max(self.total.end * geometry.chunk_size - geometry.size, 0)
        return self.total.chunks * geometry.chunk_size - beyond

    @property
    def left_out(self) -> str:
        """What is to be said of the ranges that are not among the first, if there are any."""
        more = self.total.ranges - len(self.first)
        return f"{more} more ranges, {self.total_bytes} bytes in all" if more > 0 else ""

    def extents(self) -> Iterator[tuple[int, int]]:
        """Yield the first ranges as (offset, length)."""
        return self.first.extents(self.geometry)

    def covering(self) -> Iterator[tuple[int, int]]:
        """Yield extents that all that is lost is in: the first ranges, and what lies behind them as one."""
        if self.total.ranges == len(self.first):
            return self.extents()
        behind = max((end for _, end in self.first), default=self.total.begin)
        return Ranges([*self.first, (behind, self.total.end)]).extents(self.geometry)


class _Gone:
    """The ids of which nothing will stay."""

    def __init__(self, index: Index) -> None:
        self._index = index

    def __contains__(self, id_: object) -> bool:
        return not (isinstance(id_, bytes) and self._index.stays(id_))


def current_losses(repository: Repository, backup: Backup) -> CurrentLosses:
    """Return what repairs have found lost of a backup and nothing has brought back.

    Only the ranges that were written down then are looked at, so it costs little: a check looks at all.
    """
    geometry = Geometry(backup.size, backup.chunk_size)
    if backup.inodes is not None:
        # A parent that lost anything is compared whole, and a check names what is lost.
        return CurrentLosses(geometry)
    root = map_root(backup.map)
    losses = MapLosses(MapReader(repository.load_node), _Gone(repository.index), ())
    known = Ranges(
        geometry.numbers(offset, length) for offset, length, _ in repository.known_losses(backup.id)
    )
    found = NOTHING
    for begin, end in known:
        found = found.joined(losses.measure(root, begin, end))
    ranges = merged(chain.from_iterable(losses.ranges(root, begin, end) for begin, end in known))
    return CurrentLosses(geometry, found, Ranges(islice(ranges, _MOST)))
