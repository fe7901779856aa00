"""The extent benchmark's section on thin pools: thin-tree and thin-time beside thin_delta and thin_dump."""

import shutil
import sys
from pathlib import Path

from extent_rounds import BLOCKSNAP, Case, Contender, Goal, Say, Section, Verdict, take
from measure import BenchError, run

TITLE = "Thin pools"
INTRODUCTION = """
Metadata made by `tests/support/thin_builder.py` and accepted by `thin_check`: a volume of 1 TiB, wholly
mapped, 64 KiB a chunk, whose data and metadata blocks lie in random order, as after years of random writes,
with snapshots between which 0.01 % of the chunks changed in clusters of 64, or 1 % one by one; and volumes of
128 GiB, 1 TiB and 8 TiB with 1,000 changed chunks, in clusters of 64 or one by one. `thin_delta` and
`thin_dump` are those of thin-provisioning-tools 0.9.0; they and blocksnap read the same file with O_DIRECT,
so from the disk.
"engine s" is what `blocksnap debug --json` reports; "process s" has the start of Python in it. Goals on
time compare our engine with the whole of their process, goals on memory compare whole processes.
"""
TIB_CHUNKS = 1 << 24
MAIN_CHANGES = (1678, TIB_CHUNKS // 100)
FIXED = 1000
WAYS = {"in clusters": (2, 3), "one by one": (4, 5)}
"""The devices between which the fixed number of chunks changed."""
SIZES = {"128 GiB": 1 << 21, "1 TiB": 1 << 24, "8 TiB": 1 << 27}
IDENTICAL_LIMIT_S = 0.005
GROWTH_LIMIT = 1.5


def measure(folder: Path, rounds: int, say: Say) -> Section:
    """Build the images that are missing, and measure."""
    if shutil.which("thin_delta") is None:
        raise BenchError("thin_delta is not installed: apt-get install thin-provisioning-tools")
    images = {
        name: _image(folder, name, (size, *(MAIN_CHANGES if size == TIB_CHUNKS else (FIXED, 0)), FIXED), say)
        for name, size in SIZES.items()
    }
    main = images["1 TiB"]
    cases = [
        _against_delta("0.01 % in clusters", main, 2, 3, time=1 / 100, memory=1 / 20),
        _against_delta("1 % scattered", main, 3, 4, time=1 / 4),
        _against_dump(main),
        *(
            Case(f"{FIXED:,} chunks {way}, {name}", (_diff(image, *devices),), deadline_seconds=600)
            for way, devices in WAYS.items()
            for name, image in images.items()
            if way != "in clusters" or SIZES[name] != TIB_CHUNKS
        ),
        *(Case(f"identical, {name}", (_diff(image, 5, 6),)) for name, image in images.items()),
    ]
    section = take(cases, folder, rounds, say)
    return Section(section.taken, section.verdicts + _own_verdicts(section), section.left_out)


def _image(folder: Path, name: str, work: tuple[int, ...], say: Say) -> Path:
    path = folder / f"{name.replace(' ', '-')}.meta"
    if not path.exists():
        say(f"building {path.name}")
        # In a process of its own: what it needs must not count as the floor of what is measured.
        builder = str(Path(__file__).with_name("thin_images.py"))
        run(sys.executable, builder, *map(str, work), str(path))
        run("sync", "--file-system", str(folder))
    return path


def _diff(image: Path, base: int, device: int) -> Contender:
    argv = (BLOCKSNAP, "debug", "thin-diff", str(image), str(base), str(device), "--json")
    return Contender("thin-tree", argv, ours=True)


def _against_delta(
    title: str, image: Path, base: int, device: int, *, time: float, memory: float | None = None
) -> Case:
    delta = Contender("thin_delta", ("thin_delta", "--snap1", str(base), "--snap2", str(device), str(image)))
    goals = [Goal("thin-tree", "thin_delta", "engine", time)]
    if memory is not None:
        goals.append(Goal("thin-tree", "thin_delta", "memory", memory))
    return Case(title, (_diff(image, base, device), delta), tuple(goals))


def _against_dump(image: Path) -> Case:
    listing = (BLOCKSNAP, "debug", "thin-extents", str(image), "4", "--json")
    by_time = (*listing, "--size", str(TIB_CHUNKS << 16), "--since", "2")
    dump = Contender("thin_dump", ("thin_dump", "--dev-id", "4", str(image)))
    return Case(
        f"all {TIB_CHUNKS / 1e6:.1f} million mappings",
        (Contender("listing", listing, ours=True), Contender("thin-time", by_time, ours=True), dump),
        (
            Goal("listing", "thin_dump", "engine", 1 / 4),
            Goal("thin-time", "thin_dump", "engine", 1 / 4),
        ),
    )


def _own_verdicts(section: Section) -> tuple[Verdict, ...]:
    """Judge the goals that are between cases, or in seconds."""
    small, *_, large = SIZES
    verdicts = []
    for way in WAYS:
        ends = [section.of(f"{FIXED:,} chunks {way}, {name}", "thin-tree") for name in (small, large)]
        if ends[0] and ends[1]:
            growth = ends[1].quantity("engine") / ends[0].quantity("engine")
            text = f"{FIXED:,} changed chunks {way}: time of {large}, against {small}"
            limit = f"<= {GROWTH_LIMIT} x"
            verdicts.append(Verdict(text, limit, f"{growth:.2f} x", met=growth <= GROWTH_LIMIT))
    for name in SIZES:
        same = section.of(f"identical, {name}", "thin-tree")
        if same:
            seconds = same.quantity("engine")
            limit = f"<= {IDENTICAL_LIMIT_S * 1000:.0f} ms"
            met = seconds <= IDENTICAL_LIMIT_S
            verdicts.append(Verdict(f"identical roots, {name}", limit, f"{seconds * 1000:.2f} ms", met=met))
    return tuple(verdicts)
