"""Devices and filesystems of others come and go while ours are looked at."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from blocksnap.controller.journal import read_entries
from blocksnap.controller.session import SnapshotSession
from blocksnap.system import freeze, mounts
from blocksnap.system.btrfs import NoSubvolumeError
from blocksnap.volumes.base import Ledger
from blocksnap.volumes.discover import discover
from blocksnap.volumes.subvolume import SubvolumeSnapshot, SubvolumeVolume, snapshots_on
from support import btrfs_calls as calls
from support.btrfs_lab import BtrfsLab
from support.in_process import InProcess
from support.loops import call, loop_device, unmount

MIB = 1 << 20
# Whoever looks at new devices has one open for a moment, udev or LVM, and then it cannot be taken away.
COMING_AND_GOING = """
while [ -e "$4" ] && kill -0 "$5"; do
    until mount "$1" "$2" || [ ! -e "$4" ]; do :; done
    until umount "$2" || ! mountpoint -q "$2"; do :; done
    until addpart "$3" 1 2048 4096 || [ ! -e "$4" ]; do :; done
    until delpart "$3" 1 || [ ! -e "/sys/class/block/${3##*/}p1" ]; do :; done
done 2> /dev/null
"""


@contextmanager
def coming_and_going(folder: Path) -> Iterator[None]:
    """Have a btrfs mounted and unmounted, and a partition made and removed, without a pause."""
    point, goes_on = folder / "other", folder / "goes-on"
    point.mkdir()
    goes_on.touch()
    with (
        loop_device(folder / "btrfs.img", size=128 * MIB) as device,
        loop_device(folder / "parted.img", size=8 * MIB) as parted,
    ):
        call("mkfs.btrfs", "-q", device)
        # A namespace of its own: nobody who copies ours keeps a mount of it, and it keeps none of ours.
        argv = ["unshare", "--mount", "--propagation", "slave", "sh", "-c", COMING_AND_GOING, "sh"]
        others = subprocess.Popen([*argv, device, point, parted, goes_on, str(os.getpid())])
        try:
            yield
            assert others.poll() is None
        finally:
            goes_on.unlink()
            others.wait(timeout=300)


def test_what_others_remove_meanwhile_ends_no_look(lab: BtrfsLab, tmp_path: Path) -> None:
    """A directory of sysfs that is gone when it is looked into ended a run once."""
    own = os.stat(lab.device).st_rdev
    inner = lab.live / "inner.img"
    with loop_device(inner, size=64 * MIB) as loop:
        call("mkfs.ext4", "-q", loop)
        point = tmp_path / "inner"
        point.mkdir()
        call("mount", loop, point)
        try:
            with coming_and_going(tmp_path):
                for _ in range(150):
                    above = {layer.mount.point for layer in freeze.layers_above(own)}
                    assert {str(lab.mount), str(point)} <= above
                    assert os.stat(loop).st_rdev in freeze.numbers_above(os.stat(lab.live).st_dev)
                    assert mounts.btrfs_members(own) == {own}
                    assert f"mounted on {point}" in mounts.users_of_device(os.stat(loop).st_rdev)
                for _ in range(10):
                    assert str(lab.live) in {candidate.name for candidate in discover()}
        finally:
            unmount(point)


class Deleting(SubvolumeVolume):
    """A subvolume with which another one goes: when it is looked at, or when it has a snapshot."""

    def __init__(self, path: str, when: str, goes: Path) -> None:
        super().__init__(path)
        self._when = when
        self._goes = goes

    def prepare(self) -> None:
        super().prepare()
        if self._when == "looked at":
            calls.delete_subvolume(str(self._goes))

    def take_snapshot(self, run: str, ledger: Ledger | None = None) -> SubvolumeSnapshot:
        snapshot = super().take_snapshot(run, ledger)
        if self._when == "snapshot":
            calls.delete_subvolume(str(self._goes))
        elif self._when == "replaced":
            calls.delete_subvolume(str(self._goes))
            calls.create_subvolume(str(self._goes))
        return snapshot


@pytest.mark.parametrize("when", ["looked at", "snapshot", "replaced"])
def test_a_nested_subvolume_goes_before_its_snapshot(lab: BtrfsLab, tmp_path: Path, when: str) -> None:
    """Container engines delete theirs at any time: nobody named it, and the others are backed up."""
    for name in ("a", "b"):
        calls.create_subvolume(str(lab.live / name))
    volume = Deleting(str(lab.live), when, lab.live / "b")
    group = [volume, *volume.nested()]
    with SnapshotSession(group, "run", tmp_path / "state") as session:
        assert session.gone == (str(lab.live / "b"),)
        assert [each.name for each in session.volumes] == [str(lab.live), str(lab.live / "a")]
        assert len(session.snapshots) == 2
    assert session.warnings == []
    assert snapshots_on(volume.filesystem) == []
    assert read_entries(tmp_path / "state") == []


def test_a_nested_subvolume_that_is_renamed_is_not_left_out(lab: BtrfsLab, tmp_path: Path) -> None:
    calls.create_subvolume(str(lab.live / "b"))
    volume = SubvolumeVolume(str(lab.live))
    group = [volume, *volume.nested()]
    (lab.live / "b").rename(lab.live / "c")
    with pytest.raises(NoSubvolumeError), SnapshotSession(group, "run", tmp_path / "state"):
        pass
    assert snapshots_on(volume.filesystem) == []


class Goes(SubvolumeVolume):
    """A subvolume that is deleted when it has its snapshot."""

    def take_snapshot(self, run: str, ledger: Ledger | None = None) -> SubvolumeSnapshot:
        snapshot = super().take_snapshot(run, ledger)
        calls.delete_subvolume(self.name)
        return snapshot


@pytest.mark.parametrize("which", [0, 1])
def test_a_nested_subvolume_that_goes_after_its_snapshot_is_in_the_backup(
    lab: BtrfsLab, tmp_path: Path, which: int
) -> None:
    for name in ("a", "b"):
        calls.create_subvolume(str(lab.live / name))
    volume = SubvolumeVolume(str(lab.live))
    nested: list[SubvolumeVolume] = [SubvolumeVolume(str(lab.live / name), is_nested=True) for name in "ab"]
    nested[which] = Goes(nested[which].name, is_nested=True)
    with SnapshotSession([volume, *nested], "run", tmp_path / "state") as session:
        # Its name went from the one that it was in.
        assert (session.gone, len(session.snapshots), session.torn) == ((), 3, (volume.name,))
    assert session.warnings == []
    assert snapshots_on(volume.filesystem) == []


def test_one_that_was_named_and_goes_is_no_backup(lab: BtrfsLab, tmp_path: Path) -> None:
    calls.create_subvolume(str(lab.live / "b"))
    named = SubvolumeVolume(str(lab.live / "b"))
    volume = Deleting(str(lab.live), "snapshot", lab.live / "b")
    with pytest.raises(NoSubvolumeError), SnapshotSession([volume, named], "run", tmp_path / "state"):
        pass
    assert snapshots_on(volume.filesystem) == []


def test_backups_while_nested_subvolumes_come_and_go(
    lab: BtrfsLab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsysbinary: pytest.CaptureFixture[bytes]
) -> None:
    blocksnap = InProcess(tmp_path, monkeypatch, capsysbinary)
    blocksnap.done("init", "--no-encryption")
    goes_on = tmp_path / "goes-on"
    goes_on.touch()
    nested = str(lab.live / "container")
    script = (
        'while [ -e "$2" ]; do btrfs -q subvolume create "$1"; btrfs -q subvolume create "$1/in"; '
        'btrfs -q subvolume delete "$1/in" "$1"; done'
    )
    others = subprocess.Popen(["sh", "-ec", script, "sh", nested, goes_on], stderr=subprocess.PIPE, text=True)
    try:
        for number in range(12):
            (lab.live / "file").write_text(f"{number}\n")
            code, out, err = blocksnap("backup", "--json", lab.live)
            done = [json.loads(line) for line in out.splitlines()]
            assert done[-1]["backups"][0]["volume"] == str(lab.live)
            # One that comes or goes between the first snapshot and the last is a write.
            warnings = [each["message"] for each in done if each["event"] == "warning"]
            assert (code, len(warnings)) in ((0, 0), (3, 1)), (err, warnings)
            assert all(each.startswith("not of the same instant") for each in warnings)
        assert others.poll() is None, others.communicate()[1]
    finally:
        goes_on.unlink()
        others.communicate(timeout=300)
