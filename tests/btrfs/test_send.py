"""btrfs-send on real filesystems: against the truth, against btrfs-tree, against a reader in plain Python."""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from blocksnap.extents.btrfs import compare_snapshots, find_subvolume_changes
from blocksnap.extents.btrfs_send import compare_by_send
from blocksnap.system.btrfs import open_subvolume
from support.btrfs_covers import covers
from support.btrfs_lab import MOUNTS, BtrfsLab
from support.btrfs_model import Backup
from support.btrfs_truth import Tree, capture
from support.btrfs_work import Workload

LabMaker = Callable[[str], BtrfsLab]
EMPTY = Tree({}, frozenset())


@contextmanager
def opened(*snapshots: Path) -> Iterator[list[int]]:
    with contextlib.ExitStack() as stack:
        fds = []
        for snapshot in snapshots:
            fds.append(open_subvolume(str(snapshot)))
            stack.callback(os.close, fds[-1])
        yield fds


def stream(base: Path, snapshot: Path, version: int) -> bytes:
    argv = ["btrfs", "send", "-q", "--no-data", "--proto", str(version), "-p", str(base), str(snapshot)]
    return subprocess.run(argv, check=True, stdout=subprocess.PIPE).stdout


def rounds(lab: BtrfsLab, seed: int, count: int, versions: tuple[int, ...] = (1, 2)) -> tuple[int, int]:
    """Follow a subvolume by btrfs-send alone; return blocks that changed, and that were reported."""
    with contextlib.closing(Workload(lab.live, seed, beside=lab.mount)) as work:
        return follow(lab, work, count, versions)


def follow(lab: BtrfsLab, work: Workload, count: int, versions: tuple[int, ...]) -> tuple[int, int]:
    backups = {version: Backup() for version in versions}
    work.run(80)
    base = lab.snapshot()
    before = capture(base)
    changed = reported = 0
    with opened(base) as (fd,):
        for backup in backups.values():
            # All of it, once, by the other engine.
            backup.update(find_subvolume_changes(fd, None), before)
    for _ in range(count):
        work.run(work.random.randrange(1, 40))
        snapshot = lab.snapshot()
        after = capture(snapshot)
        with opened(base, snapshot) as (base_fd, fd):
            for version, backup in backups.items():
                told = list(compare_by_send(fd, base_fd, version=version).walk)
                coverage = covers(compare_snapshots(fd, base_fd).walk, told, before, after)
                assert not coverage.problems, coverage.problems
                answer = compare_by_send(fd, base_fd, version=version)
                assert answer.method == "btrfs-send"
                tally = backup.update(answer, after)
                assert not tally.missed
                changed += tally.changed
                reported += tally.reported
        lab.delete(base)
        base, before = snapshot, after
    return changed, reported


@pytest.mark.parametrize("mount", sorted(MOUNTS))
def test_applied_to_the_parent_it_gives_the_child(make_lab: LabMaker, mount: str) -> None:
    changed, reported = rounds(make_lab(mount), seed=17, count=12)
    assert 0 < changed <= reported
