"""Take the measurements: round after round, each tool in turn.

Every command starts from the same state: nothing dirty on the filesystem, and what it will read either wholly
in the page cache or (cold) not at all. A tool that fails, or restores anything but the exact image, is left
out from then on and named in the results; the others go on.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from measure import (
    BenchError,
    CommandFailedError,
    Cost,
    Output,
    allocated_bytes,
    drop_page_cache,
    measure,
    read_through,
    run,
    sync_seconds,
)
from reference_work import ReferenceWork
from tools import Operation, Place, Step, Tool

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Measurement:
    """One command, once. `sync_s` is what it left unwritten, as the seconds a sync took right after it."""

    round: int
    tool: str
    operation: Operation
    cost: Cost
    sync_s: float
    repository_bytes: int
    details: dict[str, object] = field(default_factory=dict)


class RestoredWrongError(BenchError):
    """What a tool restored is not what was backed up."""

    def __init__(self, tool: str) -> None:
        super().__init__(f"{tool} restored something else than the image of day two")


@dataclass(frozen=True, slots=True)
class Rounds:
    """How and where the tools are measured."""

    work: ReferenceWork
    directory: Path
    cold: bool
    deadline_seconds: float
    say: Say

    def take(self, tools: Sequence[Tool], rounds: int) -> tuple[list[Measurement], dict[str, str]]:
        """Measure every tool once a round, beginning with another one each time.

        Returns the measurements, and for each tool that was left out the reason.
        """
        taken: list[Measurement] = []
        failed: dict[str, str] = {}
        for number in range(1, rounds + 1):
            first = (number - 1) % len(tools)
            for tool in (*tools[first:], *tools[:first]):
                if tool.name in failed:
                    continue
                try:
                    taken += self._measure_tool(tool, number)
                except BenchError as err:
                    failed[tool.name] = str(err).replace(f"{self.directory}/", "")
                    self.say(f"round {number}: {tool.name} left out: {err}")
        return [one for one in taken if one.tool not in failed], failed

    def _measure_tool(self, tool: Tool, number: int) -> list[Measurement]:
        place = Place(root=self.directory / tool.name, source=self.directory / "source")
        place.remove()
        try:
            place.create()
            create = tool.create(place)
            if create is not None:
                run(*create.argv, cwd=create.cwd, environment=create.environment)
            return [self._measure_step(tool, place, step, number) for step in tool.steps(place)]
        finally:
            place.remove()

    def _measure_step(self, tool: Tool, place: Place, step: Step, number: int) -> Measurement:
        log = self.directory / "log" / f"{number}-{tool.name}-{step.operation}"
        log.parent.mkdir(exist_ok=True)
        output = Output(stdout=log.with_suffix(".out"), stderr=log.with_suffix(".err"))
        with self.work.presented(step.day, place.source):
            self._settle(step.reads)
            cost = measure(step.command, output, deadline_seconds=self.deadline_seconds)
            sync_s = sync_seconds(self.directory)
        if step.operation == "restore":
            self._require_identical(tool, place)
        taken = Measurement(
            round=number,
            tool=tool.name,
            operation=step.operation,
            cost=cost,
            sync_s=sync_s,
            repository_bytes=allocated_bytes(place.repository) if place.repository.exists() else 0,
            details=tool.details(output.stdout) if step.operation != "restore" else {},
        )
        self.say(
            f"round {number}: {tool.name} {step.operation}: {cost.wall_s:.2f} s + sync {sync_s:.2f} s, "
            f"CPU {cost.cpu_s:.2f} s, others' CPU {cost.other_cpu_s:.2f} s"
        )
        return taken

    def _settle(self, reads: Path) -> None:
        # Removing the last tool's repository leaves discards to write, which are not the next one's cost.
        sync_seconds(self.directory)
        if self.cold:
            drop_page_cache()
        else:
            read_through(reads)

    def _require_identical(self, tool: Tool, place: Place) -> None:
        try:
            run("cmp", "--silent", str(place.restored_volume), str(self.work.day2))
        except CommandFailedError as err:
            raise RestoredWrongError(tool.name) from err
