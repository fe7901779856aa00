"""A subvolume's backup read through the tree that `mount` shows, beside its restore.

    make bench-trees

A large file of random bytes and many small ones. Prints MiB/s of both for the large file (the goal is half of
what restore does), what it takes to look at all inodes and to read all small files, and the most memory that
the process which serves them had. Page caches are dropped before each.
"""

from __future__ import annotations

import argparse
import os
import random
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from support.btrfs_lab import BtrfsLab, btrfs_lab
from support.commands import CommandLine
from support.shown import shown

MIB = 1 << 20
PER_FOLDER = 500


def fill(lab: BtrfsLab, files: int, mib: int) -> None:
    dice = random.Random(1)
    (lab.live / "large").mkdir()
    with (lab.live / "large" / "file").open("wb") as file:
        for _ in range(mib):
            file.write(dice.randbytes(MIB))
    for number in range(files):
        folder = lab.live / f"{number // PER_FOLDER:04}"
        folder.mkdir(exist_ok=True)
        (folder / f"{number:06}").write_bytes(dice.randbytes(dice.randrange(8192)))
    lab.sync()


def seconds(work: Callable[[], object]) -> float:
    Path("/proc/sys/vm/drop_caches").write_text("3\n")
    began = time.monotonic()
    work()
    return time.monotonic() - began


def read(path: Path) -> None:
    with path.open("rb", buffering=0) as file:
        while file.read(MIB):
            pass


def look(tree: Path) -> None:
    for folder, _, names in os.walk(tree):
        for name in names:
            os.lstat(os.path.join(folder, name))


def read_small(tree: Path) -> None:
    for folder in sorted(tree.iterdir()):
        if folder.name != "large":
            for path in sorted(folder.iterdir()):
                read(path)


def peak_of(pid: int) -> int:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) >> 10


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--files", type=int, default=20_000)
    parser.add_argument("--mib", type=int, default=1024)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name, btrfs_lab(Path(name), size=4 << 30) as lab:
        folder = Path(name)
        fill(lab, options.files, options.mib)
        blocksnap = CommandLine(folder)
        blocksnap.done("init")
        blocksnap.done("backup", "-q", lab.live)
        whole = seconds(lambda: blocksnap.done("restore", "-q", "latest", lab.mount / "back"))
        (folder / "out").mkdir()
        copied = seconds(lambda: blocksnap.done("files", "latest", "large", "--to", folder / "out"))
        with shown(blocksnap, "latest", folder / "tree") as process:
            large = seconds(lambda: read(folder / "tree" / "large" / "file"))
            looked = seconds(lambda: look(folder / "tree"))
            small = seconds(lambda: read_small(folder / "tree"))
            peak = peak_of(process.pid)
    print(f"restore of all, with the start of the process: {whole:.2f} s")
    print(f"large file: files --to {options.mib / copied:.0f} MiB/s, mount {options.mib / large:.0f} MiB/s")
    verdict = "reached" if large <= 2 * copied else "MISSED"
    print(f"mount has {copied / large:.2f} of what a copy has; the goal of 0.5 is {verdict}")
    print(f"{options.files:,} small files: all inodes in {looked:.2f} s, all bytes in {small:.2f} s")
    print(f"the serving process had {peak} MiB at most")


if __name__ == "__main__":
    main()
