"""Prove a backup against the repository's bytes, or against a live volume."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from itertools import islice

from blocksnap.controller.settings import LimitSettings
from blocksnap.errors import BlocksnapError, DamageError
from blocksnap.operations.backup import open_session
from blocksnap.operations.catalogue import map_root
from blocksnap.operations.compare import find_differences
from blocksnap.operations.guarding import guarded
from blocksnap.operations.problems import Problems
from blocksnap.operations.reporting import Reporter, phase
from blocksnap.pipeline.flow import Geometry
from blocksnap.repository.blockmap import MapReader
from blocksnap.repository.documents import Backup
from blocksnap.repository.keys import Right
from blocksnap.repository.repository import Repository
from blocksnap.restore.engine import UnreadableRangeError, verify_chunks
from blocksnap.volumes.base import Volume, as_image

_MOST_TOLD = 1000


class VolumeDiffersError(BlocksnapError):
    """A live volume does not hold what the backup does; it may simply have been written since."""

    def __init__(self, volume: str, offset: int, length: int) -> None:
        self.volume, self.offset, self.length = volume, offset, length
        super().__init__(f"{volume} differs from the backup in bytes {offset} to {offset + length}")


class MoreDifferencesError(BlocksnapError):
    """A live volume differs in more places than anybody wants to read."""

    def __init__(self, volume: str, places: int) -> None:
        self.volume, self.places = volume, places
        super().__init__(f"{volume} differs from the backup in {places} more places")


def verify_repository(repository: Repository, backup: Backup, report: Reporter) -> Sequence[DamageError]:
    """Read every chunk of a backup; return what cannot be read, the first of it. Raises MissingRightError."""
    repository.keys.require(Right.READ)
    if backup.inodes is not None:
        from blocksnap.operations.verify_tree import verify_tree_backup

        return verify_tree_backup(repository, backup, report)
    geometry = Geometry(backup.size, backup.chunk_size)
    problems = Problems()

    def note(begin: int, end: int, err: DamageError) -> None:
        offset, last = begin * geometry.chunk_size, min(end * geometry.chunk_size, geometry.size)
        problems.add(UnreadableRangeError(offset, last - offset, err))

    runs = MapReader(repository.load_node).runs(map_root(backup.map), 0, geometry.count, note)
    with phase(report, f"verifying {backup.volume.name}", backup.size):
        verify_chunks(repository, geometry, runs, report.advance, problems.add)
    return problems.told(_offset)


def _offset(err: DamageError) -> int:
    return err.offset if isinstance(err, UnreadableRangeError) else -1


def verify_volume(
    repository: Repository,
    backup: Backup,
    volume: Volume,
    state_directory: str,
    limits: LimitSettings,
    report: Reporter,
) -> list[BlocksnapError]:
    """Compare a backup with a snapshot that is taken now and removed again; return the ranges that differ.

    Raises MissingRightError before it is taken. It needs no right to read: content is compared by its id.
    """
    repository.keys.require(Right.IDENTIFY)
    if backup.inodes is not None:
        from blocksnap.operations.verify_live_tree import verify_live_tree

        return verify_live_tree(repository, backup, volume, state_directory, limits, report)
    with (
        open_session([volume], secrets.token_hex(16), state_directory, report) as session,
        guarded(session, limits, report),
    ):
        snapshot = as_image(session.snapshots[0])
        changes = snapshot.find_changes(None)
        problems: list[BlocksnapError] = []
        if snapshot.size != backup.size:
            low, high = sorted((snapshot.size, backup.size))
            problems.append(VolumeDiffersError(volume.name, low, high - low))
        if snapshot.size >= backup.size:
            with snapshot.open_reader() as fd:
                allocated = changes.allocated.clip(backup.size).pairs()
                differing = find_differences(repository, backup, fd, allocated, report)
            extents = differing.extents(Geometry(backup.size, backup.chunk_size))
            problems += [VolumeDiffersError(volume.name, *extent) for extent in islice(extents, _MOST_TOLD)]
            if len(differing) > _MOST_TOLD:
                problems.append(MoreDifferencesError(volume.name, len(differing) - _MOST_TOLD))
        snapshot.check()
    return problems
