"""btrfs-tree on real filesystems: nothing is missed, with a kept base and without, whatever was done."""

from __future__ import annotations

import os
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from blocksnap import _native
from blocksnap.errors import VolumeError
from blocksnap.extents.btrfs import compare_files, compare_snapshots
from blocksnap.extents.btrfs_changes import Change, InodeChange, InodeRemoval
from blocksnap.extents.model import ExtentList
from support import btrfs_calls as calls
from support.btrfs_lab import MOUNTS, BtrfsLab, btrfs_lab
from support.btrfs_model import Backup
from support.btrfs_rounds import Rounds, opened
from support.btrfs_truth import capture
from support.loops import call

LabMaker = Callable[[str], BtrfsLab]
ROUNDS = 12
KIB = 1024


@contextmanager
def both(base: Path, snapshot: Path) -> Iterator[tuple[int, int]]:
    with opened(base) as base_fd, opened(snapshot) as fd:
        yield fd, base_fd


def changes_between(base: Path, snapshot: Path) -> list[Change]:
    with both(base, snapshot) as (fd, base_fd):
        answer = compare_snapshots(fd, base_fd)
        assert answer.inherits, answer.reason
        return list(answer.walk)


def inodes_of(changes: list[Change]) -> dict[int, InodeChange]:
    return {change.number: change for change in changes if isinstance(change, InodeChange)}


def removals_of(changes: list[Change]) -> list[int]:
    return [change.number for change in changes if isinstance(change, InodeRemoval)]


def number_of(path: Path) -> int:
    return path.stat(follow_symlinks=False).st_ino


@pytest.mark.parametrize("keep_base", [False, True], ids=["remembered", "kept"])
@pytest.mark.parametrize("mount", sorted(MOUNTS))
def test_rounds_of_everything(tmp_path: Path, lab: BtrfsLab, mount: str, *, keep_base: bool) -> None:
    lab.cycle(MOUNTS[mount])
    work = Rounds(lab, seed=len(mount) + 40 * keep_base, keep_base=keep_base)
    work.run(ROUNDS, operations=25)
    work.close()
    assert work.tally.missed == 0
    assert work.tally.changed > 20


@pytest.mark.parametrize("mkfs", ["-O ^no-holes -n 4096", "--mixed"])
def test_rounds_on_filesystems_made_otherwise(tmp_path: Path, mkfs: str) -> None:
    """Holes with items of their own, small nodes, data beside metadata."""
    with btrfs_lab(tmp_path, size=256 << 20, mkfs=mkfs) as lab:
        work = Rounds(lab, seed=len(mkfs), keep_base=False)
        work.run(8, operations=20)
        work.close()
        assert work.tally.missed == 0


def test_rounds_across_mounts_use_inode_numbers_again(tmp_path: Path) -> None:
    """After a mount btrfs gives the number of a removed inode to the next one that is made."""
    with btrfs_lab(tmp_path, mount="noatime", size=160 << 20) as lab:
        for keep_base in (False, True):
            work = Rounds(lab, seed=77, keep_base=keep_base)
            for options in ("noatime", "noatime,compress=zstd", "noatime,nodatacow", "relatime"):
                work.run(2)
                work.remount(options)
            assert work.tally.missed == 0
            call("rm", "-rf", lab.live / "again")
            os.makedirs(lab.live / "again/of a folder/in it")
            work.back_up()
            call("rm", "-rf", lab.live / "again")
            work.remount("noatime")
            for n in range(5):
                (lab.live / f"again{n}").write_bytes(b"n" * n)
            work.back_up()
            work.close()


def test_only_what_changed_is_reported(lab: BtrfsLab) -> None:
    big, small = lab.live / "big", lab.live / "small"
    big.write_bytes(os.urandom(4 << 20))
    small.write_bytes(b"as it was")
    lab.sync()
    base = lab.snapshot()
    with big.open("r+b") as file:
        file.seek(1 << 20)
        file.write(b"changed" * 1000)
        calls.fallocate(file.fileno(), calls.FALLOC_PUNCH_HOLE | calls.FALLOC_KEEP_SIZE, 2 << 20, 64 * KIB)
    changes = inodes_of(changes_between(base, lab.snapshot()))
    assert set(changes) == {number_of(big)}
    assert changes[number_of(big)].changed == ExtentList.of([(1 << 20, 8 * KIB)])
    assert changes[number_of(big)].holes == ExtentList.of([(2 << 20, 64 * KIB)])


def test_nothing_changed(lab: BtrfsLab) -> None:
    (lab.live / "file").write_bytes(b"x" * 100000)
    base = lab.snapshot()
    assert changes_between(base, base) == [] or not any(
        change.changed or change.added for change in inodes_of(changes_between(base, base)).values()
    )
    lab.sync()
    snapshot = lab.snapshot()
    assert removals_of(changes_between(base, snapshot)) == []
    assert not any(change.changed for change in inodes_of(changes_between(base, snapshot)).values())


def test_a_snapshot_inside_its_source_is_not_missed(lab: BtrfsLab) -> None:
    """Its name enters the directory in the transaction of the snapshot, after the copy."""
    (lab.live / "folder").mkdir()
    lab.sync()
    inside = lab.live / "folder/inside"
    calls.snapshot(str(lab.live), str(inside))
    base = lab.mount / "base"
    with opened(inside) as fd:
        os.fstat(fd)
    snapshot = lab.snapshot()
    changes = inodes_of(changes_between(inside, snapshot))
    added = changes[number_of(lab.live / "folder")].added
    assert [(entry.name, entry.kind) for entry in added] == [(b"inside", "subvolume")]
    assert not base.exists()


def test_a_tree_that_is_removed_is_told_inode_by_inode(lab: BtrfsLab) -> None:
    top = lab.live / "top"
    for n in range(20):
        os.makedirs(top / f"folder{n}/deeper")
        (top / f"folder{n}/deeper/file").write_bytes(b"x" * n)
        os.link(top / f"folder{n}/deeper/file", top / f"folder{n}/link")
    kept = top / "folder7/deeper/file"
    gone = {number_of(path) for path in [top, *top.rglob("*")]} - {number_of(kept)}
    base = lab.snapshot()
    kept.rename(lab.live / "kept")
    call("rm", "-r", top)
    snapshot = lab.snapshot()
    changes = changes_between(base, snapshot)
    assert removals_of(changes) == sorted(gone)
    assert set(inodes_of(changes)) == {256, number_of(lab.live / "kept")}


def test_more_names_than_fit_an_item(lab: BtrfsLab) -> None:
    """Hard links beyond some 4 KiB of names in one directory are INODE_EXTREF items."""
    file = lab.live / "file"
    file.write_bytes(b"x")
    base = lab.snapshot()
    for n in range(120):
        os.link(file, lab.live / (f"{n:03}" + "n" * 200))
    snapshot = lab.snapshot()
    change = inodes_of(changes_between(base, snapshot))[number_of(file)]
    assert len(change.links) == change.attributes.nlink == 121
    backup = Backup()
    for each in (base, snapshot):
        with opened(each) as fd:
            answer = compare_snapshots(fd, fd)
            whole = type(answer)("compare", "", inherits=False, walk=_everything(fd))
            backup.update(whole, capture(each))


def _everything(fd: int) -> Iterator[Change]:
    from blocksnap.extents.btrfs import find_subvolume_changes

    return find_subvolume_changes(fd, None).walk


def test_names_attributes_and_acls(lab: BtrfsLab) -> None:
    file = lab.live / "file"
    file.write_bytes(b"x")
    base = lab.snapshot()
    os.setxattr(file, "user.long", b"v" * 3000)
    os.setxattr(file, "user.empty", b"")
    # A version, and one entry each for owner, user 1, group, mask and others.
    entries = ((1, 6, -1), (2, 4, 1), (4, 4, -1), (16, 4, -1), (32, 0, -1))
    acl = (2).to_bytes(4, "little") + b"".join(
        tag.to_bytes(2, "little") + mode.to_bytes(2, "little") + (who & 0xFFFFFFFF).to_bytes(4, "little")
        for tag, mode, who in entries
    )
    os.setxattr(file, "system.posix_acl_access", acl)
    os.chown(file, 12, 34)
    os.mknod(lab.live / "device", 0o20600, os.makedev(300, 70000))
    changes = inodes_of(changes_between(base, lab.snapshot()))
    change = changes[number_of(file)]
    assert dict(change.xattrs) == {
        b"user.long": b"v" * 3000,
        b"user.empty": b"",
        b"system.posix_acl_access": acl,
    }
    assert (change.attributes.uid, change.attributes.gid) == (12, 34)
    assert changes[number_of(lab.live / "device")].attributes.rdev == os.makedev(300, 70000)


def test_blocks_that_move_meanwhile_are_not_taken_for_changed(lab: BtrfsLab) -> None:
    """Balance and dedupe work on read-only snapshots too; contents stay, and so do the answers' promises."""
    for n in range(40):
        (lab.live / f"file{n}").write_bytes(bytes([n]) * 200_000)
    base = lab.snapshot()
    backup = Backup()
    with opened(base) as fd:
        answer = compare_snapshots(fd, fd)
        backup.update(type(answer)("compare", "", inherits=False, walk=_everything(fd)), capture(base))
    for n in range(0, 40, 3):
        with (lab.live / f"file{n}").open("r+b") as file:
            file.seek(50_000)
            file.write(b"other" * 5000)
    snapshot = lab.snapshot()
    truth = capture(snapshot)
    stop = threading.Event()
    threads = [
        threading.Thread(target=_balance_until, args=(lab.mount, stop)),
        threading.Thread(target=_dedupe_until, args=(base, snapshot, stop)),
    ]
    for thread in threads:
        thread.start()
    try:
        for _ in range(15):
            with both(base, snapshot) as (fd, base_fd):
                answer = compare_snapshots(fd, base_fd, remember=True)
                tree, records = backup.tree, dict(backup.records)
                tally = backup.update(answer, truth)
                assert tally.missed == 0
                backup.tree, backup.records = tree, records
    finally:
        stop.set()
        for thread in threads:
            thread.join()


def _balance_until(mount: Path, stop: threading.Event) -> None:
    while not stop.is_set():
        subprocess.run(
            ["btrfs", "balance", "start", "--force", "-d", mount], check=False, capture_output=True
        )


def _dedupe_until(base: Path, snapshot: Path, stop: threading.Event) -> None:
    while not stop.is_set():
        for n in range(40):
            one = os.open(base / f"file{n}", os.O_RDONLY)
            other = os.open(snapshot / f"file{n}", os.O_RDONLY)
            try:
                calls.dedupe_range(one, 0, 40960, other, 0)
                calls.dedupe_range(one, 4096, 8192, other, 4096)
            finally:
                os.close(one)
                os.close(other)


def test_one_file_between_two_snapshots(lab: BtrfsLab) -> None:
    disk = lab.live / "disk.img"
    disk.write_bytes(os.urandom(8 << 20))
    base = lab.snapshot()
    with disk.open("r+b") as file:
        file.seek(3 << 20)
        file.write(b"guest" * 20000)
    snapshot = lab.snapshot()
    with (base / disk.name).open() as old, (snapshot / disk.name).open() as new:
        found = compare_files(old.fileno(), number_of(base / disk.name), new.fileno(), number_of(disk))
    begin = 3 << 20
    assert found.changed == ExtentList.of([(begin, 102_400)])
    assert not found.holes
    assert found.size == 8 << 20
    assert found.state[:1] == b"\x01"


@pytest.mark.parametrize("mount", ["noatime", "nodatacow", "zstd"])
def test_one_file_between_two_clones(lab: BtrfsLab, mount: str) -> None:
    lab.cycle(MOUNTS[mount])
    disk, first, second = (lab.live / name for name in ("disk", "first", "second"))
    # Not compressible, or an extent would be rewritten with its neighbours.
    disk.write_bytes(os.urandom(4 << 20))
    lab.sync()
    _clone(disk, first)
    with disk.open("r+b") as file:
        for at in (0, 40960, 4194304 - 4096):
            file.seek(at)
            file.write(os.urandom(4096))
        file.truncate((4 << 20) + 100)
    _clone(disk, second)
    with first.open("rb") as old, second.open("rb") as new:
        found = compare_files(old.fileno(), number_of(first), new.fileno(), number_of(second))
        before, after = old.read(), new.read()
    patched = bytearray(before.ljust(len(after), b"\0"))
    for offset, length in found.changed.pairs():
        patched[offset : offset + length] = after[offset : offset + length]
    assert patched == after
    assert found.changed.total <= 5 * 4096
    with first.open("rb") as old:
        with pytest.raises(VolumeError, match="No such file"):
            compare_files(old.fileno(), number_of(first), old.fileno(), 99999)
        with pytest.raises(VolumeError, match="no regular file"):
            compare_files(old.fileno(), 256, old.fileno(), number_of(first))


def _clone(source: Path, target: Path) -> None:
    with source.open("rb") as one, target.open("wb") as other:
        os.fsync(one.fileno())
        calls.clone(one.fileno(), other.fileno())


def test_what_may_not_be_compared(make_lab: LabMaker) -> None:
    lab, other = make_lab("noatime"), make_lab("noatime")
    (lab.live / "file").write_bytes(b"x")
    base, snapshot, foreign = lab.snapshot(), lab.snapshot(), other.snapshot()
    calls.create_subvolume(str(lab.mount / "second"))
    unrelated = lab.mount / "unrelated"
    calls.snapshot(str(lab.mount / "second"), str(unrelated))
    pairs = {
        "different filesystems": (foreign, snapshot),
        "older than": (snapshot, base),
        "not taken of the same": (unrelated, snapshot),
        "no snapshot has no history": (lab.live, snapshot),
    }
    lab.sync()
    for reason, (one, two) in pairs.items():
        with both(one, two) as (fd, base_fd):
            answer = compare_snapshots(fd, base_fd)
            assert not answer.inherits
            assert (reason in answer.reason) or "writable" in answer.reason, answer.reason
            assert all(isinstance(change, InodeChange) and change.is_new for change in answer.walk)
    calls.set_read_only(str(base), read_only=False)
    with both(base, snapshot) as (fd, base_fd):
        assert "writable" in compare_snapshots(fd, base_fd).reason
    with both(snapshot, base) as (fd, base_fd), pytest.raises(VolumeError, match="writable"):
        compare_snapshots(fd, base_fd)


def test_a_snapshot_made_writable_meanwhile(lab: BtrfsLab) -> None:
    base = lab.snapshot()
    (lab.live / "file").write_bytes(b"x")
    snapshot = lab.snapshot()
    with both(base, snapshot) as (fd, base_fd):
        walk = compare_snapshots(fd, base_fd).walk
        next(walk)
        calls.set_read_only(str(snapshot), read_only=False)
        with pytest.raises(VolumeError, match="made writable"):
            list(walk)


def test_nothing_leaks(lab: BtrfsLab) -> None:
    for n in range(50):
        (lab.live / f"file{n}").write_bytes(bytes(n * 1000))
    base = lab.snapshot()
    (lab.live / "file7").write_bytes(b"other")
    snapshot = lab.snapshot()
    file = number_of(lab.live / "file7")
    with both(base, snapshot) as (fd, base_fd):

        def repeat(times: int) -> None:
            for _ in range(times):
                numbers, _, _, _ = _native.btrfs_touched(fd, 0)
                _native.btrfs_diff(fd, base_fd, numbers, b"", 4096, True, 1 << 20)
                _native.btrfs_diff_file(base_fd, file, fd, file, 4096)

        repeat(50)
        before = _resident_kib()
        repeat(300)
        assert _resident_kib() - before < 512


def _resident_kib() -> int:
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmRSS:")[2].split()[0])
