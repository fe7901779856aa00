"""Everything that stands still for one run's snapshots, begun in order, ended in the opposite one.

The order is hooks, databases, guests, control groups, filesystems: an application is asked while it can still
answer, what does not run any more cannot write, and what it had written then goes to the volume. A database
may ask for two stages: some snapshots, ``advance``, the others. Whatever happens, all that was begun is
ended, here or by the watchdog, which keeps the deadline. Nothing of this forks between begin
and end, writes to a filesystem that may be frozen, or imports what was not imported before.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from blocksnap.errors import BlocksnapError
from blocksnap.quiesce.base import Agent, Guard, Quiescer, Record, Trace
from blocksnap.quiesce.errors import DeadlineError, GuestThawError, HookReleaseError
from blocksnap.quiesce.settings import QuiesceSettings
from blocksnap.system.watchdog import Watchdog, WatchdogError

State = Literal["application", "frozen", "failed"]
LATE = 2
_CLOSE_SECONDS = 2.0


@dataclass(frozen=True, slots=True)
class Outcome:
    """What the snapshots are worth, for the manifest.

    ``application``: an application was asked and stood still until the last snapshot was taken; ``frozen``:
    processes or filesystems did; ``failed``: something was to and did not, and ``reason`` says why.
    ``seconds`` is from the first begin to the last end, ``records`` what has to be kept with the snapshots.
    """

    state: State
    by: tuple[str, ...] = ()
    reason: str | None = None
    seconds: float = 0.0
    records: tuple[Record, ...] = ()


@dataclass(frozen=True, slots=True)
class Stages:
    """Who talks with applications, and what is done for a part of the snapshots only.

    ``late`` are the volumes whose snapshots come after ``advance``; ``only_early`` and ``only_late`` are the
    quiescers, filesystems all, that stand still for one stage.
    """

    agents: tuple[Agent, ...] = ()
    late: frozenset[str] = frozenset()
    only_early: tuple[Quiescer, ...] = ()
    only_late: tuple[Quiescer, ...] = ()


class Standstill:
    """The quiescers of one run, and their watchdog.

    ``failure`` is what already went wrong when they were looked up. ``warnings`` is what did not touch the
    snapshots, and ``left`` tells whether something could not be let go and is up to the next run.
    """

    def __init__(
        self,
        quiescers: Sequence[Quiescer],
        settings: QuiesceSettings,
        failure: BlocksnapError | None = None,
        *,
        stages: Stages = Stages(),
        reading: bool = False,
    ) -> None:
        """``reading``: it is held until everything was read, and may take as much longer."""
        self._quiescers = tuple(quiescers)
        self._stages = stages
        self._settings = settings
        self._limit_seconds = settings.deadline_seconds + (settings.reading_seconds if reading else 0.0)
        self._failure = failure
        self._watchdog: Watchdog | None = None
        self._began_at: float | None = None
        self._seconds = 0.0
        self._ended = False
        self._looking = threading.Lock()
        self.warnings: list[str] = []
        self.left = False

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to be done, and nothing that failed."""
        return not self._quiescers and self._failure is None

    def traces(self) -> list[Trace]:
        """Return what may be left after a crash."""
        return [trace for each in self._quiescers if (trace := each.trace()) is not None]

    @property
    def deadline_seconds(self) -> float:
        """How long it may take until all stand still, and how long the snapshots where there are any."""
        return self._settings.deadline_seconds

    def attend(self, journal: int, environment: Mapping[str, str]) -> None:
        """Start the watchdog, and do what can be done while everything runs.

        ``journal`` is the descriptor of the run's journal. Raises QuiesceError where the policy is to fail.
        """
        if self._quiescers and self._failure is None:
            try:
                self._start(journal, environment)
            except BlocksnapError as err:
                self._failure = err
        self._fail_by_policy()

    def begin(self) -> None:
        """Make everything stand still.

        Where that fails, all is let go at once, and either QuiesceError is raised or, if the policy says so,
        the run goes on without.
        """
        if not self._quiescers or self._failure is not None:
            return
        self._began_at = time.monotonic()
        deadline = self._began_at + self._settings.deadline_seconds
        try:
            for quiescer in self._quiescers:
                if quiescer not in self._stages.only_late:
                    self._begin_one(quiescer, deadline)
            self._require_time()
        except BlocksnapError as err:
            self._failure = err
            self.end()
        self._fail_by_policy()

    def rank(self, key: str) -> int:
        """Return when the snapshot of a volume is to be taken: in this order, LATE after ``advance``."""
        if key in self._stages.late:
            return LATE
        return 1 if any(key in agent.last for agent in self._stages.agents) else 0

    def advance(self) -> None:
        """Let go of what the early snapshots needed, and go on to the late ones; fails as ``begin`` does.

        Filesystems go on before an application is asked: it may have to write before it can answer.
        """
        if self._began_at is None or self._failure is not None:
            return
        deadline = self._began_at + self._settings.deadline_seconds
        try:
            for quiescer in reversed(self._stages.only_early):
                quiescer.end(deadline)
            for agent in self._stages.agents:
                agent.advance(deadline)
            for quiescer in self._stages.only_late:
                self._begin_one(quiescer, deadline)
            self._require_time()
        except BlocksnapError as err:
            self._note_expiry()
            self._failure = self._failure or err
            self.end()
        self._fail_by_policy()

    def end(self) -> None:
        """Let everything go on, whatever fails; ``conclude`` tells what."""
        with self._looking:
            if self._ended:
                return
            self._ended = True
            self._note_expiry()
        interrupt: BaseException | None = None
        deadline = (self._began_at or time.monotonic()) + self._limit_seconds
        for quiescer in reversed(self._quiescers):
            try:
                quiescer.end(deadline)
            except (HookReleaseError, GuestThawError) as err:
                self.warnings.append(err.brief)
                self.left = self.left or not err.was_run
            except BlocksnapError as err:
                # A standstill that the watchdog has ended is rightly found to be over.
                self._failure = self._failure or err
            except BaseException as err:  # noqa: BLE001 - raised again when all were let go
                interrupt = err
        if self._began_at is not None:
            self._seconds = time.monotonic() - self._began_at
        if interrupt is not None:
            raise interrupt

    def find_failure(self) -> BlocksnapError | None:
        """Return why it is over before its end, if that ends the run; called from another thread."""
        with self._looking:
            if self._ended:
                return None
            self._note_expiry()
            return self._failure if self._settings.on_failure == "fail" else None

    def conclude(self) -> Outcome:
        """Say what it was worth, after ``end``.

        Raises QuiesceError when it failed and the policy is that the backup then fails.
        """
        self._fail_by_policy()
        names = tuple(each.name for each in self._quiescers)
        if self._failure is not None:
            return Outcome("failed", names, self._failure.brief, self._seconds)
        application = any(each.strength == "application" for each in self._quiescers)
        records = tuple(record for agent in self._stages.agents if (record := agent.record()) is not None)
        return Outcome("application" if application else "frozen", names, None, self._seconds, records)

    def close(self) -> None:
        """End the watchdog and close everything; it lets go of what was not let go yet."""
        if self._watchdog is not None:
            patience = _CLOSE_SECONDS
            if self._watchdog.expired_after is not None:
                patience += self._settings.deadline_seconds
            if not self._watchdog.close(patience):
                self.warnings.append(
                    f"the watchdog (process {self._watchdog.pid}) still waits for a hook to come to its end"
                )
            self._watchdog = None
        for quiescer in self._quiescers:
            quiescer.close()
        self._quiescers = ()

    def _start(self, journal: int, environment: Mapping[str, str]) -> None:
        safeguards = [each.safeguards() for each in self._quiescers]
        self._watchdog = Watchdog(
            [safeguard for group in safeguards for safeguard in group],
            self._limit_seconds,
            journal=journal,
            environment=environment,
        )
        first = 0
        for quiescer, group in zip(self._quiescers, safeguards, strict=True):
            quiescer.attend(Guard(self._watchdog, first))
            first += len(group)

    def _begin_one(self, quiescer: Quiescer, deadline: float) -> None:
        # The one before may have taken all the time without noticing: a freeze cannot be called back.
        self._require_time()
        quiescer.begin(deadline)

    def _require_time(self) -> None:
        """Raise why the standstill is over already, if it is: nothing more is begun for it."""
        self._note_expiry()
        if self._failure is not None:
            raise self._failure

    def _note_expiry(self) -> None:
        if self._watchdog is None or self._began_at is None or self._failure is not None:
            return
        expired = self._watchdog.expired_after
        if expired is not None:
            self._failure = DeadlineError(self._limit_seconds, expired)
        elif self._watchdog.is_lost:
            self._failure = WatchdogError("was killed while everything stood still")

    def _fail_by_policy(self) -> None:
        if self._failure is not None and self._settings.on_failure == "fail":
            raise self._failure
