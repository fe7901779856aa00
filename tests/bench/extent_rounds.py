"""The frame of the extent benchmarks: cases, who is measured in them, and how the rounds go.

A section of the benchmark is a module `extents_<name>.py` beside this one, with

    TITLE: str          its headline
    INTRODUCTION: str   what the work is and what is compared, for people
    def measure(folder: Path, rounds: int, say: Say) -> Section

where `folder` is the section's own, kept from run to run, for images that take long to build. In each case
the contenders take turns, each round beginning with another one. What ours prints is an Inspection
(`blocksnap debug ... --json`), whose `seconds` is the engine alone; what a process costs is measured from
outside for everybody.
"""

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Literal

from measure import BenchError, Command, CommandFailedError, Cost, Output, measure

Say = Callable[[str], None]
Quantity = Literal["engine", "process", "memory"]
MIB = 1 << 20
BLOCKSNAP = str(Path(sys.executable).with_name("blocksnap"))


@dataclass(frozen=True, slots=True)
class Contender:
    """A command that does a case's work. Ours prints an Inspection; `before` runs ahead of each round."""

    name: str
    argv: tuple[str, ...]
    ours: bool = False
    before: Callable[[], None] | None = None


@dataclass(frozen=True, slots=True)
class Goal:
    """In a case, a quantity of one contender may be at most so many times that of another."""

    contender: str
    peer: str
    quantity: Quantity
    at_most: float


@dataclass(frozen=True, slots=True)
class Case:
    """One piece of work, done by several."""

    title: str
    contenders: tuple[Contender, ...]
    goals: tuple[Goal, ...] = ()
    deadline_seconds: float = 1800.0


@dataclass(frozen=True, slots=True)
class Verdict:
    """Whether a goal was met; `met` None: not measured."""

    goal: str
    limit: str
    found: str
    met: bool | None


@dataclass(frozen=True, slots=True)
class Round:
    """One command, once; `engine_s` is the engine's own time, for others that of the process."""

    cost: Cost
    engine_s: float
    facts: dict[str, object] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Taken:
    """All rounds of one contender in one case."""

    case: str
    name: str
    ours: bool
    rounds: tuple[Round, ...]

    def middle(self, value: Callable[[Round], float]) -> float:
        """Return the median over the rounds."""
        return median(map(value, self.rounds))

    def quantity(self, which: Quantity) -> float:
        """Return a median that goals are about: seconds, or bytes."""
        if which == "memory":
            return self.middle(lambda one: one.cost.max_rss_bytes)
        return self.middle(lambda one: one.engine_s if which == "engine" else one.cost.wall_s)


@dataclass(frozen=True, slots=True)
class Section:
    """What a module found out."""

    taken: tuple[Taken, ...]
    verdicts: tuple[Verdict, ...]
    left_out: dict[str, str] = field(default_factory=dict)

    def of(self, case: str, name: str) -> Taken | None:
        """Return the rounds of a contender, if there are any."""
        return next((one for one in self.taken if (one.case, one.name) == (case, name)), None)


def take(cases: Sequence[Case], folder: Path, rounds: int, say: Say) -> Section:
    """Measure all cases and judge their goals; a contender that fails is left out and named."""
    taken: list[Taken] = []
    left_out: dict[str, str] = {}
    for case in cases:
        taken += _take_case(case, folder, rounds, say, left_out)
    section = Section(tuple(taken), (), left_out)
    verdicts = tuple(judge(section, case.title, goal) for case in cases for goal in case.goals)
    return Section(section.taken, verdicts, left_out)


def judge(section: Section, case: str, goal: Goal) -> Verdict:
    """Compare two contenders of one case."""
    ours, peer = section.of(case, goal.contender), section.of(case, goal.peer)
    what = {"engine": "time", "process": "process time", "memory": "memory"}[goal.quantity]
    text = f"{case}: {what} of {goal.contender}, against {goal.peer}"
    limit = f"<= {goal.at_most:.4g} x"
    if ours is None or peer is None:
        return Verdict(text, limit, "not measured", None)
    ratio = ours.quantity(goal.quantity) / peer.quantity(goal.quantity)
    return Verdict(text, limit, f"{ratio:.4f} x", ratio <= goal.at_most)


def _take_case(case: Case, folder: Path, rounds: int, say: Say, left_out: dict[str, str]) -> list[Taken]:
    done: dict[str, list[Round]] = {one.name: [] for one in case.contenders}
    for number in range(rounds):
        first = number % len(case.contenders)
        for one in (*case.contenders[first:], *case.contenders[:first]):
            key = f"{case.title}: {one.name}"
            if key in left_out:
                continue
            try:
                done[one.name].append(_once(one, case, folder))
            except BenchError as err:
                left_out[key] = str(err).replace(f"{folder}/", "")
                say(f"{key}: left out: {err}")
                continue
            last = done[one.name][-1]
            say(f"{key}: {last.engine_s:.4f} s, process {last.cost.wall_s:.3f} s")
    return [
        Taken(case.title, one.name, one.ours, tuple(done[one.name]))
        for one in case.contenders
        if done[one.name] and f"{case.title}: {one.name}" not in left_out
    ]


def _once(one: Contender, case: Case, folder: Path) -> Round:
    if one.before is not None:
        one.before()
    output = Output(stdout=folder / "stdout", stderr=folder / "stderr")
    try:
        cost = measure(Command(one.argv, folder), output, deadline_seconds=case.deadline_seconds)
        if not one.ours:
            return Round(cost, cost.wall_s)
        document = json.loads(output.stdout.read_text())
    except (OSError, ValueError) as err:
        raise BenchError(f"{one.name}: {err}") from err
    del document["extents"]
    return Round(cost, document["seconds"], document)


def format_section(title: str, introduction: str, section: Section) -> str:
    """Return a section as Markdown."""
    lines = [f"### {title}", "", introduction.strip(), ""]
    lines += [f"* Left out: {name}: {reason}" for name, reason in section.left_out.items()]
    if section.verdicts:
        lines += ["| goal | limit | measured |  |", "| --- | --- | --- | --- |"]
        words = {True: "met", False: "**missed**", None: "not measured"}
        lines += [
            f"| {one.goal} | {one.limit} | {one.found} | {words[one.met]} |" for one in section.verdicts
        ]
        lines.append("")
    lines += [
        "| work | by | engine s | range | process s | CPU s | peak RSS MiB | minor faults | major faults |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    return "\n".join([*lines, *map(_row, section.taken), ""])


def _row(taken: Taken) -> str:
    rss = taken.middle(lambda one: one.cost.max_rss_bytes)
    floor = taken.middle(lambda one: one.cost.rss_floor_bytes)
    seconds = [one.engine_s for one in taken.rounds]
    engine = f"{median(seconds):.4f} | {min(seconds):.4f}-{max(seconds):.4f}" if taken.ours else " | "
    cells = (
        taken.case,
        taken.name,
        engine,
        f"{taken.middle(lambda one: one.cost.wall_s):.3f}",
        f"{taken.middle(lambda one: one.cost.cpu_s):.2f}",
        f"{rss / MIB:.0f}" if rss > floor * 1.05 else f"< {rss / MIB:.0f}",
        f"{taken.middle(lambda one: one.cost.minor_faults):,.0f}",
        f"{taken.middle(lambda one: one.cost.major_faults):,.0f}",
    )
    return f"| {' | '.join(cells)} |"


__all__ = [
    "BLOCKSNAP",
    "Case",
    "CommandFailedError",
    "Contender",
    "Goal",
    "Section",
    "Verdict",
    "format_section",
    "judge",
    "take",
]
