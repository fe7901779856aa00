"""Put a guard beside a session: what its snapshots fill, how old they are, the room for what is stored.

Where something stands still until all is read, the guard also ends a reading that has lost that.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from blocksnap.backends.base import Backend
from blocksnap.controller.guard import AgeWatch, Guard, LevelWatch, RoomWatch, Watch
from blocksnap.controller.session import SnapshotSession
from blocksnap.controller.settings import LimitSettings
from blocksnap.operations.reporting import Reporter


def require_room(backend: Backend, limits: LimitSettings) -> None:
    """Raise RepositoryFillingError when there is too little room from the beginning."""
    found = _room(backend, limits)() if limits.repository_free else None
    if found is not None:
        raise found


@contextmanager
def guarded(
    session: SnapshotSession,
    limits: LimitSettings,
    report: Reporter,
    *,
    of_volumes: Mapping[str, LimitSettings] | None = None,
    backend: Backend | None = None,
) -> Iterator[Guard]:
    """Watch while the block runs; raises FillingError, SnapshotTooOldError, RepositoryFillingError.

    ``of_volumes`` has the limits of volumes that have others, by their keys; ``backend`` is where is stored.
    """
    watches: list[Watch] = [
        LevelWatch(snapshot, (of_volumes or {}).get(volume.key, limits))
        for volume, snapshot in zip(session.volumes, session.snapshots, strict=True)
    ]
    if session.is_for_reading:
        watches.append(session.find_standing_failure)
    if limits.snapshot_seconds is not None:
        watches.append(AgeWatch(limits.snapshot_seconds))
    if backend is not None and limits.repository_free:
        watches.append(_room(backend, limits))
    guard = Guard(session.snapshots, watches)
    try:
        with guard:
            yield guard
    finally:
        _tell(guard.warnings, report)


def _room(backend: Backend, limits: LimitSettings) -> RoomWatch:
    return RoomWatch(backend.place, backend.free_bytes, limits.repository_free)


def _tell(warnings: Sequence[str], report: Reporter) -> None:
    for warning in warnings:
        report.warn(warning, resolution="see: blocksnap doctor")
