"""Round after round of random operations on a subvolume, with balance, defragmentation, dedupe in between.

Every round is backed up, restored and compared with a snapshot of the same instant; and the change tracking
has to have been used. ``BLOCKSNAP_SOAK_ROUNDS`` sets how many there are.
"""

from __future__ import annotations

import os
import random
import subprocess
from pathlib import Path

import pytest

from btrfs.conftest import LabMaker
from support.btrfs_lab import BtrfsLab
from support.btrfs_work import Workload
from support.commands import CommandLine
from support.file_trees import STUB, describe, differences
from support.loops import call

ROUNDS = int(os.environ.get("BLOCKSNAP_SOAK_ROUNDS", "2"))
FREE = 0x400 | 0x4
"""The flag `m` is the kernel's own for what it could not compress. A file made in a directory with `c`
where the mount says nodatacow has two flags that nobody can give it."""
NOT_KEPT = "flag compress (chattr +c)"
MOUNTS = ("noatime", "zstd", "nodatacow")


def compared(snapshot: Path, back: Path) -> list[str]:
    """Compare two trees, but for holes and the times of the directories in place of nested subvolumes."""
    trees = [describe(path, layouts=False) for path in (snapshot, back)]
    for tree in trees:
        for seen in tree.values():
            if "flags" in seen:
                seen["flags"] = hex(int(seen["flags"], 16) & ~FREE)
    for name in trees[0]:
        if (snapshot / name).lstat().st_ino == STUB:
            for tree in trees:
                tree[name] = {"mode": tree[name]["mode"]}
    return differences(*trees)


def disturb(lab: BtrfsLab, rng: random.Random) -> None:
    """Move blocks about: contents stay, addresses do not."""
    what = rng.choice(["balance", "defragment", "resize", "nothing"])
    if what == "balance":
        argv = ["btrfs", "balance", "start", "--force", rng.choice(["-d", "-m"]), str(lab.mount)]
        subprocess.run(argv, check=False, capture_output=True)
    elif what == "defragment":
        argv = ["btrfs", "filesystem", "defragment", "-r", str(lab.live)]
        subprocess.run(argv, check=False, capture_output=True)
    elif what == "resize":
        call("btrfs", "filesystem", "resize", rng.choice(["-16m", "max"]), lab.mount)


@pytest.mark.parametrize("mount", MOUNTS)
def test_rounds(make_lab: LabMaker, tmp_path: Path, mount: str) -> None:
    lab = make_lab(mount)
    blocksnap = CommandLine(tmp_path)
    blocksnap.done("init", "--no-encryption", "--chunk-size", "16K")
    rng = random.Random(mount)
    work = Workload(lab.live, rng.randrange(1 << 30), beside=lab.mount)
    try:
        for number in range(ROUNDS):
            work.run(rng.randrange(10, 60))
            disturb(lab, rng)
            lab.sync()
            (backup, *_) = blocksnap.done("backup", "--json", lab.live).backups
            assert backup["volume"] == str(lab.live)
            expected = ("btrfs-tree", "incremental") if number else ("compare", "full")
            assert (backup["method"], backup["kind"]) == expected, backup["reason"]
            snapshot, back = lab.snapshot(), lab.mount / "back"
            outcome = blocksnap("restore", "--json", f"{lab.live}@latest", back)
            assert outcome.code in (0, 3), outcome
            told = {each["what"] for each in outcome.events[-1]["not_kept"]}
            assert told <= {NOT_KEPT}, told
            assert compared(snapshot, back) == [], f"{mount}, round {number}"
            subprocess.run(["chattr", "-R", "-i", "-a", str(back)], check=False, capture_output=True)
            for path in (snapshot, back):
                lab.delete(path)
        blocksnap.done("check", "--read-data")
    finally:
        work.close()
