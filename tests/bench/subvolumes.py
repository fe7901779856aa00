"""100,000 files in a btrfs subvolume, 100 of them touched: what an incremental costs beside the full backup.

    make bench-subvolumes

Prints seconds, bytes read, bytes of metadata stored and inodes looked at, for both, and their quotients; the
goal is 1/20 or less for time and metadata. ``wall`` is that of the process, with starting Python and deriving
the key, which are the same for both; ``seconds`` that of the run.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from support.btrfs_lab import BtrfsLab, btrfs_lab
from support.commands import CommandLine

PER_FOLDER = 500
GOAL = 20


def fill(lab: BtrfsLab, files: int, rng: random.Random) -> list[Path]:
    """Make files of 0 to 8 KiB, some hundred in each directory."""
    made = []
    for number in range(files):
        folder = lab.live / f"{number // PER_FOLDER:04}"
        if number % PER_FOLDER == 0:
            folder.mkdir()
        path = folder / f"{number:06}"
        path.write_bytes(rng.randbytes(rng.randrange(8192)))
        made.append(path)
    lab.sync()
    return made


def back_up(blocksnap: CommandLine, lab: BtrfsLab) -> dict[str, Any]:
    began = time.monotonic()
    outcome = blocksnap.done("backup", "--json", lab.live)
    (backup,) = outcome.backups
    inodes = next(event for event in outcome.events if event["event"] == "inodes")
    return {**backup, "wall": time.monotonic() - began, "touched": inodes["touched"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--files", type=int, default=100_000)
    parser.add_argument("--touched", type=int, default=100)
    options = parser.parse_args()
    rng = random.Random(1)
    with tempfile.TemporaryDirectory() as folder, btrfs_lab(Path(folder), size=4 << 30) as lab:
        files = fill(lab, options.files, rng)
        blocksnap = CommandLine(Path(folder))
        blocksnap.done("init")
        full = back_up(blocksnap, lab)
        later = []
        for _ in range(3):
            for path in rng.sample(files, options.touched):
                path.write_bytes(rng.randbytes(rng.randrange(8192)))
            lab.sync()
            later.append(back_up(blocksnap, lab))
    print(f"{'':12}{'wall':>8}{'seconds':>9}{'read':>14}{'metadata':>14}{'inodes':>10}")
    for name, one in (("full", full), *(("incremental", each) for each in later)):
        print(
            f"{name:12}{one['wall']:8.2f}{one['seconds']:9.2f}{one['read_bytes']:14,}"
            f"{one['metadata_bytes']:14,}{one['touched']:10,}"
        )
    for what in ("wall", "seconds", "metadata_bytes"):
        share = statistics.median(each[what] for each in later) / full[what]
        verdict = "reached" if share * GOAL <= 1 else "MISSED"
        print(f"{what}: 1/{1 / share:.1f} of the full backup's; the goal of 1/{GOAL} is {verdict}")


if __name__ == "__main__":
    main()
