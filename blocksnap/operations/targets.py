"""A target is finished, proven if asked for, and never left without a word of what became of it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from blocksnap.errors import DamageError
from blocksnap.operations.catalogue import map_root
from blocksnap.operations.compare import find_differences
from blocksnap.operations.reporting import Reporter
from blocksnap.pipeline.flow import Geometry
from blocksnap.pipeline.selection import Ranges
from blocksnap.repository.blockmap import Entry, MapReader
from blocksnap.repository.documents import Backup
from blocksnap.repository.repository import Repository
from blocksnap.restore.engine import Losses, UnreadableRangeError
from blocksnap.restore.targets import LastingTarget, Target, may_go_on


class RestoreDiffersError(DamageError):
    """What was written reads back differently."""

    def __init__(self, target: str, offset: int, length: int, total_bytes: int) -> None:
        self.target = target
        self.offset, self.length, self.total_bytes = offset, length, total_bytes
        super().__init__(
            f"{target} does not hold what was written: {total_bytes} bytes differ, "
            f"the first at {offset} to {offset + length}",
            resolution="do not use this target; look for I/O errors in the kernel log (dmesg)",
        )


def read_runs(
    reader: MapReader, backup: Backup, losses: Losses | None, begin: int, end: int
) -> Iterator[tuple[int, int, Entry]]:
    """Return the runs of a map; what cannot be read of the map is lost, or an UnreadableRangeError."""

    def refuse(first: int, last: int, err: DamageError) -> None:
        offset = first * backup.chunk_size
        raise UnreadableRangeError(offset, min(last * backup.chunk_size, backup.size) - offset, err) from err

    return reader.runs(map_root(backup.map), begin, end, losses.note if losses else refuse)


@contextmanager
def complete(target: LastingTarget, report: Reporter) -> Iterator[Target]:
    """Finish a target, or tell what became of it."""
    try:
        yield target
        target.finish()
    except BaseException as err:
        what_stays = target.what_stays
        if target.close(keep=may_go_on(err)):
            report.warn(
                f"{target.name} {what_stays}",
                resolution="the same command, run again, goes on with it",
            )
        raise
    target.close()


def verify_target(
    repository: Repository, backup: Backup, target: Target, report: Reporter, lost: Ranges
) -> None:
    """Read back what was written, but for what the repository has lost; raises RestoreDiffersError."""
    everything = [(0, backup.size)]
    differing = find_differences(repository, backup, target.reader(), everything, report, lost=lost)
    if differing:
        geometry = Geometry(backup.size, backup.chunk_size)
        offset, length = next(differing.extents(geometry))
        raise RestoreDiffersError(target.name, offset, length, differing.total_bytes(geometry))
