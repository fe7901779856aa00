"""The extent benchmark's section on btrfs: btrfs-tree beside `btrfs send --no-data`."""

import os
import random
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from extent_rounds import BLOCKSNAP, Case, Contender, Goal, Say, Section, take
from measure import BenchError, run

TITLE = "btrfs"
INTRODUCTION = """
A subvolume of 100,000 files of up to 16 KiB in 1,000 directories and an
image of 20,000 extents, and read-only snapshots of it between which nothing changed; 100 and 10,000 files,
of ten of which seven were written to, one renamed, one given another mode and one replaced; and 2,000
extents of the image. `btrfs send --no-data -p` is what the kernel can do by itself; its stream goes to
/dev/null. Metadata is in the page cache for both. "engine s" is what `blocksnap debug btrfs-diff --json`
reports; "process s" has the start of Python, the paths and the JSON in it. Goals compare our engine with
the whole of the other process.
"""
FILES = 100_000
FILES_A_FOLDER = 100
IMAGE_EXTENTS = 20_000
IMAGE_CHANGES = 2_000
CHANGES = {"nothing": 0, "100 files": 100, "10,000 files": 10_000}
SIZE = 6 << 30
BLOCK = 4096
SEED = 4


def measure(folder: Path, rounds: int, say: Say) -> Section:
    """Build the filesystem if it is missing, mount it, and measure."""
    if os.geteuid() != 0 or shutil.which("btrfs") is None:
        raise BenchError("btrfs is not installed (apt-get install btrfs-progs), or this is not root")
    image = folder / "btrfs.img"
    if not image.exists():
        say("building a filesystem of 100,000 files")
        _build(folder, image)
    with _mounted(image, folder / "mnt") as mount:
        names = ["base", *CHANGES, "image"]
        cases = [
            _case(title, mount / f"snapshot-{names[at]}", mount / f"snapshot-{names[at + 1]}", limit)
            for at, (title, limit) in enumerate(
                [("nothing changed", 1.2), ("100 files", 1.2), ("10,000 files", 1.0), ("2,000 extents", 1.0)]
            )
        ]
        return take(cases, folder, rounds, say)


def _case(title: str, base: Path, snapshot: Path, limit: float) -> Case:
    ours = (BLOCKSNAP, "debug", "btrfs-diff", "--json", str(base), str(snapshot))
    send = ("btrfs", "-q", "send", "--no-data", "-p", str(base), "-f", "/dev/null", str(snapshot))
    return Case(
        title,
        (Contender("btrfs-tree", ours, ours=True), Contender("btrfs send", send)),
        (Goal("btrfs-tree", "btrfs send", "engine", limit),),
    )


@contextmanager
def _mounted(image: Path, point: Path) -> Iterator[Path]:
    point.mkdir(exist_ok=True)
    run("mount", "-o", "loop,noatime", str(image), str(point))
    try:
        yield point
    finally:
        run("umount", str(point))


def _build(folder: Path, image: Path) -> None:
    """Make the filesystem under another name first: what is there is complete."""
    unfinished = image.with_suffix(".new")
    unfinished.unlink(missing_ok=True)
    with unfinished.open("wb") as file:
        file.truncate(SIZE)
    run("mkfs.btrfs", "-q", str(unfinished))
    with _mounted(unfinished, folder / "mnt") as mount:
        live = mount / "live"
        run("btrfs", "subvolume", "create", str(live))
        choice = random.Random(SEED)
        pool = choice.randbytes(1 << 20)
        for number in range(FILES):
            path = _path(live, number)
            if number % FILES_A_FOLDER == 0:
                path.parent.mkdir()
            at = choice.randrange(len(pool) - (16 << 10))
            path.write_bytes(pool[at : at + choice.randrange(16 << 10)])
        disk = live / "disk.img"
        _write_image(disk, choice.sample(range(IMAGE_EXTENTS), IMAGE_EXTENTS), pool)
        _snapshot(mount, "base")
        for name, count in CHANGES.items():
            for number in choice.sample(range(FILES), count):
                _change(_path(live, number), number % 10, choice)
            _snapshot(mount, name)
        _write_image(disk, choice.sample(range(IMAGE_EXTENTS), IMAGE_CHANGES), pool)
        _snapshot(mount, "image")
    unfinished.rename(image)


def _path(live: Path, number: int) -> Path:
    return live / f"folder-{number // FILES_A_FOLDER:04}" / f"file-{number:06}"


def _write_image(path: Path, blocks: list[int], pool: bytes) -> None:
    """Write single blocks, far enough from one another that each is an extent of its own."""
    with path.open("r+b" if path.exists() else "wb", buffering=0) as file:
        for block in blocks:
            file.seek(block * 2 * BLOCK)
            file.write(pool[block * 32 % (len(pool) - BLOCK) :][:BLOCK])
        os.fsync(file.fileno())


def _change(path: Path, kind: int, choice: random.Random) -> None:
    if not path.exists():
        path = path.with_suffix(".renamed")
    if kind < 7:
        with path.open("r+b") as file:
            file.seek(choice.randrange(16 << 10))
            file.write(choice.randbytes(BLOCK))
    elif kind == 7:
        path.rename(path.with_suffix(".renamed"))
    elif kind == 8:
        path.chmod(0o600)
    else:
        path.unlink()
        path.write_bytes(choice.randbytes(BLOCK))


def _snapshot(mount: Path, name: str) -> None:
    # What a transaction did before its snapshot would be looked at again.
    run("btrfs", "filesystem", "sync", str(mount))
    run("btrfs", "subvolume", "snapshot", "-r", str(mount / "live"), str(mount / f"snapshot-{name}"))
