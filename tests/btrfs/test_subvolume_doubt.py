"""When what is known of a subvolume is not to be believed, and when its snapshot goes away."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from uuid import uuid4

import pytest

from blocksnap.controller.guard import LevelWatch
from blocksnap.controller.settings import LimitSettings
from blocksnap.errors import VolumeError
from blocksnap.system.btrfs_places import NotReachedError, nested_subvolumes, open_top
from blocksnap.system.mounts import read_mounts
from blocksnap.volumes.errors import SnapshotLostError
from blocksnap.volumes.subvolume import SubvolumeVolume, find_trace, remove_trace
from support import btrfs_calls as calls
from support.btrfs_lab import BtrfsLab
from support.commands import CommandLine
from support.file_trees import noise, rsync_differences
from support.loops import call


@pytest.fixture
def blocksnap(blocksnap: CommandLine, lab: BtrfsLab) -> CommandLine:
    (lab.live / "file").write_bytes(noise(1, 300_000))
    blocksnap.done("backup", lab.live)
    return blocksnap


def next_backup(blocksnap: CommandLine, lab: BtrfsLab) -> dict[str, str]:
    (lab.live / "file").write_bytes(noise(2, 200_000))
    (backup,) = blocksnap.done("backup", "--json", lab.live).backups
    blocksnap.done("restore", "latest", lab.mount / "back")
    assert rsync_differences(lab.live, lab.mount / "back") == ""
    return dict(backup)


def test_a_host_that_does_not_know_the_parent_compares(lab: BtrfsLab, blocksnap: CommandLine) -> None:
    shutil.rmtree(blocksnap.folder / "state")
    backup = next_backup(blocksnap, lab)
    assert (backup["method"], backup["kind"]) == ("compare", "incremental")
    assert "no record of the parent" in backup["reason"]


def test_a_rollback_is_another_subvolume(lab: BtrfsLab, blocksnap: CommandLine) -> None:
    calls.snapshot(str(lab.live), str(lab.mount / "rolled back"), read_only=False)
    lab.delete(lab.live)
    (lab.mount / "rolled back").rename(lab.live)
    backup = next_backup(blocksnap, lab)
    assert (backup["method"], backup["kind"]) == ("compare", "full")
    assert backup["reason"] == "first backup of this volume"


def roll_back(lab: BtrfsLab, copy: Path) -> None:
    """Put a copy of the disk back, and let time go on until its transactions look late enough."""
    with lab.unmounted():
        call("dd", f"if={copy}", f"of={lab.device}", "bs=1M", "oflag=direct", "conv=sparse,nocreat")


def copy_disk(lab: BtrfsLab, copy: Path) -> None:
    """Copy the disk, of which a filesystem that is not mounted tells all."""
    with lab.unmounted():
        read_disk(lab, copy)


def read_disk(lab: BtrfsLab, copy: Path) -> None:
    """Read it as it is: btrfs writes past the page cache, in which may be what was there before."""
    call("dd", f"if={lab.device}", f"of={copy}", "bs=1M", "iflag=direct", "conv=sparse")


def pass_time(lab: BtrfsLab, transactions: int = 30) -> None:
    """Let the filesystem go on: what is always written goes on being written."""
    for number in range(transactions):
        (lab.live / "clock").write_text(f"{number}")
        lab.sync()


def found_rolled_back(blocksnap: CommandLine, lab: BtrfsLab) -> str:
    """Back up what was rolled back, see that all of it is right, and return the reason."""
    (backup,) = blocksnap.done("backup", "--json", lab.live).backups
    blocksnap.done("restore", "latest", lab.mount / "back")
    assert rsync_differences(lab.live, lab.mount / "back") == ""
    assert (backup["method"], backup["kind"]) == ("compare", "incremental")
    assert "was rolled back" in backup["reason"]
    return str(backup["reason"])


def test_a_disk_that_was_rolled_back_under_a_host_that_was_not(
    tmp_path: Path, lab: BtrfsLab, blocksnap: CommandLine
) -> None:
    """Its transactions soon look right again, and what was taken back would be inherited."""
    copy_disk(lab, tmp_path / "disk")
    (lab.live / "file").write_bytes(noise(3, 300_000))
    blocksnap.done("backup", lab.live)
    roll_back(lab, tmp_path / "disk")
    pass_time(lab)
    assert "knows nothing of the parent's snapshot" in found_rolled_back(blocksnap, lab)


def take_a_snapshot(lab: BtrfsLab) -> None:
    lab.snapshot("of somebody else")


def balance(lab: BtrfsLab) -> None:
    call("btrfs", "balance", "start", "-m", lab.mount)


Happening = Callable[[BtrfsLab], None]


def change(lab: BtrfsLab) -> None:
    (lab.live / "file").write_bytes(noise(3, 300_000))


def add(lab: BtrfsLab) -> None:
    (lab.live / "folder" / "new").write_bytes(noise(3, 10_000))


def remove(lab: BtrfsLab) -> None:
    (lab.live / "folder" / "old").unlink()


def nothing(_: BtrfsLab) -> None:
    pass


@pytest.mark.parametrize(
    ("lost", "instead", "hides"),
    [
        (change, nothing, take_a_snapshot),
        (remove, nothing, balance),
        (add, nothing, take_a_snapshot),
        (nothing, change, take_a_snapshot),
    ],
)
def test_a_disk_that_was_rolled_back_where_others_take_snapshots(
    tmp_path: Path,
    lab: BtrfsLab,
    blocksnap: CommandLine,
    lost: Happening,
    instead: Happening,
    hides: Happening,
) -> None:
    """Then the subvolume remembers one that is late enough, and only its inodes tell."""
    (lab.live / "folder").mkdir()
    (lab.live / "folder" / "old").write_bytes(noise(2, 10_000))
    blocksnap.done("backup", lab.live)
    copy_disk(lab, tmp_path / "disk")
    pass_time(lab, 3)
    lost(lab)
    blocksnap.done("backup", lab.live)
    roll_back(lab, tmp_path / "disk")
    lab.sync()
    instead(lab)
    pass_time(lab)
    hides(lab)
    pass_time(lab, 3)
    assert ": inode " in found_rolled_back(blocksnap, lab)


def leave_alone(lab: BtrfsLab) -> None:
    (lab.live / "clock").write_text("1")


def remove_everything(lab: BtrfsLab) -> None:
    lab.delete(lab.live / "kept")
    for path in lab.live.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def remove_and_mount_again(lab: BtrfsLab) -> None:
    (lab.live / "clock").unlink()
    lab.cycle()
    (lab.live / "another").write_text("it may have the number of one that is gone")


def move_about(lab: BtrfsLab) -> None:
    (lab.live / "folder" / "a").rename(lab.live / "a")
    (lab.live / "folder").rename(lab.live / "other")
    os.link(lab.live / "a", lab.live / "other" / "link")
    (lab.live / "a").unlink()


def defragment(lab: BtrfsLab) -> None:
    call("btrfs", "filesystem", "defragment", "-r", lab.live)


def keep_snapshots_inside(lab: BtrfsLab) -> None:
    calls.snapshot(str(lab.live), str(lab.live / "kept"))


def crash(lab: BtrfsLab) -> None:
    """What fsync wrote to the log is put into the tree at the next mount."""
    with (lab.live / "folder" / "b").open("ab") as file:
        file.write(b"more")
        os.fsync(file.fileno())
    (lab.live / "folder" / "c").unlink()
    fd = os.open(lab.live / "folder", os.O_RDONLY)
    os.fsync(fd)
    os.close(fd)
    copy = Path(f"{lab.mount}.crashed")
    read_disk(lab, copy)
    roll_back(lab, copy)


def test_what_is_no_rollback(lab: BtrfsLab, blocksnap: CommandLine) -> None:
    (lab.live / "folder").mkdir()
    for name in "abcdefghijklmnop":
        (lab.live / "folder" / name).write_text(name)
    blocksnap.done("backup", lab.live)
    for ordinary in (
        leave_alone, change, balance, defragment, take_a_snapshot, keep_snapshots_inside, leave_alone, crash,
        move_about, remove_everything, leave_alone, remove_and_mount_again, leave_alone,
    ):  # fmt: skip
        pass_time(lab, 3)
        ordinary(lab)
        (backup,) = blocksnap.done("backup", "--json", lab.live).backups
        said = (ordinary.__name__, backup["method"], backup["reason"].partition(" since ")[0])
        assert said == (ordinary.__name__, "btrfs-tree", "same subvolume and history")
    blocksnap.done("restore", "latest", lab.mount / "back")
    assert rsync_differences(lab.live, lab.mount / "back") == ""


def test_asked_for_all_of_it(lab: BtrfsLab, blocksnap: CommandLine) -> None:
    (backup,) = blocksnap.done("backup", "--full", "--json", lab.live).backups
    assert (backup["kind"], backup["new_bytes"], backup["read_bytes"]) == ("full", 0, 300_000)
    plan = blocksnap.done("backup", "--dry-run", "--json", lab.live).events[-1]["plans"]
    assert [(each["method"], each["read_bytes"]) for each in plan] == [("btrfs-tree", 0)]


def test_a_damaged_parent_is_done_without(lab: BtrfsLab, blocksnap: CommandLine) -> None:
    for pack in (blocksnap.repository / "packs").rglob("*-*"):
        pack.chmod(0o600)
        data = bytearray(pack.read_bytes())
        for at in range(100, len(data) - 200, 64):
            data[at] ^= 1
        pack.write_bytes(data)
    (lab.live / "file").write_bytes(noise(2, 200_000))
    outcome = blocksnap("backup", "--json", lab.live)
    assert outcome.code == 3, outcome
    assert outcome.backups[0]["reason"] == "the parent backup is damaged"
    blocksnap.done("restore", "latest", lab.mount / "back")
    assert rsync_differences(lab.live, lab.mount / "back") == ""


def test_a_snapshot_that_goes_away_is_not_committed(lab: BtrfsLab) -> None:
    volume = SubvolumeVolume(str(lab.live))
    volume.prepare()
    snapshot = volume.take_snapshot("run")
    (name,) = (name for name in os.listdir(lab.mount) if name.startswith(".blocksnap"))
    try:
        snapshot.check()
        assert snapshot.source_is_as_it_was()
        (lab.live / "later").write_text("written after it")
        snapshot.flush_source()
        assert not snapshot.source_is_as_it_was()
        calls.set_read_only(str(lab.mount / name), read_only=False)
        with pytest.raises(SnapshotLostError, match="writable"):
            snapshot.check()
        calls.set_read_only(str(lab.mount / name), read_only=True)
        lab.delete(lab.mount / name)
        with pytest.raises(VolumeError):
            snapshot.check()
    finally:
        snapshot.remove()
    snapshot.remove()


def test_what_is_full_is_the_filesystem(lab: BtrfsLab) -> None:
    volume = SubvolumeVolume(str(lab.live))
    snapshot = volume.take_snapshot("run")
    try:
        found = LevelWatch(snapshot, LimitSettings(pool_data_percent=0.1, drop_data_percent=0.1))
        assert found() is None
        (lab.live / "file").write_bytes(noise(1, 3 << 20))
        snapshot.flush_source()
        err = found()
    finally:
        snapshot.remove()
    assert err is not None
    assert err.brief.startswith(f"the filesystem of {lab.live} is ")
    assert err.resolution == "make room there, or take the backup when less is written"


def test_dropped_while_it_is_read(lab: BtrfsLab) -> None:
    volume = SubvolumeVolume(str(lab.live))
    (lab.live / "file").write_bytes(b"x")
    snapshot = volume.take_snapshot("run")
    inode = (lab.live / "file").stat().st_ino
    os.close(snapshot.open_file(inode))
    snapshot.drop()
    with pytest.raises(OSError, match=r"Stale|No such"):
        os.close(snapshot.open_file(inode))
    snapshot.remove()
    assert not [name for name in os.listdir(lab.mount) if name.startswith(".blocksnap")]


def test_a_filesystem_that_is_not_mounted(lab: BtrfsLab) -> None:
    trace = SubvolumeVolume(str(lab.live)).trace("run")
    assert trace is not None
    assert find_trace(trace) == remove_trace(trace) == "nothing"
    unknown = {**trace, "filesystem": str(uuid4())}
    assert find_trace(unknown) == remove_trace(unknown) == "unreachable"
    with pytest.raises(NotReachedError), open_top(uuid4()):
        pass


def test_a_filesystem_that_is_mounted_read_only_stays_so(lab: BtrfsLab) -> None:
    """Older kernels would write to it, for all who have it mounted, once it is mounted for writing too."""
    volume = SubvolumeVolume(str(lab.live))
    lab.cycle("ro,noatime")
    with pytest.raises(NotReachedError, match="mounted read-only"):
        volume.prepare()
    (mount,) = [mount for mount in read_mounts() if mount.point == str(lab.mount)]
    assert mount.read_only
    assert find_trace(volume.trace("run") or {}) == "unreachable"


def test_hundreds_of_nested_subvolumes(lab: BtrfsLab) -> None:
    (lab.live / "a" / "b").mkdir(parents=True)
    paths = [lab.live / "a" / "b" / f"{number}" for number in range(300)]
    for path in paths:
        calls.create_subvolume(str(path))
    fd = os.open(lab.live, os.O_RDONLY)
    try:
        found = {lab.live / os.fsdecode(each.path) for each in nested_subvolumes(fd)}
    finally:
        os.close(fd)
    assert found == set(paths)
    assert len(SubvolumeVolume(str(lab.live)).nested()) == 300
