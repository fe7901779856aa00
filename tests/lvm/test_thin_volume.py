"""Thin volumes on a real pool: what is said to have changed is compared with all that there is."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from blocksnap.cli.ending import Ended, ended_by_signals
from blocksnap.controller.recover import find_leftovers, read_report, recover
from blocksnap.controller.session import Journal, SnapshotSession
from blocksnap.errors import VolumeError
from blocksnap.system import blockdev, command, lvm
from blocksnap.volumes.discover import discover
from blocksnap.volumes.errors import PoolFullError, SnapshotLostError
from blocksnap.volumes.resolve import resolve_volume
from blocksnap.volumes.thin import ThinVolume
from blocksnap.volumes.thin_pool import PoolLimits
from support.forks import exit_code_of
from support.killed import dead_after
from support.loops import detach
from support.lvm_lab import ThinPool, remove_group, scratch_disks, tool, write_at
from support.thin_lab import Backups, read_all

UNIT = 65536
NAME = "data-1.x+y"


@pytest.fixture
def volume(pool: ThinPool) -> Iterator[str]:
    """A thin volume of 16 MiB with some data."""
    name = pool.create(NAME, "16M")
    write_at(pool.node(NAME), 0, os.urandom(2 << 20))
    yield name
    assert pool.snapshots() == []
    pool.remove(NAME)


def write_chunks(node: str, seed: int, count: int = 8, size: int = 16 << 20) -> None:
    rng = random.Random(seed)
    for _ in range(count):
        write_at(node, rng.randrange(size // 4096) * 4096, rng.randbytes(4096))


def test_increments_are_exact_whatever_else_happens_on_the_pool(
    pool: ThinPool, volume: str, state: Path
) -> None:
    node = pool.node(NAME)
    other = pool.create("other-1", "16M")
    backups = Backups(volume, state)
    last = backups.take()
    assert (last.changes.method, last.changes.reason) == ("compare", "first backup of this volume")
    assert last.changes.allocated.total == 2 << 20
    for number in range(4):
        write_chunks(node, number)
        write_chunks(pool.node("other-1"), number)
        if number == 0:
            tool("lvcreate", "-s", "-n", "foreign", volume)
        if number == 1:
            # Rewritten between a foreign snapshot and its removal, then discarded, then written again.
            tool("lvcreate", "-s", "-n", "other-snap", other)
            write_chunks(node, number)
            tool("blkdiscard", "--offset", str(4 << 20), "--length", str(4 << 20), node)
            write_chunks(node, number + 100, 2)
        if number == 2:
            pool.remove("other-snap")
            tool("blkdiscard", "--offset", str(number * UNIT), "--length", str(UNIT), node)
        now = backups.take(last)
        assert now.changes.method == "thin-time", now.changes.reason
        differing = {
            at
            for at in range(0, 16 << 20, UNIT)
            if now.content[at : at + UNIT] != last.content[at : at + UNIT]
        }
        touched = now.changes.changed.union(now.changes.discarded)
        assert {at for extent in touched for at in range(extent.offset, extent.end, UNIT)} >= differing
        last = now
    idle = backups.take(last)
    assert not idle.changes.changed
    assert not idle.changes.discarded
    # Not only the last backup can be the parent.
    write_chunks(node, 99)
    assert backups.take(last).changes.method == "thin-time"
    pool.remove("foreign", "other-1")


def test_nothing_stays(pool: ThinPool, volume: str, state: Path) -> None:
    names = pool.names()
    backups = Backups(volume, state)
    with SnapshotSession([resolve_volume(volume)], "aborted", state):
        pass
    backups.take()
    assert pool.names() == names
    assert tool("lvs", "--noheadings", "-o", "lv_tags", volume).strip() == ""
    assert os.listdir(state / "journal") == []


def test_a_merge_brings_back_old_content_and_is_noticed(pool: ThinPool, volume: str, state: Path) -> None:
    backups = Backups(volume, state)
    first = backups.take()
    tool("lvcreate", "-s", "-kn", "-n", "before", volume)
    write_chunks(pool.node(NAME), 1)
    second = backups.take(first)
    tool("lvconvert", "--merge", f"{pool.group}/before")
    third = backups.take(second)
    assert third.content == first.content
    assert third.changes.method == "compare"
    assert "merge" in third.changes.reason


def test_a_merge_that_waits_is_no_obstacle(pool: ThinPool, volume: str, state: Path) -> None:
    backups = Backups(volume, state)
    first = backups.take()
    tool("lvcreate", "-s", "-kn", "-n", "before", volume)
    with open(pool.node(NAME), "rb"):
        tool("lvconvert", "--merge", f"{pool.group}/before")
        write_chunks(pool.node(NAME), 1)
        second = backups.take(first)
        assert second.changes.method == "thin-time"
    tool("lvchange", "-an", volume)
    tool("lvchange", "-ay", volume)
    third = backups.take(second)
    assert "merge" in third.changes.reason
    assert third.content == first.content


def test_growing_and_shrinking(pool: ThinPool, volume: str, state: Path) -> None:
    node = pool.node(NAME)
    backups = Backups(volume, state)
    write_chunks(node, 1, 30)
    last = backups.take()
    for size in ("8M", "20M", "12M"):
        tool("lvresize", "-f", "-y", "-L", size, volume)
        now = backups.take(last)
        assert now.changes.method == "thin-time"
        last = now


def test_a_volume_made_anew_under_the_same_name_is_another(pool: ThinPool, volume: str, state: Path) -> None:
    key = resolve_volume(volume).key
    first = Backups(volume, state).take()
    pool.remove(NAME)
    pool.create(NAME, "16M")
    assert resolve_volume(volume).key != key
    backups = Backups(volume, state)
    backups.count = 10
    again = backups.take(first)
    assert "another logical volume" in again.changes.reason


def test_renaming_keeps_the_history(pool: ThinPool, volume: str, state: Path) -> None:
    first = Backups(volume, state).take()
    tool("lvrename", pool.group, NAME, "renamed")
    backups = Backups(f"{pool.group}/renamed", state)
    backups.count = 10
    assert backups.take(first).changes.method == "thin-time"
    tool("lvrename", pool.group, "renamed", NAME)


def test_inactive_volume_and_inactive_pool(pool: ThinPool, volume: str, state: Path) -> None:
    backups = Backups(volume, state)
    first = backups.take()
    write_chunks(pool.node(NAME), 1)
    tool("lvchange", "-an", volume)
    second = backups.take(first)
    assert second.changes.method == "thin-time"
    assert second.changes.changed
    tool("lvchange", "-an", f"{pool.group}/{pool.pool}")
    third = backups.take(second)
    assert third.changes.method == "thin-time"
    tool("lvchange", "-ay", volume)


def test_a_snapshot_of_somebody_else_is_a_volume_too(pool: ThinPool, volume: str, state: Path) -> None:
    tool("lvcreate", "-s", "-kn", "-n", "theirs", volume)
    backups = Backups(f"{pool.group}/theirs", state)
    first = backups.take()
    write_chunks(f"/dev/{pool.group}/theirs", 1)
    assert backups.take(first).changes.method == "thin-time"
    pool.remove("theirs")


def test_external_origin_is_read_whole(pool: ThinPool, state: Path) -> None:
    tool("lvcreate", "-y", "-L", "8M", "-n", "plain", pool.group)
    write_at(f"/dev/{pool.group}/plain", 0, os.urandom(1 << 20))
    tool("lvchange", "-an", f"{pool.group}/plain")
    tool("lvchange", "-pr", f"{pool.group}/plain")
    tool(
        "lvcreate", "-y", "-s", "--thinpool", f"{pool.group}/{pool.pool}", "-n", "ext", f"{pool.group}/plain"
    )
    tool("lvcreate", "-y", "-s", "-kn", "-n", "ext2", f"{pool.group}/ext")
    # LVM names the first copy as the origin of the second, which hides the external one.
    backups = Backups(f"{pool.group}/ext2", state)
    first = backups.take()
    second = backups.take(first)
    assert second.changes.method == "compare"
    assert "external origin" in second.changes.reason
    with SnapshotSession([resolve_volume(f"{pool.group}/ext2")], "wish", state) as session:
        (decision,) = session.decide_bases("keep")
        assert decision is not None
        assert (decision.stays, len(session.warnings)) == (False, 1)
    assert second.content[: 1 << 20] != bytes(1 << 20)
    pool.remove("ext2", "ext", "plain")


def test_file_system_is_frozen_for_the_snapshot(
    pool: ThinPool, volume: str, state: Path, tmp_path: Path
) -> None:
    tool("mkfs.ext4", "-q", pool.node(NAME))
    tool("mount", pool.node(NAME), str(tmp_path))
    try:
        (tmp_path / "file").write_bytes(b"written and not synced")
        assert resolve_volume(str(tmp_path)).name == volume
        assert resolve_volume(str(tmp_path / "lost+found")).name == volume
        began = time.time()
        with SnapshotSession([resolve_volume(str(tmp_path))], "run1", state) as session:
            (snapshot,) = session.snapshots
            # It is measured by looking, so a short one may be missed.
            assert 0 <= snapshot.timing.freeze_seconds < time.time() - began
            assert began < snapshot.timing.taken_at < time.time()
            assert b"written and not synced" in read_all(snapshot)
    finally:
        tool("umount", str(tmp_path))


def test_a_group_is_taken_back_to_back(pool: ThinPool, volume: str, state: Path) -> None:
    other = pool.create("second", "16M")
    with SnapshotSession([resolve_volume(volume), resolve_volume(other)], "run1", state) as session:
        assert len(pool.snapshots()) == 2
        assert session.skew_seconds > 0
        for snapshot in session.snapshots:
            assert snapshot.find_changes(None).inherits is False
    pool.remove("second")


def test_pool_that_is_nearly_full_gets_no_snapshot(pool: ThinPool, volume: str, state: Path) -> None:
    # A pool that runs only because a volume in it does is reported as inactive.
    tool("lvchange", "-an", volume)
    tool("lvchange", "-an", f"{pool.group}/{pool.pool}")
    tool("lvchange", "-ay", volume)
    record, report = lvm.get(*volume.split("/"))
    for limits, part in (
        (PoolLimits(data_percent=0.1), "data"),
        (PoolLimits(metadata_percent=0.1), "metadata"),
    ):
        with (
            pytest.raises(PoolFullError, match=f"^{part} of"),
            SnapshotSession([ThinVolume(report.thin(record), limits)], "run1", state),
        ):
            pass
    assert pool.snapshots() == []


def test_snapshot_that_vanishes_is_noticed(pool: ThinPool, volume: str, state: Path) -> None:
    with SnapshotSession([resolve_volume(volume)], "run1", state) as session:
        pool.remove(*pool.snapshots())
        with pytest.raises(SnapshotLostError):
            session.snapshots[0].check()
    assert session.warnings == []


def test_removal_waits_for_whoever_looks_at_the_device(
    pool: ThinPool, volume: str, state: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    change, refused = lvm._change, list[str]()

    def changing(group: str, *argv: str) -> str:
        try:
            return change(group, *argv)
        except command.CommandError as err:
            if not refused:
                os.close(fd)
            refused.append(err.message)
            raise

    with SnapshotSession([resolve_volume(volume)], "run1", state) as session:
        (name,) = pool.snapshots()
        tool("lvchange", "-ay", "-K", f"{pool.group}/{name}")
        fd = os.open(f"/dev/{pool.group}/{name}", os.O_RDONLY)
        monkeypatch.setattr(lvm, "_change", changing)
    assert any("in use" in message for message in refused)
    assert session.warnings == []


def test_what_is_not_supported_says_what_it_is(pool: ThinPool, volume: str, state: Path) -> None:
    group = pool.group
    tool("lvcreate", "-y", "-L", "8M", "-n", "thick", group)
    tool("lvcreate", "-y", "-s", "-L", "8M", "-n", "thicksnap", f"{group}/thick")
    mirror = ("--type", "mirror", "-m1", "--corelog", "--nosync")
    tool("lvcreate", "-y", *mirror, "-L", "8M", "-n", "mirrored", group)
    mapped = f"/dev/mapper/{group.replace('-', '--')}-"
    expected = {
        f"{group}/thicksnap": "a classic LVM snapshot",
        f"{group}/mirrored": "a mirrored LVM volume",
        f"{group}/{pool.pool}": "a thin pool",
        f"{mapped}{pool.pool.replace('-', '--')}_tmeta": "an inner part",
        f"{mapped}{pool.pool.replace('-', '--')}-tpool": "an inner part",
        f"{group}/nothing": "there is no logical volume",
        f"/dev/{group}/nothing": "there is no logical volume",
        scratch_disks()[0]: "is in use: held by",
    }
    for name, message in expected.items():
        with pytest.raises(VolumeError) as caught:
            resolve_volume(name).prepare()
        assert message in str(caught.value), name
        assert caught.value.exit_code == 14
    with SnapshotSession([resolve_volume(volume)], "run1", state):
        with pytest.raises(VolumeError, match="a snapshot that blocksnap made"):
            resolve_volume(f"{group}/{pool.snapshots()[0]}")
        found = {each.name: each for each in discover()}
    assert found[volume].supported
    assert found[f"{group}/thick"].kind == "classic"
    assert found[f"{group}/mirrored"].supported is False
    assert not any("blocksnap" in name or "_t" in name or name in scratch_disks() for name in found)
    pool.remove("thicksnap", "thick", "mirrored")


def test_new_volumes_for_a_restore(pool: ThinPool) -> None:
    thin = lvm.create_thin(pool.group, pool.pool, "new-1.a+b", 5 << 20, ["blocksnap.restoring"])
    thick = lvm.create_thick(pool.group, "new-2", 5 << 20, ["blocksnap.restoring"])
    for node in (thin, thick):
        fd = blockdev.open_exclusive(node)
        assert blockdev.size_of(fd) == 8 << 20
        os.pwrite(fd, os.urandom(4 << 20), 0)
        os.fsync(fd)
        blockdev.clear(fd, 65536 - 512, 3 << 20, discard=True)
        blockdev.clear(fd, 512, 1024, discard=False)
        blockdev.drop_cache(fd)
        assert os.pread(fd, 3 << 20, 65536 - 512) == bytes(3 << 20)
        assert os.pread(fd, 1024, 512) == bytes(1024)
        assert os.pread(fd, 512, 0) != bytes(512)
        with pytest.raises(blockdev.DeviceBusyError):
            blockdev.open_exclusive(node)
        os.close(fd)
    # What was discarded of the thin one is given back to the pool: 4 MiB less 48 whole chunks.
    percent = float(tool("lvs", "--noheadings", "-o", "data_percent", f"{pool.group}/new-1.a+b"))
    assert percent == pytest.approx(100 * (64 - 47) / 128, abs=1)
    lvm.delete_tag(pool.group, "new-2", "blocksnap.restoring")
    assert not lvm.remove_volume(pool.group, "new-2")
    assert lvm.remove_volume(pool.group, "new-1.a+b")
    pool.remove("new-2")


# What tells of another history: on a group of its own, because it is damaged on purpose.


@pytest.fixture
def scrap(_lab: None, tmp_path: Path) -> Iterator[ThinPool]:
    """A pool on a file, which can be copied and put back."""
    disk = tmp_path / "disk.img"
    with disk.open("wb") as file:
        file.truncate(160 << 20)
    loop = tool("losetup", "--find", "--show", str(disk)).strip()
    try:
        # On a host with systemd, udev would activate the group again whenever its disk was touched.
        tool("vgcreate", "-y", "--setautoactivation", "n", "scrap", loop)
        tool(
            "lvcreate",
            "-y",
            "--type",
            "thin-pool",
            "-L",
            "64M",
            "--poolmetadatasize",
            "4M",
            "-n",
            "pool",
            "scrap",
        )
        yield ThinPool("scrap", "pool", tmp_path)
    finally:
        remove_group("scrap", [loop])
        detach(loop)


def swap_disk(source: Path, target: Path) -> None:
    """Copy the disk of the scrap group while nothing has it open."""
    loop = tool("pvs", "--noheadings", "-o", "pv_name", "-S", "vg_name=scrap").strip()
    tool("vgchange", "-an", "scrap")
    detach(loop)
    shutil.copyfile(source, target)
    tool("losetup", loop, str(target.parent / "disk.img"))
    tool("udevadm", "settle")
    tool("vgchange", "-ay", "scrap")


def test_a_machine_that_was_rolled_back_is_noticed_though_its_counters_look_right(
    scrap: ThinPool, state: Path
) -> None:
    volume = scrap.create("data", "16M")
    node = scrap.node("data")
    disk, saved = scrap.root / "disk.img", scrap.root / "saved.img"
    backups = Backups(volume, state)
    write_chunks(node, 1)
    first = backups.take()
    swap_disk(disk, saved)
    shutil.copytree(state, scrap.root / "saved-state")
    write_chunks(node, 2)
    lost = backups.take(first)
    assert lost.changes.method == "thin-time"
    swap_disk(saved, disk)
    shutil.rmtree(state)
    (scrap.root / "saved-state").rename(state)
    write_chunks(node, 3)
    for _ in range(3):
        tool("lvcreate", "-s", "-n", "theirs", volume)
        scrap.remove("theirs")
    after = backups.take(lost)
    assert after.binding["pool_time"] > lost.binding["pool_time"]  # type: ignore[operator]
    assert after.changes.method == "compare"
    assert "no record of the parent backup" in after.changes.reason
    # The backup before it is still a parent.
    assert backups.take(first).changes.method == "thin-time"


def test_repaired_metadata_is_noticed(scrap: ThinPool, state: Path) -> None:
    volume = scrap.create("data", "16M")
    write_chunks(scrap.node("data"), 1)
    backups = Backups(volume, state)
    first = backups.take()
    tool("vgchange", "-an", "scrap")
    tool("lvconvert", "-y", "--repair", "scrap/pool")
    tool("vgchange", "-ay", "scrap")
    second = backups.take(first)
    assert second.binding["metadata_uuid"] == first.binding["metadata_uuid"]
    assert second.changes.method == "compare"
    assert "as a repair does" in second.changes.reason
    assert backups.take(second).changes.method == "thin-time"


def test_larger_metadata_is_no_doubt(scrap: ThinPool, state: Path) -> None:
    volume = scrap.create("data", "16M")
    write_chunks(scrap.node("data"), 1)
    backups = Backups(volume, state)
    first = backups.take()
    tool("lvextend", "--poolmetadatasize", "+4M", "scrap/pool")
    assert backups.take(first).changes.method == "thin-time"


# A run that dies.


def die(volume: str, state: Path, step: str) -> None:
    """Have a run in a process of its own die right after a step."""

    def run() -> int:
        dead_after(Journal, "append_all", when=step == "begun")
        dead_after(lvm, "create_thin_snapshot", when=step == "taken")
        dead_after(lvm, "remove_snapshot", when=step == "removed")
        with SnapshotSession([resolve_volume(volume)], f"dead-{step}", state) as session:
            with session.snapshots[0].open_reader() as fd:
                os.pread(fd, 0, 0)
                if step == "active":
                    os._exit(9)
            session.committing()
            if step == "commit":
                os._exit(9)
        return 0

    assert exit_code_of(run) == 9


@pytest.mark.parametrize("step", ["begun", "taken", "active", "commit", "removed"])
def test_the_next_run_removes_what_a_killed_one_left(
    pool: ThinPool, volume: str, state: Path, step: str
) -> None:
    left = 0 if step in ("begun", "removed") else 1
    names = pool.names()
    die(volume, state, step)
    assert len(pool.snapshots()) == left
    assert len(os.listdir(state / "journal")) == 1
    with SnapshotSession([resolve_volume(volume)], "next", state) as session:
        assert len(session.recovered) == left
        assert all(f"that run dead-{step} left" in message for message in session.recovered)
        assert len(pool.snapshots()) == 1
    assert pool.names() == names
    assert os.listdir(state / "journal") == []


def test_snapshot_of_an_unknown_run_is_left_to_doctor(pool: ThinPool, volume: str, state: Path) -> None:
    die(volume, state, "taken")
    with SnapshotSession([resolve_volume(volume)], "next", state / "elsewhere") as session:
        assert len(pool.snapshots()) == 2
    assert session.recovered == []
    assert "which this state directory does not know" in session.warnings[0]
    assert [each.run_state for each in find_leftovers(read_report(), [])] == ["unknown"]
    assert len(recover(state / "elsewhere", force=True).removed) == 1


def test_terminated_in_the_middle_of_lvcreate(
    pool: ThinPool, volume: str, state: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SIGTERM at many moments from its start on, as the command line takes it: nothing stays."""
    names = pool.names()
    locate = command._locate
    for number in range(4):
        read_end, write_end = os.pipe()

        def located(program: str, begun: int = write_end) -> str:
            if program == "lvcreate":
                os.write(begun, b"\n")
            return locate(program)

        monkeypatch.setattr(command, "_locate", located)
        words = f"read begun; sleep {number * 0.2}; kill -TERM {os.getpid()}"
        with (
            os.fdopen(read_end),
            os.fdopen(write_end),
            subprocess.Popen(["sh", "-c", words], stdin=read_end),
            pytest.raises(Ended),
            ended_by_signals(),
            SnapshotSession([resolve_volume(volume)], f"run{number}", state),
        ):
            time.sleep(600)
        assert pool.names() == names
        assert not list(state.glob("journal/*"))
