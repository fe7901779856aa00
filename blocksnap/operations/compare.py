"""Does a volume, or a restored target, hold what a backup says?"""

from __future__ import annotations

from collections.abc import Iterable

from blocksnap.operations.catalogue import map_root
from blocksnap.operations.reporting import Reporter
from blocksnap.pipeline.flow import Flow, Geometry
from blocksnap.pipeline.protocols import Sealer
from blocksnap.pipeline.selection import select_all
from blocksnap.repository.blockmap import HOLE, ZERO, MapReader
from blocksnap.repository.documents import Backup
from blocksnap.repository.frame import FrameType
from blocksnap.repository.repository import Repository


class _Naming:
    """A sink that names chunks and stores none."""

    overhead = 0

    def __init__(self, repository: Repository) -> None:
        self._keys = repository.keys

    def identify(self, plain: memoryview) -> bytes:
        """Return a chunk's id."""
        return self._keys.identify(FrameType.DATA, plain)

    def claim(self, _: bytes) -> bool:
        """Never ask for a chunk."""
        return False

    def new_sealer(self) -> Sealer:
        """Seal nothing."""
        return _NoSealer()

    def store(self, id_: bytes, frame: memoryview, plain_length: int) -> None:
        """Take nothing."""


class _NoSealer:
    def seal_into(self, id_: bytes, plain: memoryview, out: memoryview) -> int:  # noqa: ARG002 - protocol
        """Seal nothing."""
        return 0


def find_differences(
    repository: Repository, backup: Backup, fd: int, allocated: Iterable[tuple[int, int]], report: Reporter
) -> list[tuple[int, int]]:
    """Return the extents, as (offset, length) in whole chunks, in which ``fd`` differs from a backup.

    ``allocated`` are the extents of ``fd`` that may hold anything but zeros; the rest is not read
    unless the backup has data there. Holes and zeros are equal.
    """
    geometry = Geometry(backup.size, backup.chunk_size)
    reader = MapReader(repository.load_node)
    root = map_root(backup.map)
    stored = (
        (number * geometry.chunk_size, count * geometry.chunk_size)
        for number, count, entry in reader.runs(root, 0, geometry.count)
        if entry not in (HOLE, ZERO)
    )
    mine = select_all(geometry, allocated).read
    theirs = select_all(geometry, stored).read
    wanted = _merge(mine, theirs)
    differing: list[tuple[int, int]] = []
    extents = [
        (
            begin * geometry.chunk_size,
            min(end * geometry.chunk_size, geometry.size) - begin * geometry.chunk_size,
        )
        for begin, end in wanted
    ]
    report.begin("comparing", sum(length for _, length in extents))
    with Flow(fd, geometry, extents, _Naming(repository)) as flow:
        for result in flow.results():
            entry = reader.entry(root, result.number)
            expected = None if entry in (HOLE, ZERO) else entry
            report.advance(result.length)
            if result.id != expected:
                offset = result.number * geometry.chunk_size
                if differing and sum(differing[-1]) == offset:
                    differing[-1] = (differing[-1][0], differing[-1][1] + result.length)
                else:
                    differing.append((offset, result.length))
    report.end()
    return differing


def _merge(one: Iterable[tuple[int, int]], other: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    merged: list[tuple[int, int]] = []
    for begin, end in sorted([*one, *other]):
        if merged and begin <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(merged[-1][1], end))
        else:
            merged.append((begin, end))
    return merged
