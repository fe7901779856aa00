"""Which parts of backups something that is lost takes with it."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator
from itertools import islice

from blocksnap.repository.blockmap import MapReader, MapRoot
from blocksnap.repository.documents import Backup, Root
from blocksnap.repository.findings import BackupLosses, Loss
from blocksnap.repository.frame import FrameType
from blocksnap.repository.inode_losses import InodeLosses
from blocksnap.repository.map_losses import MapLosses
from blocksnap.repository.repository import Repository

MOST_LISTED = 10_000
_MOST_IN_ALL = 100_000
"""Ranges that are held and told: of one backup, and of all; one of each that has any."""


class LossFinder:
    """Finds what of backups is below ``lost`` ids, or cannot be read; what is shared is looked at once.

    However often a lost chunk stands in maps, memory holds no more ranges of it than are listed.
    """

    def __init__(
        self, repository: Repository, roots: Callable[[Root], MapRoot], lost: Container[bytes]
    ) -> None:
        self._repository = repository
        self._roots = roots
        self._lost = lost
        self._maps = MapLosses(MapReader(repository.load_node), lost, lost)
        self._inodes: InodeLosses | None = None
        self._left = _MOST_IN_ALL

    def look_at(self, backup: Backup) -> BackupLosses | None:
        """Return what cannot be restored of a backup, with as many ranges as are still to be told."""
        found = self.look_closely(backup, max(min(MOST_LISTED, self._left), 1))
        self._left -= len(found.first) if found else 0
        return found

    def look_closely(self, backup: Backup, most: int) -> BackupLosses | None:
        """Return what cannot be restored of a backup, with its first ranges; None where nothing is lost."""
        ranges, size, end = self._measure(backup)
        if not ranges:
            return None
        first = tuple(islice(self._find(backup), most))
        return BackupLosses(backup.id, backup.volume.name, ranges, size, end, first)

    def is_touched(self, backup: Backup) -> bool:
        """Tell whether anything of a backup is lost, or of what it says of its source."""
        return self._measure(backup)[0] > 0 or self.has_lost_mapped(backup)

    def has_lost_mapped(self, backup: Backup) -> bool:
        """Tell whether anything is lost of a backup's set of mapped chunks."""
        if backup.mapped is None:
            return False
        root = self._roots(backup.mapped.map)
        return self._maps.measure(root, 0, root.capacity).chunks > 0

    def _measure(self, backup: Backup) -> tuple[int, int, int]:
        """Return how many ranges are lost, their bytes, and, of an image, where the last one ends."""
        root, size = self._roots(backup.map), backup.chunk_size
        if backup.inodes is not None:
            return (*self._inodes_in(size).measure(root, backup.inodes.pages), 0)
        count = -(-backup.size // size)
        found = self._maps.measure(root, 0, count)
        end = min(found.end * size, backup.size)
        return found.ranges, found.chunks * size - (found.end * size - end), end

    def _find(self, backup: Backup) -> Iterator[Loss]:
        root, size, name = self._roots(backup.map), backup.chunk_size, backup.volume.name
        if backup.inodes is not None:
            for inode, offset, length in self._inodes_in(size).find(root, backup.inodes.pages):
                yield Loss(backup.id, name, offset, length, inode)
            return
        for begin, end in self._maps.ranges(root, 0, -(-backup.size // size)):
            offset, last = begin * size, min(end * size, backup.size)
            yield Loss(backup.id, name, offset, last - offset)

    def _inodes_in(self, chunk_size: int) -> InodeLosses:
        """What is remembered of pages holds for one size of chunks: nearly always there is only one."""
        if self._inodes is None or self._inodes.chunk_size != chunk_size:
            load = self._repository.load
            self._inodes = InodeLosses(
                MapReader(self._repository.load_node),
                lambda id_: load(FrameType.INODES, id_),
                self._lost,
                chunk_size,
            )
        return self._inodes
