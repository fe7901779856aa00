"""The load that the other tests of btrfs rely on is varied, and the same for the same seed."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from support.btrfs_lab import MOUNTS, BtrfsLab
from support.btrfs_truth import Tree, capture, compare
from support.btrfs_work import Workload

LabMaker = Callable[[str], BtrfsLab]


def shape(tree: Tree) -> dict[str, tuple[object, ...]]:
    """Everything of a tree that does not come from the clock or from where blocks lie."""
    return {
        name: (
            inode.mode,
            inode.uid,
            inode.gid,
            inode.size,
            inode.rdev,
            inode.target,
            inode.xattrs,
            inode.content,
        )
        for inode in tree.inodes.values()
        for name in inode.names
    }


def test_the_same_seed_gives_the_same_tree(make_lab: LabMaker) -> None:
    labs = [make_lab("noatime"), make_lab("noatime")]
    trees = []
    for lab in labs:
        work = Workload(lab.live, 11)
        work.run(600)
        work.close()
        trees.append(shape(capture(lab.snapshot())))
    assert trees[0] == trees[1]
    assert len(trees[0]) > 20


def test_every_operation_succeeds_now_and_then(lab: BtrfsLab) -> None:
    work = Workload(lab.live, 5, beside=lab.mount)
    # Those that are chosen rarely get their turn by name.
    for _ in range(12):
        work.run(150)
        for name in work.operations:
            if not work.done[name]:
                work.do(name)
    work.close()
    assert not [name for name in work.operations if not work.done[name]]
    assert work.done.total() > 4 * work.refused.total()


@pytest.mark.parametrize("mount", sorted(MOUNTS))
def test_it_runs_under_every_mount_option(make_lab: LabMaker, mount: str) -> None:
    lab = make_lab(mount)
    work = Workload(lab.live, 3, beside=lab.mount)
    work.run(150)
    parent = capture(lab.snapshot())
    work.run(100)
    child = capture(lab.snapshot())
    work.close()
    found = compare(parent, child)
    assert found.added
    assert found.changed
    assert any(change.ranges for change in found.changed.values())


def test_the_truth_knows_what_was_done(lab: BtrfsLab) -> None:
    live = lab.live
    (live / "kept").write_bytes(b"k" * 10000)
    (live / "written").write_bytes(b"w" * 20000)
    (live / "cut").write_bytes(b"c" * 20000)
    (live / "old").write_bytes(b"o")
    (live / "gone").write_bytes(b"g")
    number = {path.name: path.stat().st_ino for path in live.iterdir()}
    parent = capture(lab.snapshot())
    with (live / "written").open("r+b") as file:
        file.seek(5000)
        file.write(b"x")
        file.seek(24000)
        file.write(b"y")
    with (live / "cut").open("r+b") as file:
        file.truncate(6000)
    (live / "old").rename(live / "new")
    (live / "gone").unlink()
    (live / "fresh").mkdir()
    child = capture(lab.snapshot())
    found = compare(parent, child)
    assert found.removed == {number["gone"]}
    assert found.added == {(live / "fresh").stat().st_ino}
    written, cut, old = (found.changed[number[name]] for name in ("written", "cut", "old"))
    # What lies between the old end and the new data is zeros on both sides.
    assert written.ranges == [(4096, 4096), (20480, 24001 - 20480)]
    assert written.what == {"size", "mtime", "ctime"}
    assert cut.ranges == []
    assert cut.what == {"size", "mtime", "ctime"}
    assert old.what == {"names", "ctime"}
    assert number["kept"] not in found.changed
