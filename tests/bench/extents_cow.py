"""The extent benchmark's section on classic snapshots: the exception store of one with 10 GiB changed."""

import sys
from pathlib import Path

from extent_rounds import BLOCKSNAP, MIB, Case, Contender, Goal, Say, Section, Verdict, take
from measure import run

TITLE = "Classic snapshots"
INTRODUCTION = """
An exception store of 2.6 million chunks of 4 KiB, which is 10 GiB changed one by one in a volume of 1 TiB:
10,241 areas of 4 KiB, a megabyte apart, read with O_DIRECT from a file with holes between them. There is no
peer in Debian that reads such a store, so the comparison is with a script in plain Python that does the same
(`tests/bench/cow_reader.py`). "areas known" is what a backup does, to which device-mapper has said how many
areas are full; "one by one" is an image of which nothing is known. Both print 2.6 million extents as JSON,
which the memory and the time of their processes are made of; "prints nothing" is the same engine without.
"""
EXCEPTIONS = 10 * 1024 * 256
ORIGIN_BYTES = 1 << 40
MEMORY_LIMIT_MIB = 200
WORK = f"{EXCEPTIONS / 1e6:.1f} million exceptions"


def measure(folder: Path, rounds: int, say: Say) -> Section:
    """Build the store if it is missing, and measure."""
    image = folder / "store"
    if not image.exists():
        say(f"building {image.name}")
        # In a process of its own: what it needs must not count as the floor of what is measured.
        builder = str(Path(__file__).with_name("cow_images.py"))
        run(sys.executable, builder, str(EXCEPTIONS), str(ORIGIN_BYTES // 4096), str(image))
        run("sync", "--file-system", str(folder))
    command = (BLOCKSNAP, "debug", "cow-extents", str(image), "--origin-size", str(ORIGIN_BYTES))
    known = ("--settled-areas", str(EXCEPTIONS // 256))
    reader = str(Path(__file__).with_name("cow_reader.py"))
    case = Case(
        WORK,
        (
            Contender("areas known", (*command, *known, "--json"), ours=True),
            Contender("one by one", (*command, "--json"), ours=True),
            Contender("prints nothing", (*command, *known, "--quiet")),
            Contender("plain Python", (sys.executable, reader, str(image))),
        ),
        (
            Goal("areas known", "plain Python", "engine", 1 / 4),
            Goal("prints nothing", "plain Python", "process", 1.0),
        ),
    )
    section = take([case], folder, rounds, say)
    quiet = section.of(WORK, "prints nothing")
    if quiet is None:
        return section
    found = quiet.quantity("memory") / MIB
    verdict = Verdict(
        f"{WORK}: memory of the process that prints nothing",
        f"<= {MEMORY_LIMIT_MIB} MiB",
        f"{found:.0f} MiB",
        met=found <= MEMORY_LIMIT_MIB,
    )
    return Section(section.taken, (*section.verdicts, verdict), section.left_out)
