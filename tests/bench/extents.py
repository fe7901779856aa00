"""Measure the engines of the extent diff beside their peers: `make bench-extents`.

Each `extents_<name>.py` is a section; extent_rounds.py says what such a module has. Ends with 0 when all
goals that were measured are met, with 1 when one is missed, and with 2 when a section could not be measured.
"""

import argparse
import importlib
import subprocess
import sys
from pathlib import Path

from extent_rounds import Section, format_section
from measure import BenchError
from report import GIB, Machine, describe_machine

ROOT = Path(__file__).resolve().parents[2]
DOCS_PAGE = ROOT / "docs" / "benchmarks.md"
BEGIN_MARK = "<!-- begin: extents, written by tests/bench/extents.py --write-docs -->"
END_MARK = "<!-- end: extents -->"
PREFIX = "extents_"


def main() -> int:
    """Measure, print the report, and return the exit status."""
    arguments = parse_arguments()
    folder: Path = arguments.work
    folder.mkdir(parents=True, exist_ok=True)
    parts = [describe(describe_machine(folder), arguments.rounds)]
    status = 0
    if arguments.section:
        return measure_section(arguments.section, folder, arguments.rounds)
    for name in arguments.only:
        # In a process of its own: a child's peak memory is never told as less than that of its parent.
        options = ["--section", name, "--rounds", str(arguments.rounds), "--work", str(folder)]
        ended = subprocess.run([sys.executable, __file__, *options], check=False).returncode
        status = max(status, ended)
        if ended < 2:
            parts.append((folder / f"{name}.md").read_text(encoding="utf-8"))
    report = "\n".join(parts)
    (folder / "results.md").write_text(report, encoding="utf-8")
    print(report)
    if arguments.write_docs:
        write_docs(report)
    return status


def measure_section(name: str, folder: Path, rounds: int) -> int:
    """Measure one section, leave its report in the folder, and return the exit status."""
    say(f"section {name}")
    module = importlib.import_module(f"{PREFIX}{name}")
    own = folder / name
    own.mkdir(exist_ok=True)
    try:
        section: Section = module.measure(own, rounds, say)
    except BenchError as err:
        say(f"section {name} could not be measured: {err}")
        return 2
    report = format_section(module.TITLE, module.INTRODUCTION, section)
    (folder / f"{name}.md").write_text(report, encoding="utf-8")
    return 1 if any(one.met is False for one in section.verdicts) else 0


def parse_arguments() -> argparse.Namespace:
    names = sorted(path.stem.removeprefix(PREFIX) for path in Path(__file__).parent.glob(f"{PREFIX}*.py"))
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--work",
        type=Path,
        default=ROOT / "build" / "bench" / "extents",
        metavar="DIR",
        help="where images are",
    )
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="default: 5")
    parser.add_argument(
        "--only", type=lambda text: text.split(","), default=names, metavar="NAME,...", help=", ".join(names)
    )
    parser.add_argument("--section", choices=names, help=argparse.SUPPRESS)
    parser.add_argument("--write-docs", action="store_true", help="put the tables into docs/benchmarks.md")
    arguments = parser.parse_args()
    arguments.work = arguments.work.resolve()
    if arguments.rounds < 1 or set(arguments.only) - set(names):
        parser.error(f"--rounds is at least 1, --only of {', '.join(names)}")
    return arguments


def describe(machine: Machine, rounds: int) -> str:
    hardware = f"{machine.cpu}, {machine.cores} cores, {machine.memory_bytes / GIB:.1f} GiB of memory"
    return (
        f"* Date: {machine.date}. Rounds: {rounds}, medians.\n"
        f"* Machine: {hardware}, Linux {machine.kernel}, Python {machine.python}, "
        f"images on {machine.filesystem}.\n"
    )


def write_docs(report: str) -> None:
    """Replace what stands between the marks of the page."""
    text = DOCS_PAGE.read_text(encoding="utf-8")
    if text.count(BEGIN_MARK) != 1 or text.count(END_MARK) != 1:
        raise BenchError(f"{DOCS_PAGE} must hold these two lines once: {BEGIN_MARK} {END_MARK}")
    before, after = text.partition(BEGIN_MARK)[0], text.partition(END_MARK)[2]
    DOCS_PAGE.write_text(f"{before}{BEGIN_MARK}\n\n{report}\n{END_MARK}{after}", encoding="utf-8")


def say(line: str) -> None:
    """Tell whoever waits; the report alone goes to standard output."""
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
