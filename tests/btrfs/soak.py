"""Very many rounds without a base: ``make soak-btrfs ROUNDS=10000``.

Small filesystems, so that blocks are used again soon; another one, with other mount options, every few
hundred rounds. Prints a line for each with what it came to; anything missed is an AssertionError.
"""

from __future__ import annotations

import argparse
import signal
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from support.btrfs_lab import MOUNTS, btrfs_lab
from support.btrfs_model import Tally
from support.btrfs_rounds import Rounds

ROUNDS_A_LAB = 250
SIZE = 160 << 20


def soak(rounds: int, seed: int, *, keep_base: bool) -> Tally:
    """Do at least that many rounds and return what they came to."""
    total = Tally()
    reused = 0
    mounts = sorted(MOUNTS)
    number = seed
    while total.rounds < rounds:
        mount = mounts[number % len(mounts)]
        began = time.monotonic()
        with tempfile.TemporaryDirectory() as folder, btrfs_lab(Path(folder), mount=mount, size=SIZE) as lab:
            work = Rounds(lab, number, keep_base=keep_base)
            try:
                work.run(min(ROUNDS_A_LAB, rounds - total.rounds), operations=12)
            except AssertionError:
                print(f"seed {number}, {mount}, round {work.tally.rounds}", flush=True)
                raise
            finally:
                work.close()
        total.add(work.tally)
        reused += work.reused
        print(
            f"seed {number} {mount}: {time.monotonic() - began:.0f} s; in all {total.rounds} rounds,"
            f" {total.changed} blocks changed, {total.missed} missed, {total.excess} reported in excess,"
            f" {total.touched} inodes, {reused} addresses used again",
            flush=True,
        )
        number += 1
    return total


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=10000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--keep-base", action="store_true")
    options = parser.parse_args()
    # So that what is mounted is unmounted.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    total = soak(options.rounds, options.seed, keep_base=options.keep_base)
    assert total.missed == 0


if __name__ == "__main__":
    main()
