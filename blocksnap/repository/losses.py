"""Which parts of backups something that is lost takes with it."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Iterator

from blocksnap.repository.blockmap import MapReader, MapRoot
from blocksnap.repository.documents import Backup, Root
from blocksnap.repository.findings import Loss
from blocksnap.repository.frame import FrameType
from blocksnap.repository.inode_losses import InodeLosses
from blocksnap.repository.repository import Repository


class LossFinder:
    """Finds what of backups is below ``lost`` ids; what is shared and whole is looked at once."""

    def __init__(
        self, repository: Repository, roots: Callable[[Root], MapRoot], lost: Container[bytes]
    ) -> None:
        self._roots = roots
        self._lost = lost
        self._reader = MapReader(repository.load_node)
        self._clean: set[bytes] = set()
        self._inodes = InodeLosses(self._reader, lambda id_: repository.load(FrameType.INODES, id_), lost)

    def find(self, backup: Backup) -> Iterator[Loss]:
        """Yield what cannot be restored of a backup, in order."""
        root, size, name = self._roots(backup.map), backup.chunk_size, backup.volume.name
        if backup.inodes is not None:
            for inode, offset, length in self._inodes.find(root, backup.inodes.pages, size):
                yield Loss(backup.id, name, offset, length, inode)
            return
        count = -(-backup.size // size)
        for begin, end in merged(self._reader.losses(root, count, self._lost, self._clean)):
            offset, last = begin * size, min(end * size, backup.size)
            yield Loss(backup.id, name, offset, last - offset)


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
