"""The index as a check sees it: read anew from the repository, whatever this host has kept of it."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator

from blocksnap.errors import BlocksnapError
from blocksnap.repository.errors import DamagedObjectError, NewerFormatError
from blocksnap.repository.index import Segment
from blocksnap.repository.lookup import Index
from blocksnap.repository.marking import TRUSTED, UNUSABLE, Marker
from blocksnap.repository.nodes import NodeLoader
from blocksnap.repository.numbered import NumberedIndex
from blocksnap.repository.pack import PackId
from blocksnap.repository.repository import Repository

Trouble = Callable[[str, BlocksnapError], None]


class CheckedIndex:
    """What the segments say, and whether all could be read; where not, the packs' own tables say the rest."""

    def __init__(self, repository: Repository, replaced: Container[str] = ()) -> None:
        """``replaced`` are segments that a repair has set aside."""
        self._repository = repository
        self._replaced = replaced
        self._trouble: Trouble = lambda _name, _err: None
        self._told: set[str] = set()
        self._numbered = NumberedIndex(())

    @property
    def is_whole(self) -> bool:
        """Whether all segments could be read."""
        return not self._told

    def load(self, trouble: Trouble) -> None:
        """Read all segments, and tell of each that cannot be."""
        self._trouble = trouble
        index = Index(self, self._repository.keys)
        index.refresh()
        self._numbered = NumberedIndex(index.views)

    def packs(self) -> Iterator[tuple[PackId, int]]:
        """Yield the packs that are listed, with their sizes."""
        return zip(self._numbered.packs, self._numbered.sizes, strict=True)

    def marker(self, present: Container[str], on_damage: Callable[[bytes, BlocksnapError], None]) -> Marker:
        """Return a marker that believes the rows of the packs that are present."""
        trust = [TRUSTED if pack.name in present else UNUSABLE for pack, _ in self.packs()]
        return Marker(self._numbered, trust, NodeLoader(self._repository), on_damage=on_damage)

    def segment_names(self) -> list[str]:
        """List the segments (lookup.SegmentSource)."""
        listed = self._repository.backend.list("index/")
        return [info.name for info in listed if info.name not in self._replaced]

    def open_segment(self, name: str) -> Segment:
        """Fetch and check one segment."""
        try:
            return self._repository.open_segment(name)
        except (DamagedObjectError, NewerFormatError) as err:
            if name not in self._told:
                self._told.add(name)
                self._trouble(name, err)
            raise

    def salvage(self, listed: Container[PackId]) -> Segment:
        """Make up a segment of what the packs say themselves."""
        return self._repository.salvage(listed)

    def note(self, err: BlocksnapError) -> None:
        """It was told when the segment was opened."""
