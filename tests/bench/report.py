"""Turn measurements into results: a JSON document that keeps everything, and Markdown for people.

The Markdown is a function of the JSON document alone, so it can be made again from an earlier run's file.
"""

import json
import os
import platform
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from statistics import median

from measure import BenchError, Cost
from reference_work import ReferenceWork
from rounds import Measurement
from tools import OPERATIONS, Operation, Tool

GIB = 1 << 30
MIB = 1 << 20
BEGIN_MARK = "<!-- begin: reference work, written by tests/bench/run.py --write-docs -->"
END_MARK = "<!-- end: reference work -->"
NOISE_SHARE = 0.05
TITLES: dict[Operation, str] = {
    "full": "Full backup into a fresh repository",
    "incremental": "Incremental backup of day two",
    "restore": "Restore of day two to a file",
}


@dataclass(frozen=True, slots=True)
class Machine:
    """What the numbers were measured on; it names no host."""

    cpu: str
    cores: int
    memory_bytes: int
    kernel: str
    python: str
    filesystem: str
    date: str


@dataclass(frozen=True, slots=True)
class ToolInfo:
    """One tool as it was run."""

    name: str
    version: str
    settings: str
    durability: str
    is_peer: bool


@dataclass(frozen=True, slots=True)
class Results:
    """All that one run found out; `left_out` names missing and failed tools with the reason."""

    machine: Machine
    work: str
    scale: float
    cold: bool
    rounds: int
    tools: tuple[ToolInfo, ...]
    left_out: dict[str, str]
    measurements: tuple[Measurement, ...]

    def of(self, tool: str, operation: Operation) -> list[Measurement]:
        return [one for one in self.measurements if (one.tool, one.operation) == (tool, operation)]

    def fastest_peer(
        self, operation: Operation, cost: Callable[[Measurement], float]
    ) -> tuple[str, float] | None:
        """Return the peer whose median is smallest, with that median."""
        medians = [
            (median(map(cost, taken)), tool.name)
            for tool in self.tools
            if tool.is_peer and (taken := self.of(tool.name, operation))
        ]
        if not medians:
            return None
        value, name = min(medians)
        return name, value


@dataclass(frozen=True, slots=True)
class Goal:
    """A number of the design: blocksnap's median divided by another tool's must not pass `limit`."""

    operation: Operation
    against: str
    """A tool's name, or "peer" for whichever peer is fastest."""
    limit: float


GOALS = (Goal("full", "peer", 0.40), Goal("restore", "peer", 0.45), Goal("restore", "cp", 1.50))
MEMORY_GOAL_BYTES = 200 * MIB


def describe_machine(directory: Path) -> Machine:
    """Return the machine that this process runs on, as far as it bears on the numbers."""
    cpu_lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    models = [line.partition(":")[2].strip() for line in cpu_lines if line.startswith("model name")]
    return Machine(
        cpu=models[0] if models else platform.machine(),
        cores=len(os.sched_getaffinity(0)),
        memory_bytes=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        # What follows the version names somebody's build, not the kernel.
        kernel=platform.release().split("-")[0],
        python=platform.python_version(),
        filesystem=_filesystem_type(directory),
        date=datetime.now(UTC).date().isoformat(),
    )


def describe_work(work: ReferenceWork) -> str:
    """Return one sentence about what is in the images."""
    size = work.size
    return (
        f"{size.image_bytes / GIB:.2f} GiB ext4 image with {work.files:,} files "
        f"({work.files_bytes / GIB:.2f} GiB), an SQLite database of "
        f"{size.database_rows:,} rows ({work.database_bytes / MIB:.0f} MiB) and "
        f"{size.random_bytes / MIB:.0f} MiB of random data; day two updates "
        f"{size.updated_rows:,} random rows and adds a file of {size.added_bytes / MIB:.0f} MiB"
    )


def describe_tool(tool: Tool, version: str) -> ToolInfo:
    return ToolInfo(tool.name, version, tool.settings, tool.durability, tool.is_peer)


def save_results(results: Results, path: Path) -> None:
    path.write_text(json.dumps(asdict(results), indent=2) + "\n", encoding="utf-8")


def load_results(path: Path) -> Results:
    """Read what save_results wrote."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        taken = [Measurement(**(one | {"cost": Cost(**one["cost"])})) for one in document["measurements"]]
        return Results(
            **(
                document
                | {
                    "machine": Machine(**document["machine"]),
                    "tools": tuple(ToolInfo(**tool) for tool in document["tools"]),
                    "measurements": tuple(taken),
                }
            )
        )
    except (OSError, ValueError, KeyError, TypeError) as err:
        raise BenchError(
            f"{path} holds no results of this version of the benchmark: run it first ({err})"
        ) from err


def format_markdown(results: Results) -> str:
    """Return the whole report."""
    parts = [_format_frame(results), _format_goals(results)]
    parts += [_format_operation(results, operation) for operation in OPERATIONS]
    parts += [_format_tools(results)]
    return "\n".join(parts)


def write_docs(page: Path, markdown: str) -> None:
    """Replace what stands between the two marks of the page; raise if they are not there exactly once."""
    text = page.read_text(encoding="utf-8")
    if (
        text.count(BEGIN_MARK) != 1
        or text.count(END_MARK) != 1
        or text.index(BEGIN_MARK) > text.index(END_MARK)
    ):
        raise BenchError(f"{page} must hold these two lines once, in this order: {BEGIN_MARK} {END_MARK}")
    before = text.partition(BEGIN_MARK)[0]
    after = text.partition(END_MARK)[2]
    page.write_text(f"{before}{BEGIN_MARK}\n\n{markdown}\n{END_MARK}{after}", encoding="utf-8")


def wall(one: Measurement) -> float:
    return one.cost.wall_s


def wall_and_sync(one: Measurement) -> float:
    return one.cost.wall_s + one.sync_s


def _format_frame(results: Results) -> str:
    machine = results.machine
    cache = "dropped before each command" if results.cold else "warm: what a command reads is read before it"
    hardware = f"{machine.cpu}, {machine.cores} cores, {machine.memory_bytes / GIB:.1f} GiB of memory"
    software = f"Linux {machine.kernel}, Python {machine.python}, everything on {machine.filesystem}"
    lines = [
        f"* Date: {machine.date}. Rounds: {results.rounds}, medians. Page cache: {cache}.",
        f"* Machine: {hardware}, {software}.",
        f"* Work: {results.work}.",
    ]
    if results.scale != 1:
        lines.append(f"* **Scaled to {results.scale:g} of the reference work: nothing here is a verdict.**")
    lines += _format_noise(results)
    lines += [f"* Left out: {tool}: {reason}" for tool, reason in results.left_out.items()]
    return "\n".join(lines) + "\n"


def _format_noise(results: Results) -> list[str]:
    """Say how much of the processors others took (kernel threads and stolen time included)."""
    if not results.measurements:
        return []

    def share(taken: Sequence[Measurement]) -> float:
        available_s = sum(map(wall, taken)) * results.machine.cores
        return sum(one.cost.other_cpu_s for one in taken) / available_s

    overall = share(results.measurements)
    worst = max(results.measurements, key=lambda one: share([one]))
    line = f"Processor time taken by others while a command ran: {overall:.0%} of all there was, at most "
    line += f"{share([worst]):.0%} ({worst.tool} {worst.operation})"
    return [f"* **Not a quiet machine. {line}.**" if overall > NOISE_SHARE else f"* {line}."]


def _format_goals(results: Results) -> str:
    head = ("goal", "limit", "by wall", "by wall + sync", "")
    rows = [_goal_row(results, goal) for goal in GOALS]
    peak = _peak_rss(results, "blocksnap")
    rows.append(
        (
            "peak resident memory of any command",
            f"<= {MEMORY_GOAL_BYTES // MIB} MiB",
            "not measured" if peak is None else f"{peak / MIB:.0f} MiB",
            "",
            _verdict(None if peak is None else peak <= MEMORY_GOAL_BYTES),
        )
    )
    peers = ", ".join(
        tool.name for tool in results.tools if tool.is_peer and tool.name not in results.left_out
    )
    note = (
        f"Peers in this run: {peers or 'none'}. The goal for incrementals is against Wyng "
        "with change tracking and is not judged by this work.\n"
    )
    return "### Goals\n\n" + _table(head, rows) + "\n" + note


def _goal_row(results: Results, goal: Goal) -> tuple[str, ...]:
    figures: list[str] = []
    met: list[bool] = []
    for cost in (wall, wall_and_sync):
        other = _reference_cost(results, goal, cost)
        ours = results.of("blocksnap", goal.operation)
        if other is None or not ours:
            figures.append("not measured")
            continue
        ratio = median(map(cost, ours)) / other[1]
        figures.append(f"{ratio:.2f} x {other[0]}")
        met.append(ratio <= goal.limit)
    against = "the fastest peer" if goal.against == "peer" else f"`{goal.against}`"
    # Judged by wall time as the design says; the second figure shows what unflushed writes hide.
    verdict = _verdict(met[0] if met else None)
    if len(set(met)) > 1:
        verdict += " (not so with sync)"
    return f"{goal.operation}, against {against}", f"<= {goal.limit:.2f} x", *figures, verdict


def _reference_cost(
    results: Results, goal: Goal, cost: Callable[[Measurement], float]
) -> tuple[str, float] | None:
    if goal.against == "peer":
        return results.fastest_peer(goal.operation, cost)
    taken = results.of(goal.against, goal.operation)
    return (goal.against, median(map(cost, taken))) if taken else None


def _verdict(met: bool | None) -> str:  # one value with three answers
    return {True: "met", False: "**missed**", None: "not measured"}[met]


def _peak_rss(results: Results, tool: str) -> int | None:
    return max((one.cost.max_rss_bytes for one in results.measurements if one.tool == tool), default=None)


def _format_operation(results: Results, operation: Operation) -> str:
    head = (
        "tool",
        "wall s",
        "range",
        "sync s",
        "wall + sync s",
        "CPU s",
        "peak RSS MiB",
        "minor faults",
        "major faults",
        "repository MiB",
        "x fastest peer",
        "with sync",
    )
    rows = [
        _operation_row(results, tool.name, operation, taken)
        for tool in results.tools
        if (taken := results.of(tool.name, operation))
    ]
    return f"### {TITLES[operation]}\n\n" + _table(head, rows)


def _operation_row(
    results: Results, tool: str, operation: Operation, taken: Sequence[Measurement]
) -> tuple[str, ...]:
    def middle(value: Callable[[Measurement], float]) -> float:
        return median(map(value, taken))

    def ratio(cost: Callable[[Measurement], float]) -> str:
        fastest = results.fastest_peer(operation, cost)
        return "" if fastest is None else f"{middle(cost) / fastest[1]:.2f}"

    rss = middle(lambda one: one.cost.max_rss_bytes)
    floor = middle(lambda one: one.cost.rss_floor_bytes)
    repository = middle(lambda one: one.repository_bytes)
    return (
        tool,
        f"{middle(wall):.2f}",
        f"{min(map(wall, taken)):.2f}-{max(map(wall, taken)):.2f}",
        f"{middle(lambda one: one.sync_s):.2f}",
        f"{middle(wall_and_sync):.2f}",
        f"{middle(lambda one: one.cost.cpu_s):.2f}",
        f"{rss / MIB:.0f}" if rss > floor * 1.05 else f"< {rss / MIB:.0f}",
        f"{middle(lambda one: one.cost.minor_faults):,.0f}",
        f"{middle(lambda one: one.cost.major_faults):,.0f}",
        f"{repository / MIB:,.0f}" if repository else "",
        ratio(wall),
        ratio(wall_and_sync),
    )


def _format_tools(results: Results) -> str:
    rows = [(tool.name, tool.version, tool.settings, tool.durability) for tool in results.tools]
    return "### The tools as they were run\n\n" + _table(("tool", "version", "settings", "flushes"), rows)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def _filesystem_type(directory: Path) -> str:
    """Return the type of the filesystem that holds the directory, from the longest mount point above it."""
    best = (-1, "an unknown filesystem")
    target = directory.resolve()
    for line in Path("/proc/self/mounts").read_text(encoding="utf-8").splitlines():
        mount_point, kind = line.split()[1:3]
        if target.is_relative_to(mount_point):
            best = max(best, (len(mount_point), kind))
    return best[1]
