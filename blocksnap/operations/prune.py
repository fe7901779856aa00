"""Give back the space of forgotten backups and of what interrupted runs left, while backups go on."""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import UTC, datetime

from blocksnap.operations.catalogue import map_root
from blocksnap.operations.reporting import Reporter, phase
from blocksnap.operations.runs import is_gone, this_author
from blocksnap.repository.collector import Collector, Outcome, Plan
from blocksnap.repository.repository import Repository
from blocksnap.repository.victims import Limits
from blocksnap.repository.writer import RepositoryWriter

_POLL_SECONDS = 5.0


def plan_prune(repository: Repository, limits: Limits) -> Plan:
    """Say what would go, and why; nothing is written."""
    return _collector(repository, limits, lambda _: None).plan()


def prune(repository: Repository, limits: Limits, report: Reporter, *, wait_seconds: float) -> Outcome:
    """Collect garbage; where a run is at work that may need what is to go, wait for it so long.

    What is not finished then goes on with the next call.
    """
    until = time.monotonic() + wait_seconds
    while True:
        outcome = _collect(repository, limits, report)
        for problem in outcome.problems:
            report.warn(problem.brief, resolution=problem.resolution)
        left = until - time.monotonic()
        if outcome.state != "waiting" or left <= 0:
            return outcome
        time.sleep(min(left, _POLL_SECONDS))


def _collect(repository: Repository, limits: Limits, report: Reporter) -> Outcome:
    with (
        RepositoryWriter(repository, this_author(), collects=True) as writer,
        phase(report, "prune", 0),
    ):
        return _collector(repository, limits, report.advance).collect(writer, is_gone)


def _collector(repository: Repository, limits: Limits, advance: Callable[[int], None]) -> Collector:
    return Collector(repository, map_root, limits, now=lambda: datetime.now(UTC), advance=advance)
