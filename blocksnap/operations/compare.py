"""Does a volume, or a restored target, hold what a backup says?"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from blocksnap.operations.catalogue import map_root
from blocksnap.operations.reporting import Reporter, phase
from blocksnap.pipeline.flow import ChunkResult, Flow, Geometry
from blocksnap.pipeline.protocols import Sealer
from blocksnap.pipeline.selection import Ranges, chunks_of, select_either, subtract
from blocksnap.repository.blockmap import HOLE, ZERO, MapReader
from blocksnap.repository.documents import Backup
from blocksnap.repository.frame import FrameType
from blocksnap.repository.repository import Repository

_NONE = Ranges()


class Naming:
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
    repository: Repository,
    backup: Backup,
    fd: int,
    allocated: Iterable[tuple[int, int]],
    report: Reporter,
    *,
    lost: Ranges = _NONE,
) -> Ranges:
    """Return the chunks in which ``fd`` differs from a backup.

    ``allocated`` are, as (offset, length), the extents of ``fd`` that may hold anything but zeros;
    the rest is not read unless the backup has data there. Holes and zeros are equal. Of the chunks that
    the repository has ``lost`` nothing is said. Raises DamageError for a map that cannot be read elsewhere.
    """
    geometry = Geometry(backup.size, backup.chunk_size)
    reader = MapReader(repository.load_node)
    root = map_root(backup.map)
    stored = (
        (number * geometry.chunk_size, count * geometry.chunk_size)
        for begin, end in subtract([(0, geometry.count)], lost)
        for number, count, entry in reader.runs(root, begin, end)
        if entry not in (HOLE, ZERO)
    )
    either = select_either(chunks_of(geometry, allocated), chunks_of(geometry, stored))
    wanted = Ranges(subtract(either, lost))

    def differing(results: Iterator[ChunkResult]) -> Iterator[tuple[int, int]]:
        for result in results:
            entry = reader.entry(root, result.number)
            report.advance(result.length)
            if result.id != (None if entry in (HOLE, ZERO) else entry):
                yield result.number, result.number + 1

    with (
        phase(report, "comparing", wanted.total_bytes(geometry)),
        Flow(fd, geometry, wanted.extents(geometry), Naming(repository)) as flow,
    ):
        return Ranges(differing(flow.results()))
