"""The extent benchmark's section on files: fiemap beside the bare ioctls, compare beside cmp."""

import fcntl
import os
import random
import shutil
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from extent_rounds import BLOCKSNAP, Case, Contender, Goal, Say, Section, Verdict, take
from measure import BenchError, read_through, run

TITLE = "Files: clones on XFS, and comparison by reading"
INTRODUCTION = """
Two clones (FICLONE) of a file of a million extents, one block each, on XFS with blocks of 1 KiB; between
them 1,000 blocks were overwritten. "both scans alone" asks FIEMAP for both maps with the same buffers and
does nothing with the answers: what fiemap takes longer is what the comparison costs. And equal files of
4 GiB, wholly written or with 1 % of them in pieces of 64 KiB, compared by reading them from the page cache
(8 GiB of it), beside `cmp`, which does not know holes.
"""
EXTENTS = 1_000_000
CHANGED = 1_000
BLOCK = 1024
FILE_BYTES = 4 << 30
PIECE = 64 << 10
MOST_OVER_THE_SCANS = 1.1
CLONED, FULL, SPARSE = "two clones of a million extents", "4 GiB, full", "4 GiB, 1 % written"
_FICLONE = 0x40049409


def measure(folder: Path, rounds: int, say: Say) -> Section:
    """Make the files that are missing, and measure."""
    if os.geteuid() != 0 or shutil.which("mkfs.xfs") is None:
        raise BenchError("an XFS on a loop device needs root and xfsprogs")
    pairs = {FULL: _pair(folder, "full", 1, say), SPARSE: _pair(folder, "sparse", 100, say)}
    with ExitStack() as stack:
        base, later = stack.enter_context(_clones(folder, say))
        cases = [_scans(base, later), *(_comparison(title, *pair) for title, pair in pairs.items())]
        section = take(cases, folder, rounds, say)
    return Section(section.taken, section.verdicts + _rates(section), section.left_out)


def _scans(base: Path, later: Path) -> Case:
    ours = (BLOCKSNAP, "debug", "fiemap-diff", str(base), str(later), "--json")
    bare = (sys.executable, str(Path(__file__).with_name("fiemap_scan.py")), str(base), str(later))
    return Case(
        CLONED,
        (Contender("fiemap", ours, ours=True), Contender("both scans alone", bare, ours=True)),
        (Goal("fiemap", "both scans alone", "engine", MOST_OVER_THE_SCANS),),
    )


def _comparison(title: str, base: Path, later: Path) -> Case:
    ours = (BLOCKSNAP, "debug", "compare", str(base), str(later), "--json")

    def warm() -> None:
        for path in (base, later):
            read_through(path)

    return Case(
        title,
        (
            Contender("compare", ours, ours=True, before=warm),
            Contender("cmp", ("cmp", str(base), str(later)), before=warm),
        ),
        (Goal("compare", "cmp", "engine", 1.0),),
    )


def _rates(section: Section) -> tuple[Verdict, ...]:
    ours, peer = section.of(FULL, "compare"), section.of(FULL, "cmp")
    if ours is None or peer is None:
        return ()
    rates = [FILE_BYTES / one.quantity("engine") / 1e9 for one in (ours, peer)]
    found = f"{rates[0]:.2f} GB/s, cmp {rates[1]:.2f} GB/s"
    return (Verdict(f"{FULL}: rate at which both are read", "as cmp", found, rates[0] >= rates[1]),)


def _pair(folder: Path, name: str, stride: int, say: Say) -> tuple[Path, Path]:
    paths = folder / f"{name}-base", folder / f"{name}-later"
    pieces = random.Random(1).randbytes(PIECE * 64)
    for path in paths:
        if path.exists():
            continue
        say(f"writing {path.name}")
        making = path.with_suffix(".making")
        with making.open("wb") as file:
            file.truncate(FILE_BYTES)
            for number in range(0, FILE_BYTES // PIECE, stride):
                file.seek(number * PIECE)
                file.write(pieces[number % 64 * PIECE :][:PIECE])
        making.rename(path)
    return paths


@contextmanager
def _clones(folder: Path, say: Say) -> Iterator[tuple[Path, Path]]:
    image = folder / "xfs.img"
    if new := not image.exists():
        say(f"making {image.name}")
        with image.open("wb") as file:
            file.truncate(4 << 30)
        run("mkfs.xfs", "-q", "-m", "reflink=1", "-b", f"size={BLOCK}", str(image))
    with TemporaryDirectory() as place:
        run("mount", "-o", "loop", str(image), place)
        try:
            if new:
                _fill(Path(place))
            yield Path(place) / "base", Path(place) / "later"
        except BaseException:
            if new:
                image.unlink()
            raise
        finally:
            run("umount", place)


def _fill(mount: Path) -> None:
    rng = random.Random(1)
    live = os.open(mount / "live", os.O_RDWR | os.O_CREAT, 0o600)
    try:
        content = rng.randbytes(BLOCK)
        for number in range(EXTENTS):
            os.pwrite(live, content, number * 2 * BLOCK)
        _clone(live, mount / "base")
        for number in rng.sample(range(EXTENTS), CHANGED):
            os.pwrite(live, rng.randbytes(BLOCK), number * 2 * BLOCK)
        _clone(live, mount / "later")
    finally:
        os.close(live)


def _clone(source: int, path: Path) -> None:
    target = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.ioctl(target, _FICLONE, source)
        os.fsync(target)
    finally:
        os.close(target)
