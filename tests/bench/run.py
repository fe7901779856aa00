"""Measure blocksnap and its peers on the same work, in one run: `make bench`.

Ends with 0 when every tool that is installed was measured and restored the exact image, with 1 when one was
left out because it failed, and with 2 when nothing could be measured. A tool that is not installed is skipped
with a line that says so. Needs root; leaves no loop device and no mount behind unless it is
killed outright.
"""

import argparse
import fcntl
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from measure import BenchError
from reference_work import ReferenceWork, WorkSize, prepare
from report import (
    Results,
    describe_machine,
    describe_tool,
    describe_work,
    format_markdown,
    load_results,
    save_results,
    write_docs,
)
from rounds import Rounds
from tools import TOOLS, Tool

ROOT = Path(__file__).resolve().parents[2]
DOCS_PAGE = ROOT / "docs" / "benchmarks.md"
NOT_INSTALLED = "not installed"


def main() -> int:
    """Run the benchmark as the arguments say and return the exit status."""
    arguments = parse_arguments()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        results = (
            load_results(arguments.work / "results.json") if arguments.render else measure_all(arguments)
        )
        publish(results, arguments.work, docs=arguments.write_docs)
    except BenchError as err:
        print(f"error: {err}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    failed = [name for name, reason in results.left_out.items() if reason != NOT_INSTALLED]
    return 1 if failed else 0


def parse_arguments() -> argparse.Namespace:
    names = [tool.name for tool in TOOLS]
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--work",
        type=Path,
        default=ROOT / "build" / "bench",
        metavar="DIR",
        help="where everything is kept; needs 16 GiB free",
    )
    parser.add_argument("--rounds", type=_positive_int, default=3, metavar="N", help="default: 3")
    parser.add_argument(
        "--scale",
        type=_scale,
        default=1.0,
        metavar="X",
        help="a fraction of the reference work, to try things out (default: 1)",
    )
    parser.add_argument(
        "--tools",
        type=lambda text: text.split(","),
        default=names,
        metavar="NAME,...",
        help=f"default: {','.join(names)}",
    )
    parser.add_argument(
        "--program",
        type=_named_program,
        action="append",
        default=[],
        metavar="NAME=PATH",
        help="use this program for a tool, for example another release",
    )
    parser.add_argument(
        "--source",
        type=Path,
        action="append",
        metavar="DIR",
        help="where the work's files come from, may be repeated (default: /usr, /opt)",
    )
    parser.add_argument(
        "--cold", action="store_true", help="drop the page cache before each command, instead of warming it"
    )
    parser.add_argument(
        "--deadline",
        type=float,
        default=1800.0,
        metavar="SECONDS",
        help="end a command that runs longer (default: 1800)",
    )
    parser.add_argument(
        "--render", action="store_true", help="measure nothing, make the report again from DIR/results.json"
    )
    parser.add_argument("--write-docs", action="store_true", help="put the tables into docs/benchmarks.md")
    arguments = parser.parse_args()
    arguments.work = arguments.work.resolve()
    unknown = {*arguments.tools, *dict(arguments.program)} - set(names)
    if unknown:
        parser.error(f"no such tool: {', '.join(sorted(unknown))}")
    if arguments.write_docs and arguments.scale != 1:
        parser.error("--write-docs takes only the whole reference work: leave --scale out")
    return arguments


def measure_all(arguments: argparse.Namespace) -> Results:
    """Build the work where it is missing, measure, and return the results."""
    if os.geteuid() != 0:
        raise BenchError(
            "building and cooling the work need root (loop devices, mounts, drop_caches): use sudo"
        )
    arguments.work.mkdir(parents=True, exist_ok=True)
    with _only_run_here(arguments.work):
        tools, left_out = choose_tools(arguments.tools, dict(arguments.program))
        sources = tuple(arguments.source or (Path("/usr"), Path("/opt")))
        say("preparing the reference work")
        work = prepare(arguments.work, WorkSize.scaled(arguments.scale), sources)
        warn_of_small_memory(work)
        rounds = Rounds(
            work=work,
            directory=arguments.work,
            cold=arguments.cold,
            deadline_seconds=arguments.deadline,
            say=say,
        )
        measurements, failed = rounds.take([tool for tool, _ in tools], arguments.rounds)
    return Results(
        machine=describe_machine(arguments.work),
        work=describe_work(work),
        scale=arguments.scale,
        cold=arguments.cold,
        rounds=arguments.rounds,
        tools=tuple(describe_tool(tool, version) for tool, version in tools),
        left_out=left_out | failed,
        measurements=tuple(measurements),
    )


def choose_tools(names: list[str], programs: dict[str, str]) -> tuple[list[tuple[Tool, str]], dict[str, str]]:
    """Return the wanted tools that are there, with their versions, and those that are not, with why."""
    found: list[tuple[Tool, str]] = []
    left_out: dict[str, str] = {}
    for kind in TOOLS:
        if kind.name not in names:
            continue
        tool = kind(programs.get(kind.name))
        version = tool.version()
        if version is None:
            left_out[kind.name] = NOT_INSTALLED
            say(f"skipped: {kind.name} is not installed")
        else:
            found.append((tool, version))
    if not found:
        raise BenchError("none of the tools is installed: apt-get install restic borgbackup casync")
    return found, left_out


def warn_of_small_memory(work: ReferenceWork) -> None:
    """Say so when the page cache cannot hold an image, its repository and the restored image together."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if memory < work.size.image_bytes * 2.5:
        say("warning: too little memory to keep the work cached; use --cold, or expect uneven numbers")


def publish(results: Results, directory: Path, *, docs: bool) -> None:
    """Print the report and keep it as results.md and results.json; in the docs only if it counts."""
    markdown = format_markdown(results)
    save_results(results, directory / "results.json")
    (directory / "results.md").write_text(markdown, encoding="utf-8")
    print(markdown)
    if not docs:
        return
    if results.scale != 1:
        raise BenchError(
            f"{directory / 'results.json'} is of a scaled-down work: measure the whole one for the docs"
        )
    write_docs(DOCS_PAGE, markdown)


def say(line: str) -> None:
    """Tell whoever waits; the report alone goes to standard output."""
    print(line, file=sys.stderr, flush=True)


@contextmanager
def _only_run_here(directory: Path) -> Iterator[None]:
    """Hold the work directory, so that two runs do not take each other's images away."""
    with (directory / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as err:
            raise BenchError(
                f"another benchmark runs in {directory}: wait for it or give another --work"
            ) from err
        yield


def _positive_int(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError("must be 1 or more")
    return number


def _scale(text: str) -> float:
    number = float(text)
    if not 0 < number <= 1:
        raise argparse.ArgumentTypeError("must be above 0 and at most 1")
    return number


def _named_program(text: str) -> tuple[str, str]:
    name, separator, program = text.partition("=")
    if not (name and separator and program):
        raise argparse.ArgumentTypeError("must look like borg=/path/to/borg")
    return name, program


if __name__ == "__main__":
    sys.exit(main())
