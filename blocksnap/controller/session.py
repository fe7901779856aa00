"""The snapshots of one run: locked, announced, taken at one instant, and removed whatever happens."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from blocksnap.controller.history import History
from blocksnap.controller.journal import Journal, Step
from blocksnap.controller.lock import VolumeLocks
from blocksnap.controller.recover import recover, remove_trace
from blocksnap.errors import BlocksnapError, UsageError
from blocksnap.extents.changes import BasePolicy
from blocksnap.volumes.base import Snapshot, Volume


class SnapshotSession:
    """A context in which every volume of a run has a snapshot.

    Entering takes the locks, removes what dead runs left of these volumes (``recovered``), writes down what
    is about to be made, and takes all snapshots back to back. Leaving, by whatever exception, removes them
    all and goes on past errors; one that stays is reported in ``warnings`` and left to the next run
    by the journal.
    """

    def __init__(self, volumes: Sequence[Volume], run: str, state_directory: str | Path) -> None:
        keys = [volume.key for volume in volumes]
        twice = {volume.name for volume in volumes if keys.count(volume.key) > 1}
        if twice:
            raise UsageError(
                f"{', '.join(sorted(twice))} is named twice", resolution="name every volume once"
            )
        self.volumes = tuple(volumes)
        self.run = run
        self.recovered: list[str] = []
        self.warnings: list[str] = []
        self._state_directory = state_directory
        self._taken: list[tuple[Volume, Snapshot]] = []
        self._locks = VolumeLocks(state_directory, [(volume.key, volume.name) for volume in volumes], run)
        self._journal: Journal | None = None
        self._in_doubt: Volume | None = None

    @property
    def snapshots(self) -> tuple[Snapshot, ...]:
        """The snapshots, in the order of the volumes."""
        return tuple(snapshot for _, snapshot in self._taken)

    @property
    def skew_seconds(self) -> float:
        """How far apart the first and the last snapshot are."""
        times = [snapshot.timing.taken_at for snapshot in self.snapshots]
        return max(times) - min(times) if times else 0.0

    def __enter__(self) -> Self:
        """Take the snapshots; raises BusyError, VolumeError, and leaves nothing behind then."""
        self._locks.__enter__()
        try:
            self._recover()
            self._journal = Journal(self._state_directory, self.run)
            self._take_all(self._journal)
        except BaseException:
            self._leave()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, err: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._leave()

    def committing(self) -> None:
        """Call right before the commit: write the run down, so that the backup can be a parent.

        Where that fails the backup is taken nevertheless; the next one reads the whole volume.
        """
        if self._journal:
            self._journal.append("commit")
        for volume in self.volumes:
            try:
                History(self._state_directory, volume.key).add(self.run)
            except OSError as err:
                self.warnings.append(
                    f"the run cannot be written down ({err.strerror}): the next backup of {volume.name} "
                    "reads all of it"
                )

    def settle(self, policy: BasePolicy) -> None:
        """Call right after the commit: leave the snapshots as bases of the next backup, where that is wanted.

        What fails is a warning: the next backup then does without a base.
        """
        if self._journal:
            self._journal.append("rotate", policy=policy)
        for volume, snapshot in self._taken:
            try:
                snapshot.settle(policy)
            except BlocksnapError as err:
                self.warnings.append(
                    f"the base snapshots of {volume.name} were not brought up to date: {err}"
                )

    def remembers(self, volume: Volume, run: str) -> bool:
        """Tell whether this host has written a run of this volume down."""
        return History(self._state_directory, volume.key).knows(run)

    def _recover(self) -> None:
        keys = [volume.key for volume in self.volumes]
        found = recover(
            self._state_directory, keys, lvm_involved=any(volume.kind == "thin" for volume in self.volumes)
        )
        self.recovered += found.removed
        self.warnings += found.warnings

    def _take_all(self, journal: Journal) -> None:
        announced: list[tuple[Step, dict[str, object]]] = []
        for volume in self.volumes:
            volume.prepare()
            trace = volume.trace(self.run)
            if trace is not None:
                announced.append(("snapshot", {"volume": volume.key, "name": volume.name, "trace": trace}))
        if announced:
            journal.append_all(announced)
        # Nothing but the snapshots themselves from here to the last: what happens in between is skew.
        for volume in self.volumes:
            # One that is interrupted may have come to be, but there is no object yet to remove it by.
            self._in_doubt = volume
            self._taken.append((volume, volume.take_snapshot(self.run)))
            self._in_doubt = None
        if announced:
            journal.append("taken")
        for _, snapshot in self._taken:
            snapshot.check()

    def _leave(self) -> None:
        interrupt: BaseException | None = None
        clean = True
        try:
            interrupt, clean = self._remove_all()
        finally:
            if self._journal:
                if clean:
                    self._journal.finish()
                else:
                    self._journal.close()
                self._journal = None
            self._locks.release()
        if interrupt is not None:
            raise interrupt

    def _remove_all(self) -> tuple[BaseException | None, bool]:
        """Remove every snapshot, the last first; return what interrupted it and whether nothing is left."""
        interrupt: BaseException | None = None
        clean = True
        leave = [(volume.name, snapshot.remove) for volume, snapshot in self._taken]
        if self._in_doubt is not None:
            trace = self._in_doubt.trace(self.run)
            leave.append((self._in_doubt.name, lambda: remove_trace(trace)))
        self._taken, self._in_doubt = [], None
        for name, remove in reversed(leave):
            try:
                remove()
            except Exception as err:  # noqa: BLE001 - whatever one of them says, the others have to go
                clean = False
                self.warnings.append(
                    f"the snapshot of {name} was not removed, the next run tries again: {err}"
                )
            except BaseException as err:  # noqa: BLE001 - raised again when all were tried
                clean = False
                interrupt = err
        return interrupt, clean
