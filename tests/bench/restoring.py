"""Measure each form of restore beside the fastest peer and `cp`, on the reference work: `make bench-restore`.

In each round, in turns: blocksnap, restic and cp bring day two back to a new file; blocksnap rolls a file
that holds day two back to day one in place; and the image of day two is read through `blocksnap mount` from
beginning to end. What is written is synced, and that is counted beside the command. Needs root; a peer that
is not installed is left out with a line that says so.
"""

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from measure import BenchError, Output, measure, read_through, run, sync_seconds
from reference_work import ReferenceWork, WorkSize, prepare
from report import describe_machine, describe_work
from tools import Blocksnap, Copy, Place, Restic, Tool

ROOT = Path(__file__).resolve().parents[2]
MOUNT_SECONDS = 60.0
DEADLINE_SECONDS = 1800.0
FULL, PEER, COPY = "restore to a new file", "restic, to a new file", "cp to a new file"
IN_PLACE, MOUNTED = "restore in place, day two to day one", "read through mount"


@dataclass(frozen=True, slots=True)
class Taken:
    """One form, once: seconds of the command and of the sync after it, and the command's CPU and memory."""

    form: str
    wall_s: float
    sync_s: float
    cpu_s: float
    rss_mib: float
    others_s: float


def main() -> int:
    """Measure, print the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "bench", metavar="DIR")
    parser.add_argument("--rounds", type=int, default=3, metavar="N")
    parser.add_argument("--scale", type=float, default=1.0, metavar="X", help="a fraction of the work")
    arguments = parser.parse_args()
    if os.geteuid() != 0:
        print("error: loop devices and mounts need root", file=sys.stderr)
        return 2
    folder = arguments.work.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    try:
        work = prepare(folder, WorkSize.scaled(arguments.scale), (Path("/usr"), Path("/opt")))
        taken = _take(work, folder / "restoring", arguments.rounds)
    except BenchError as err:
        print(f"error: {err}", file=sys.stderr)
        return 2
    machine = describe_machine(folder)
    print(f"* Date: {machine.date}. Machine: {machine.cpu}, {machine.cores} cores, Linux {machine.kernel}.")
    print(f"* Work: {describe_work(work)}; {arguments.rounds} rounds, medians.\n")
    print(_format(taken))
    return 0


def _take(work: ReferenceWork, folder: Path, rounds: int) -> list[Taken]:
    source = folder / "source"
    tools: list[tuple[str, Tool]] = [(FULL, Blocksnap(None)), (COPY, Copy(None))]
    if Restic(None).version() is None:
        print("skipped: restic is not installed", file=sys.stderr)
    else:
        tools.insert(1, (PEER, Restic(None)))
    places = {form: Place(root=folder / tool.name, source=source) for form, tool in tools}
    taken: list[Taken] = []
    try:
        for form, tool in tools:
            _back_up_both_days(tool, places[form], work)
        for number in range(rounds):
            for form, tool in (*tools[number % len(tools) :], *tools[: number % len(tools)]):
                taken.append(_restore(form, tool, places[form], work))
                if form == FULL:
                    taken.append(_roll_back(places[form], work))
                    taken.append(_read_mounted(places[form], work))
    finally:
        for place in places.values():
            place.remove()
    return taken


def _back_up_both_days(tool: Tool, place: Place, work: ReferenceWork) -> None:
    place.remove()
    place.create()
    create = tool.create(place)
    if create is None:
        return
    run(*create.argv, cwd=create.cwd, environment=create.environment)
    for day in (1, 2):
        with work.presented(day, place.source):
            command = tool.backup(place, day=day)
            run(*command.argv, cwd=command.cwd, environment=command.environment)


def _restore(form: str, tool: Tool, place: Place, work: ReferenceWork) -> Taken:
    place.restored_volume.unlink(missing_ok=True)
    with work.presented(2, place.source):
        taken = _measure(form, tool, place, place.source if form == COPY else place.repository, tool.restore)
    run("cmp", "--silent", str(place.restored_volume), str(work.day2))
    return taken


def _roll_back(place: Place, work: ReferenceWork) -> Taken:
    """The file that was just restored holds day two; what differs is found by reading it."""
    tool = Blocksnap(None)
    listed = run(
        *tool.command(place, "list", "--repo", str(place.repository), "--json", cwd=place.root).argv,
        cwd=place.root,
        environment=tool.environment(place),
    )
    first = listed.split('"id": "', 1)[1][:32]
    words = ("restore", "--repo", str(place.repository), first, str(place.restored_volume), "--in-place")
    taken = _measure(
        IN_PLACE, tool, place, place.restored, lambda _: tool.command(place, *words, cwd=place.root)
    )
    run("cmp", "--silent", str(place.restored_volume), str(work.day1))
    return taken


def _measure(form: str, tool: Tool, place: Place, reads: Path, command: Callable[[Place], object]) -> Taken:
    sync_seconds(place.root)
    read_through(reads)
    log = place.state / "out"
    cost = measure(command(place), Output(log, log), deadline_seconds=DEADLINE_SECONDS)
    sync_s = sync_seconds(place.root)
    taken = Taken(form, cost.wall_s, sync_s, cost.cpu_s, cost.max_rss_bytes / (1 << 20), cost.other_cpu_s)
    print(f"{form} ({tool.name}): {taken.wall_s:.2f} s + sync {sync_s:.2f} s", file=sys.stderr)
    return taken


def _read_mounted(place: Place, work: ReferenceWork) -> Taken:
    read_through(place.repository)
    with _mounted(place) as image:
        buffer = memoryview(bytearray(1 << 20))
        total, began = 0, time.perf_counter()
        with image.open("rb", buffering=0) as file:
            while count := file.readinto(buffer):
                total += count
        wall_s = time.perf_counter() - began
    if total != work.size.image_bytes:
        raise BenchError(f"{total} bytes were read of an image of {work.size.image_bytes}")
    print(f"{MOUNTED}: {wall_s:.2f} s", file=sys.stderr)
    return Taken(MOUNTED, wall_s, 0.0, 0.0, 0.0, 0.0)


@contextmanager
def _mounted(place: Place) -> Iterator[Path]:
    tool = Blocksnap(None)
    folder = place.root / "mounted"
    folder.mkdir(exist_ok=True)
    words = ("mount", "--repo", str(place.repository), "latest", str(folder))
    argv = tool.command(place, *words, cwd=place.root).argv
    process = subprocess.Popen(argv, cwd=place.root, env=tool.environment(place), stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + MOUNT_SECONDS
        while not os.path.ismount(folder):
            if process.poll() is not None or time.monotonic() > deadline:
                raise BenchError("blocksnap mount did not mount")
            time.sleep(0.05)
        yield folder / "image"
    finally:
        subprocess.run(["umount", "--lazy", folder], check=False, stderr=subprocess.DEVNULL)
        process.wait(timeout=MOUNT_SECONDS)


def _format(taken: list[Taken]) -> str:
    forms = list(dict.fromkeys(one.form for one in taken))
    wall = {form: statistics.median(one.wall_s for one in taken if one.form == form) for form in forms}
    both = {
        form: statistics.median(one.wall_s + one.sync_s for one in taken if one.form == form)
        for form in forms
    }
    lines = [
        "| form | wall s | wall + sync s | CPU s | peak RSS MiB | others' CPU s |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for form in forms:
        mine = [one for one in taken if one.form == form]
        cpu, rss = statistics.median(one.cpu_s for one in mine), max(one.rss_mib for one in mine)
        others = statistics.median(one.others_s for one in mine)
        lines.append(
            f"| {form} | {wall[form]:.2f} | {both[form]:.2f} | {cpu:.2f} | {rss:.0f} | {others:.2f} |"
        )
    lines += ["", "| goal | limit | by wall | by wall + sync |", "| --- | --- | --- | --- |"]
    for name, above, below, limit in (
        ("restore against restic", FULL, PEER, "<= 0.45 x"),
        ("restore against cp", FULL, COPY, "<= 1.50 x"),
        ("in place against full", IN_PLACE, FULL, ""),
        ("mount against restore", MOUNTED, FULL, "<= 2.00 x"),
    ):
        if above in wall and below in wall:
            ratios = (wall[above] / wall[below], both[above] / both[below])
            lines.append(f"| {name} | {limit} | {ratios[0]:.2f} x | {ratios[1]:.2f} x |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
