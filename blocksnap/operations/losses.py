"""Which ranges of a backup are known to be lost, and still are."""

from __future__ import annotations

from blocksnap.errors import DamageError
from blocksnap.operations.catalogue import map_root
from blocksnap.pipeline.flow import Geometry
from blocksnap.pipeline.selection import Ranges
from blocksnap.repository.blockmap import MapReader
from blocksnap.repository.documents import Backup
from blocksnap.repository.repository import Repository

_ID = 32


def current_losses(repository: Repository, backup: Backup) -> list[tuple[int, int]]:
    """Return, as (offset, length), what repairs have found lost of a backup and nothing has brought back.

    Only the ranges that were written down then are looked at, so it costs little: a check looks at all.
    """
    if backup.inodes is not None:
        # A parent that lost anything is compared whole, and a check names what is lost.
        return []
    geometry = Geometry(backup.size, backup.chunk_size)
    reader, root = MapReader(repository.load_node), map_root(backup.map)
    lost: list[tuple[int, int]] = []

    def note(begin: int, end: int, _: DamageError) -> None:
        lost.append((begin, end))

    known = repository.known_losses(backup.id)
    for begin, end in Ranges(geometry.numbers(offset, length) for offset, length, _ in known):
        for number, count, entry in reader.runs(root, begin, end, note):
            if len(entry) == _ID and not repository.index.stays(entry):
                lost.append((number, number + count))
    return list(Ranges(sorted(lost)).extents(geometry))
