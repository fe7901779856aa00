"""The snapshots of one run: locked, announced, taken at one instant, and removed whatever happens."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self

from blocksnap.controller.history import History
from blocksnap.controller.journal import Journal, StateError, Step, rotation_facts
from blocksnap.controller.lock import VolumeLocks
from blocksnap.controller.quiescing import QuiesceRequest, announce
from blocksnap.controller.recover import may_come_yet, recover, remove_trace
from blocksnap.controller.skew import find_torn
from blocksnap.errors import BlocksnapError, UsageError
from blocksnap.extents.changes import BaseDecision, BasePolicy
from blocksnap.volumes.base import Snapshot, Trace, Volume, has_gone, holds_snapshots

if TYPE_CHECKING:
    from blocksnap.quiesce.standstill import Outcome, Standstill


class _JournalledTraces:
    """What the snapshot of one volume leaves on the host for a while, in the journal."""

    def __init__(self, journal: Journal, volume: Volume, left: list[Trace]) -> None:
        self._journal = journal
        self._volume = volume
        self._left = left

    def add(self, trace: Trace) -> None:
        """Write it down before it comes to be; raises StateError."""
        self._left.append(trace)
        self._journal.append("hold", volume=self._volume.key, name=self._volume.name, trace=trace)

    def strike(self, trace: Trace) -> None:
        """It is gone; where that cannot be written down the next run looks for it once more."""
        with suppress(StateError):
            self._journal.append("removed", trace=trace)
            self._left.remove(trace)


class SnapshotSession:
    """A context in which every volume of a run has a snapshot.

    Entering takes the locks, removes what dead runs left of these volumes (``recovered``), writes down what
    is about to be made, lets stand still what was asked for, and takes all snapshots back to back. What is
    read as it is stands still until ``release``. Leaving, by whatever exception, removes them all and goes on
    past errors; one that stays is reported in ``warnings`` and left to the next run by the journal.
    """

    def __init__(
        self,
        volumes: Sequence[Volume],
        run: str,
        state_directory: str | Path,
        quiesce: QuiesceRequest | None = None,
        *,
        locks: VolumeLocks | None = None,
    ) -> None:
        """``locks`` are those of the volumes where the caller has them already, and keeps them."""
        keys = [volume.key for volume in volumes]
        twice = {volume.name for volume in volumes if keys.count(volume.key) > 1}
        if twice:
            raise UsageError(
                f"{', '.join(sorted(twice))} is named twice", resolution="name every volume once"
            )
        if quiesce is not None:
            quiesce.check(volumes)
        self.volumes = tuple(volumes)
        self.run = run
        self._quiesce = quiesce
        self.is_for_reading = quiesce is not None and quiesce.is_for_reading(volumes)
        """Whether applications stand still until ``release``, since there are no snapshots."""
        self.is_released = False
        self.torn: tuple[str, ...] = ()
        """Subvolumes that were written to before the last snapshot of their filesystem was taken."""
        self.gone: tuple[str, ...] = ()
        """Volumes that nobody named, and that went before they had a snapshot: they are no part of it."""
        self._standstill: Standstill | None = None
        self._quiesced: Outcome | None = None
        self._left_standing = False
        self.recovered: list[str] = []
        self.warnings: list[str] = []
        self._state_directory = state_directory
        self._taken: list[tuple[Volume, Snapshot]] = []
        self._own_locks = None if locks else locks_of(volumes, state_directory)
        self._journal: Journal | None = None
        self._in_doubt: list[Volume] = []
        self._left: list[Trace] = []

    @property
    def snapshots(self) -> tuple[Snapshot, ...]:
        """The snapshots, in the order of the volumes."""
        return tuple(snapshot for _, snapshot in self._taken)

    @property
    def skew_seconds(self) -> float:
        """How far apart the first and the last snapshot are."""
        times = [snapshot.timing.taken_at for snapshot in self.snapshots]
        return max(times) - min(times) if times else 0.0

    @property
    def quiesced(self) -> Outcome | None:
        """What stood still for the snapshots, and for how long; None where nothing was asked for."""
        return self._quiesced

    def __enter__(self) -> Self:
        """Take the snapshots; raises BusyError, VolumeError, QuiesceError, and leaves nothing behind then."""
        if self._own_locks:
            self._own_locks.__enter__()
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

    def find_standing_failure(self) -> BlocksnapError | None:
        """Return why what is to stand still does not any more; called from another thread."""
        standstill = self._standstill
        return standstill.find_failure() if standstill is not None else None

    def check(self) -> None:
        """Make sure that all the snapshots can be trusted to the last; raises VolumeError, QuiesceError.

        That applications went on too early is the better reason than what they wrote since.
        """
        failure = self.find_standing_failure()
        if failure is not None:
            raise failure
        for snapshot in self.snapshots:
            snapshot.check()

    def release(self) -> None:
        """Call when all was read and looked at: what stood still for that goes on, and nothing is read again.

        Does nothing where there were snapshots. Raises QuiesceError where it did not stand still to the last
        and the policy is that the backup then fails.
        """
        if self._standstill is not None and self._journal is not None:
            self.is_released = True
            for _, snapshot in self._taken:
                # A device that is held could not be used again.
                snapshot.remove()
            self._standstill.end()
            self._conclude(self._standstill, self._journal)

    def committing(self) -> None:
        """Call right before the commit: write the run down, so that the backup can be a parent.

        Where that fails the backup is taken nevertheless; the next one reads the whole volume.
        """
        if self._journal:
            # This step leaves nothing behind that anybody would have to look for.
            with suppress(StateError):
                self._journal.append("commit")
        for volume in self.volumes:
            try:
                History(self._state_directory, volume.key).add(self.run)
            except OSError as err:
                self.warnings.append(
                    f"the run cannot be written down ({err.strerror}): the next backup of {volume.name} "
                    "reads all of it"
                )

    def decide_bases(self, policy: BasePolicy) -> list[BaseDecision | None]:
        """Call right before the commit: decide which snapshots stay as bases of the next backup.

        All is read by now, so one that cannot be decided about does not stay, and fails nothing.
        """
        decisions = [_decide_base(snapshot, policy) for snapshot in self.snapshots]
        if policy == "keep":
            self.warnings += [
                f"no base of {volume.name} is kept: {decision.reason}"
                for volume, decision in zip(self.volumes, decisions, strict=True)
                if decision is not None and not decision.stays
            ]
        return decisions

    def settle(self, owner: str, decisions: Sequence[BaseDecision | None]) -> None:
        """Call right after the commit: do with the bases what was decided.

        ``owner`` is whose they are: a repository. What fails is a warning, since the backup is committed; the
        next one does without a base, and says so.
        """
        decided = [
            (volume, snapshot, decision.stays)
            for (volume, snapshot), decision in zip(self._taken, decisions, strict=True)
            if decision is not None
        ]
        try:
            self._announce_rotation(owner, decided)
        except BlocksnapError as err:
            self.warnings.append(f"the base snapshots stay as they were: {err}")
            return
        for volume, snapshot, stays in decided:
            try:
                snapshot.settle(owner, stays=stays)
            except (BlocksnapError, OSError) as err:
                self.warnings.append(
                    f"the base snapshots of {volume.name} were not brought up to date: {err}"
                )

    def _announce_rotation(self, owner: str, decided: list[tuple[Volume, Snapshot, bool]]) -> None:
        steps: list[tuple[Step, dict[str, object]]] = []
        for volume, _, stays in decided:
            trace = volume.trace(self.run)
            if trace is not None:
                facts = rotation_facts(trace)
                steps.append(("rotate", {"volume": volume.key, **facts, "owner": owner, "stays": stays}))
        if self._journal and steps:
            self._journal.append_all(steps)

    def remembers(self, volume: Volume, run: str) -> bool:
        """Tell whether this host has written a run of this volume down."""
        return History(self._state_directory, volume.key).knows(run)

    def _recover(self) -> None:
        keys = [volume.key for volume in self.volumes]
        found = recover(
            self._state_directory,
            keys,
            lvm_involved=any(volume.key.startswith("lvm:") for volume in self.volumes),
        )
        self.recovered += found.removed
        self.warnings += [*found.warnings, *found.puzzles]

    def _take_all(self, journal: Journal) -> None:
        announced: list[tuple[Step, dict[str, object]]] = []
        for volume in self.volumes:
            if not self.is_for_reading and not self._prepared(volume):
                # Else it may be in use: it is looked at when nobody is to use it any more.
                continue
            trace = volume.trace(self.run)
            if trace is not None:
                announced.append(("snapshot", {"volume": volume.key, "name": volume.name, "trace": trace}))
        standstill = self._quiesce.assemble(self.volumes, self._state_directory) if self._quiesce else None
        if self._quiesce and standstill:
            self._standstill = standstill
            environment = self._quiesce.environment(self.volumes, self.run)
            # Before the announcement: a run that dies with its watchdog at work leaves nothing in doubt.
            standstill.attend(journal.fileno(), environment)
            announced += announce(standstill, environment)
        if announced:
            journal.append_all(announced)
        if standstill is None:
            self._take_back_to_back(journal, sorted(self.volumes, key=holds_snapshots))
            self.torn = find_torn(self._taken)
        else:
            self._take_standing(standstill, journal)
        self._taken.sort(key=lambda taken: self.volumes.index(taken[0]))
        if announced:
            journal.append("taken")
        if standstill and not self.is_for_reading:
            self._conclude(standstill, journal)
        for _, snapshot in self._taken:
            snapshot.check()

    def _take_standing(self, standstill: Standstill, journal: Journal) -> None:
        """Take the snapshots while all stands still; what is read as it is goes on standing still."""
        early, late = _in_order(standstill, self.volumes)
        try:
            standstill.begin()
            self._take_back_to_back(journal, early)
            if late:
                standstill.advance()
                self._take_back_to_back(journal, late)
            self.torn = find_torn(self._taken)
        finally:
            if not self.is_for_reading:
                standstill.end()

    def _take_back_to_back(self, journal: Journal, volumes: Sequence[Volume]) -> None:
        # Nothing but the snapshots themselves from here to the last: what happens in between is skew.
        for volume in volumes:
            # One that is interrupted may have come to be, but there is no object yet to remove it by.
            self._in_doubt.append(volume)
            ledger = _JournalledTraces(journal, volume, self._left)
            try:
                self._taken.append((volume, volume.take_snapshot(self.run, ledger)))
            except BlocksnapError as err:
                self._pass_over(volume, err)
            else:
                self._in_doubt.remove(volume)

    def _prepared(self, volume: Volume) -> bool:
        try:
            volume.prepare()
        except BlocksnapError as err:
            self._pass_over(volume, err)
            return False
        return True

    def _pass_over(self, volume: Volume, err: BlocksnapError) -> None:
        """Go on without a volume that was not named and has gone; else raises the error."""
        if not has_gone(volume):
            raise err
        self.gone += (volume.name,)
        self.volumes = tuple(each for each in self.volumes if each is not volume)

    def _conclude(self, standstill: Standstill, journal: Journal) -> None:
        """All stood still and goes on; say what it was worth."""
        if standstill.traces() and not standstill.left:
            try:
                journal.append("released", by="controller")
            except StateError as err:
                # Where it was held for reading, all is read.
                self.warnings.append(f"the next run may let go once more what goes on already: {err.brief}")
        self._quiesced = standstill.conclude()
        # Reading takes hours; nobody has to be watched for that.
        self._let_go()
        if self._quiesced.state == "failed":
            worth = (
                "nobody was kept from writing, and nobody wrote while it was read"
                if self.is_for_reading
                else "the snapshots are only crash-consistent, as the job allows"
            )
            self.warnings.append(f"{worth}: {self._quiesced.reason}")

    def _leave(self) -> None:
        interrupt: BaseException | None = None
        clean = False
        try:
            try:
                self._let_go()
            except BaseException as err:  # noqa: BLE001 - raised again when the snapshots are gone
                interrupt = err
            later, clean = self._remove_all()
            interrupt = interrupt or later
        finally:
            self._close_journal(clean=clean and not self._left and not self._left_standing)
            if self._own_locks:
                self._own_locks.release()
        if interrupt is not None:
            raise interrupt

    def _close_journal(self, *, clean: bool) -> None:
        journal, self._journal = self._journal, None
        if journal is None:
            return
        try:
            if clean:
                journal.finish()
        except StateError as err:
            self.warnings.append(f"the journal of this run stays until the next one: {err.brief}")
        finally:
            journal.close()

    def _let_go(self) -> None:
        """End what stands still, and the watchdog; a second call does nothing."""
        standstill, self._standstill = self._standstill, None
        if standstill is None:
            return
        try:
            standstill.end()
        finally:
            standstill.close()
            self.warnings += standstill.warnings
            self._left_standing = standstill.left

    def _remove_all(self) -> tuple[BaseException | None, bool]:
        """Remove every snapshot, the last first; return what interrupted it and whether nothing is left."""
        interrupt: BaseException | None = None
        clean = True
        leave = [(volume.name, snapshot.remove) for volume, snapshot in self._taken]
        for volume in self._in_doubt:
            trace, late = volume.trace(self.run), ""
            leave.append((volume.name, partial(remove_trace, trace)))
            # Looked at before it is removed: what ends in between has made it by then.
            try:
                if may_come_yet(trace):
                    late = "lvcreate is still at work"
            except Exception as err:  # noqa: BLE001 - whatever it says, the snapshots have to go
                late = f"lvcreate may be at work still ({err})"
            except BaseException as err:  # noqa: BLE001 - raised again when all were tried
                interrupt, late = err, "lvcreate may be at work still"
            if late:
                clean = False
                self.warnings.append(
                    f"{late}: should it make a snapshot of {volume.name}, the next run removes it"
                )
        self._taken, self._in_doubt = [], []
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


def locks_of(
    volumes: Sequence[Volume], state_directory: str | Path, *, wait_seconds: float = 0.0
) -> VolumeLocks:
    """Return the locks of volumes, which another run may have for so long; nothing is taken yet."""
    named = [(volume.key, volume.name) for volume in volumes]
    return VolumeLocks(state_directory, named, wait_seconds=wait_seconds)


def _decide_base(snapshot: Snapshot, policy: BasePolicy) -> BaseDecision | None:
    try:
        return snapshot.decide_base(policy)
    except BlocksnapError as err:
        return BaseDecision(stays=False, reason=err.brief)


def _in_order(standstill: Standstill, volumes: Sequence[Volume]) -> tuple[list[Volume], list[Volume]]:
    """Return the volumes whose snapshots come before ``advance``, and those whose come after it."""
    from blocksnap.quiesce.standstill import LATE

    ranks = {volume.key: standstill.rank(volume.key) for volume in volumes}
    early = [volume for volume in volumes if ranks[volume.key] < LATE]
    early.sort(key=lambda volume: (ranks[volume.key], holds_snapshots(volume)))
    late = [volume for volume in volumes if ranks[volume.key] == LATE]
    return early, sorted(late, key=holds_snapshots)
