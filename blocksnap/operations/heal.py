"""Bring lost chunks back from a volume that still holds them.

A lost chunk is known by its id, and the maps tell where in the volume it was. What lies there now is read
from a snapshot, and what has the same id is the lost chunk: it is stored again. So nothing that has changed
since is taken for what was lost, and a key that can only back up is enough. Lost map nodes come back in the
same way, where all that hangs on them is unchanged.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime

from blocksnap.extents.model import ExtentList
from blocksnap.operations.backup import open_session
from blocksnap.operations.catalogue import map_root
from blocksnap.operations.repair import condemned_packs
from blocksnap.operations.reporting import Reporter, phase
from blocksnap.operations.runs import is_gone, this_author
from blocksnap.operations.sink import DataSink
from blocksnap.pipeline.flow import Flow, Geometry
from blocksnap.pipeline.selection import Ranges, chunks_of, select_either
from blocksnap.repository.blockmap import HOLE, ZERO, MapReader, MapWriter
from blocksnap.repository.frame import FrameType
from blocksnap.repository.keys import Right
from blocksnap.repository.losses import LossFinder
from blocksnap.repository.repair_plan import Planner, RepairPlan
from blocksnap.repository.repairing import settle
from blocksnap.repository.repository import Repository
from blocksnap.repository.writer import RepositoryWriter
from blocksnap.volumes.base import Volume, as_image

_ROUNDS = 12
"""Each brings back a level of lost nodes, and maps have at most ten."""
_MOST_RANGES = 50_000
"""Of one backup, that are read one by one."""


@dataclass(frozen=True, slots=True)
class Healed:
    """What came back, and what of the repository is still lost.

    ``waiting`` ids lie in packs that are not set aside: the repair that does that comes first.
    """

    chunks: int
    nodes: int
    read_bytes: int
    waiting: int
    left: RepairPlan


class _LostOnly:
    """Stores lost chunks, and nothing else (pipeline.protocols.ChunkSink)."""

    def __init__(self, writer: RepositoryWriter, lost: Iterable[bytes]) -> None:
        self._sink = DataSink(writer, 1)
        self._lost = set(lost)
        self._lock = threading.Lock()
        self.overhead, self.identify = self._sink.overhead, self._sink.identify
        self.new_sealer = self._sink.new_sealer
        self.stored = 0

    def claim(self, id_: bytes) -> bool:
        """Ask for a lost chunk, once."""
        with self._lock:
            if id_ not in self._lost:
                return False
            self._lost.remove(id_)
            return True

    def store(self, id_: bytes, frame: memoryview, plain_length: int) -> None:
        """Store it."""
        self._sink.store(id_, frame, plain_length)
        self.stored += 1


class _Healer:
    def __init__(self, repository: Repository, writer: RepositoryWriter, report: Reporter) -> None:
        self._repository, self._writer, self._report = repository, writer, report
        self.chunks = self.nodes = self.read_bytes = 0

    def heal(
        self, fd: int, geometry: Geometry, ranges: Ranges, allocated: ExtentList, lost: Iterable[bytes]
    ) -> None:
        """Read these chunks, and store what is lost of them and of the nodes above."""
        missing = set(lost)

        def store(plain: bytes) -> bytes:
            id_ = self._writer.identify(FrameType.NODE, plain)
            if id_ in missing:
                missing.remove(id_)
                self._writer.store_again(FrameType.NODE, id_, plain)
                self.nodes += 1
            return id_

        held = Ranges(chunks_of(geometry, allocated.clip(geometry.size).pairs()))
        builder = MapWriter(MapReader(self._repository.load_node), None, geometry.count, store)
        sink = _LostOnly(self._writer, missing)
        holds = _Membership(held)
        with (
            phase(self._report, "reading what is lost", ranges.total_bytes(geometry)),
            Flow(fd, geometry, ranges.extents(geometry), sink) as flow,
        ):
            for result in flow.results():
                empty = ZERO if holds(result.number) else HOLE
                builder.set(result.number, empty if result.id is None else result.id)
                self.read_bytes += result.length
                self._report.advance(result.length)
        builder.finish()
        self._writer.flush()
        self.chunks += sink.stored


class _Membership:
    """Tells of ascending chunk numbers whether they are in some ranges."""

    def __init__(self, ranges: Ranges) -> None:
        self._ranges = iter(ranges)
        self._current = next(self._ranges, None)

    def __call__(self, number: int) -> bool:
        while self._current is not None and self._current[1] <= number:
            self._current = next(self._ranges, None)
        return self._current is not None and self._current[0] <= number


def heal_from(
    repository: Repository,
    volume: Volume,
    suspects: frozenset[str],
    state_directory: str,
    report: Reporter,
) -> Healed:
    """Read from a snapshot of a volume what the repository has lost, and store what is still the same.

    The lost ranges are those of the volume's own backups; of all, where there are none of it, as for a copy.
    Raises MissingRightError unless the key may back up, VolumeError, BusyError, StorageError.
    """
    repository.keys.require(Right.STORE)
    with RepositoryWriter(repository, this_author(), is_gone) as writer:
        healer = _Healer(repository, writer, report)
        try:
            plan = _look(repository, suspects)
            waiting = _waiting(repository, plan)
            if plan.harmed:
                with open_session([volume], writer.id.hex(), state_directory, report) as session:
                    snapshot = as_image(session.snapshots[0])
                    allocated = snapshot.find_changes(None).allocated
                    for _ in range(_ROUNDS):
                        before = healer.chunks + healer.nodes
                        with snapshot.open_reader() as fd:
                            for geometry, ranges in _targets(repository, plan, volume, snapshot.size):
                                healer.heal(fd, geometry, ranges, allocated, plan.lost - waiting)
                        if healer.chunks + healer.nodes == before:
                            break
                        plan = _look(repository, suspects)
                    snapshot.check()
            settle(repository, writer, datetime.now(UTC))
        finally:
            writer.stop()
    return Healed(healer.chunks, healer.nodes, healer.read_bytes, len(waiting & plan.lost), plan)


def _look(repository: Repository, suspects: frozenset[str]) -> RepairPlan:
    return Planner(repository, map_root, suspects, condemned_packs(repository)).plan()


def _waiting(repository: Repository, plan: RepairPlan) -> frozenset[bytes]:
    """Return what lies in packs that are not set aside.

    A collector could take the harmed one for the good one, and drop what was brought back.
    """
    aside = repository.aside().packs
    there = {info.name for info in repository.backend.list("packs/")} - aside
    return frozenset(
        id_
        for id_ in plan.lost
        if any(location.pack.name in there for location in repository.index.find_all(id_))
    )


def _targets(
    repository: Repository, plan: RepairPlan, volume: Volume, size: int
) -> list[tuple[Geometry, Ranges]]:
    """Return what to read: the lost ranges, by the size of the backups, on which the last chunk depends.

    All of them, and what lies between where there are very many.
    """
    harmed = {each.backup for each in plan.harmed}
    images = [
        stored.backup
        for stored in repository.backups()
        if stored.backup.id in harmed and stored.backup.inodes is None
    ]
    own = [backup for backup in images if backup.volume.key == volume.key]
    finder = LossFinder(repository, map_root, plan.lost)
    by_size: dict[int, Ranges] = {}
    for backup in own or images:
        length = min(backup.size, size)
        geometry = Geometry(length, repository.chunk_size)
        lost = finder.look_closely(backup, _MOST_RANGES)
        extents = ((loss.offset, loss.length) for loss in (lost.at_most(_MOST_RANGES) if lost else ()))
        by_size[length] = select_either(by_size.get(length, Ranges()), chunks_of(geometry, extents))
    return [
        (Geometry(length, repository.chunk_size), ranges)
        for length, ranges in sorted(by_size.items())
        if ranges
    ]
