"""Repair a repository: look, say what is damaged and what can be brought back, and bring it back."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime

from blocksnap.errors import DamageError
from blocksnap.operations.catalogue import map_root
from blocksnap.operations.check import scrub
from blocksnap.operations.check_memory import CheckMemory
from blocksnap.operations.reporting import Reporter, phase
from blocksnap.operations.runs import is_gone, this_author
from blocksnap.repository.checked import load_states
from blocksnap.repository.epochs import read_epoch
from blocksnap.repository.keys import Right
from blocksnap.repository.repair_plan import Planner, RepairPlan
from blocksnap.repository.repairing import NO_RUN, Repaired, compose_record, execute_repair, settle
from blocksnap.repository.repository import Repository
from blocksnap.repository.writer import RepositoryWriter

_ATTEMPTS = 5


class RestlessError(DamageError):
    """What was to be copied vanished, again and again."""

    def __init__(self) -> None:
        super().__init__(
            "packs vanish while they are being repaired",
            resolution="wait until no prune is at work, then run repair again; nothing is lost by it",
        )


@dataclass(frozen=True, slots=True)
class RepairOptions:
    """``accept_loss``: give up what cannot be brought back."""

    accept_loss: bool = False


@dataclass(frozen=True, slots=True)
class RepairResult:
    """What was found, and what was done about it: nothing where there was nothing to do."""

    plan: RepairPlan
    done: Repaired | None = None


def find_suspects(
    repository: Repository, state_directory: str, report: Reporter, *, read_data: bool
) -> frozenset[str]:
    """Return the packs in which checks have found something; with ``read_data`` read them all first."""
    memory = CheckMemory(state_directory, repository.config.id)
    states = memory.merged_with(load_states(repository))
    aside = repository.aside().packs
    if read_data:
        sizes = {info.name: info.size for info in repository.backend.list("packs/") if info.name not in aside}
        states = scrub(repository, sizes, memory, report)
    return frozenset(name for name, state in states.items() if state.is_bad) - aside


def plan_repair(repository: Repository, suspects: frozenset[str]) -> RepairPlan:
    """Say what is damaged and what could be brought back; nothing is written."""
    return Planner(repository, map_root, suspects, condemned_packs(repository)).plan()


def repair(
    repository: Repository, suspects: frozenset[str], options: RepairOptions, report: Reporter
) -> RepairResult:
    """Bring back what can be; raises MissingRightError unless the key may collect garbage.

    Raises FencedError when the run was shut out, and RestlessError: then run it again.
    """
    repository.require("write")
    repository.keys.require(Right.COLLECT)
    plan = plan_repair(repository, suspects)
    record = compose_record(repository, plan, NO_RUN, accept_loss=options.accept_loss, now=datetime.now(UTC))
    if not plan.acts and record is None and not (options.accept_loss and plan.gone):
        return RepairResult(plan)
    for _ in range(_ATTEMPTS):
        # The plan that counts is made when everybody can know of the run.
        with RepositoryWriter(repository, this_author(), is_gone, right=Right.COLLECT) as writer:
            planner = Planner(repository, map_root, suspects, condemned_packs(repository))
            plan = planner.plan()
            with phase(report, "copying what is unharmed", plan.rescued_bytes):
                done = execute_repair(
                    repository,
                    writer,
                    planner,
                    plan,
                    accept_loss=options.accept_loss,
                    now=datetime.now(UTC),
                    advance=report.advance,
                )
            settle(repository, writer, datetime.now(UTC))
        if done.complete:
            return RepairResult(plan, done)
    raise RestlessError


def condemned_packs(repository: Repository) -> tuple[str, ...]:
    """Return what an unfinished garbage collection may delete."""
    epoch = read_epoch(repository)
    return epoch.condemned.packs if epoch.is_open and epoch.condemned else ()
