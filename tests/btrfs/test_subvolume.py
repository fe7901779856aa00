"""Subvolumes end to end, by the command line: backed up, changed, restored, and nothing left behind."""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from btrfs.conftest import LabMaker
from support import btrfs_calls as calls
from support.btrfs_lab import BtrfsLab
from support.commands import CommandLine
from support.file_trees import (
    allow_changes,
    describe,
    differences,
    make_everything,
    make_final,
    make_of_btrfs,
    noise,
    rsync_differences,
    set_flags,
)
from support.killed import kill_when
from support.loops import call, loop_device, mounted


@pytest.fixture
def elsewhere(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Path]:
    """A filesystem of another kind."""
    kind = getattr(request, "param", "ext4")
    with loop_device(tmp_path / "else.img", size=512 << 20) as device:
        call(f"mkfs.{kind}", "-q", device)
        with mounted(device, tmp_path / "elsewhere") as folder:
            yield folder


def backed_up(blocksnap: CommandLine, *arguments: str | Path) -> list[dict[str, Any]]:
    return blocksnap.done("backup", "--json", *arguments).backups


@contextmanager
def reference(lab: BtrfsLab) -> Iterator[Path]:
    """A snapshot to compare with, of what was just backed up."""
    path = lab.snapshot()
    yield path
    lab.delete(path)


def leftovers(lab: BtrfsLab) -> list[str]:
    """Return what of ours is on the filesystem."""
    listed = call("btrfs", "subvolume", "list", lab.mount)
    return [line for line in (*listed.splitlines(), *os.listdir(lab.mount)) if ".blocksnap" in line]


def test_everything_comes_back(lab: BtrfsLab, blocksnap: CommandLine) -> None:
    make_everything(lab.live)
    make_of_btrfs(lab.live)
    make_final(lab.live)
    try:
        (full,) = backed_up(blocksnap, lab.live)
        assert (full["kind"], full["method"]) == ("full", "compare")
        with reference(lab) as snapshot:
            done = blocksnap.done("restore", "--json", "--verify", "latest", lab.mount / "back").events[-1]
            assert (done["subvolume"], done["complete"], done["not_kept"]) == (True, True, [])
            expected = describe(snapshot)
            # Zeros that were written are holes; everything else is as it was.
            expected["zeros"]["data"] = []
            assert differences(expected, describe(lab.mount / "back")) == []
            assert rsync_differences(snapshot, lab.mount / "back") == ""
            assert call("btrfs", "property", "get", lab.mount / "back" / "compressed", "compression")
        assert leftovers(lab) == []
        (second,) = backed_up(blocksnap, lab.live)
        assert (second["kind"], second["method"], second["read_bytes"]) == ("incremental", "btrfs-tree", 0)
        assert second["metadata_bytes"] < full["metadata_bytes"] / 20
        blocksnap.done("check", "--read-data")
        blocksnap.done("verify", "latest")
        allow_changes(lab.mount / "back")
    finally:
        allow_changes(lab.live)


@pytest.mark.parametrize("elsewhere", ["ext4", "xfs"], indirect=True)
def test_everything_that_another_filesystem_has(
    lab: BtrfsLab, blocksnap: CommandLine, elsewhere: Path
) -> None:
    make_everything(lab.live)
    (lab.live / "sparse").unlink()
    # Beyond what ext4 and XFS can store.
    for name in ("new", "dangling"):
        (lab.live / name).unlink()
    backed_up(blocksnap, lab.live)
    with reference(lab) as snapshot:
        blocksnap.done("restore", "latest", elsewhere / "back")
        one, other = (describe(path, layouts=False, flags=False) for path in (snapshot, elsewhere / "back"))
        assert differences(one, other) == []
        if call("findmnt", "--noheadings", "--output", "FSTYPE", elsewhere).strip() == "ext4":
            assert rsync_differences(snapshot, elsewhere / "back") == ""


def test_what_cannot_be_kept_is_told(lab: BtrfsLab, blocksnap: CommandLine, elsewhere: Path) -> None:
    make_everything(lab.live)
    (lab.live / "sparse").unlink()
    make_of_btrfs(lab.live)
    backed_up(blocksnap, lab.live)
    outcome = blocksnap("restore", "latest", elsewhere / "back")
    assert outcome.code == 3, outcome
    told = [line for line in outcome.stderr.splitlines() if line.startswith("not kept: ")]
    assert any("nodatacow" in line and "nocow" in line for line in told), told
    assert any("btrfs.compression" in line and "compressed" in line for line in told), told
    document = blocksnap("restore", "--json", "latest", elsewhere / "again").events[-1]
    assert {each["what"] for each in document["not_kept"]} >= {
        "flag nodatacow (chattr +C)", "extended attribute btrfs.compression",
    }  # fmt: skip
    with reference(lab) as snapshot:
        assert (elsewhere / "back" / "nocow").read_bytes() == (snapshot / "nocow").read_bytes()


def test_an_incremental_costs_what_was_touched(lab: BtrfsLab, blocksnap: CommandLine) -> None:
    rng = random.Random(1)
    for folder in range(20):
        (lab.live / str(folder)).mkdir()
        for number in range(150):
            (lab.live / str(folder) / str(number)).write_bytes(noise(number, rng.randrange(3000)))
    (full,) = backed_up(blocksnap, lab.live)
    names = [f"{folder}/{number}" for folder in range(20) for number in range(150)]
    touched = rng.sample(names, 3)
    for name in touched:
        (lab.live / name).write_bytes(noise(7, 2000))
    outcome = blocksnap.done("backup", "-v", "--json", lab.live)
    (again,) = outcome.backups
    inodes = next(event for event in outcome.events if event["event"] == "inodes")
    assert (again["method"], inodes["touched"], inodes["removed"]) == ("btrfs-tree", 3, 0)
    assert again["read_bytes"] == 3 * 2000
    assert again["metadata_bytes"] * 20 <= full["metadata_bytes"]
    with reference(lab) as snapshot:
        blocksnap.done("restore", "latest", lab.mount / "back")
        assert rsync_differences(snapshot, lab.mount / "back") == ""


def test_what_was_renamed_and_removed(lab: BtrfsLab, blocksnap: CommandLine) -> None:
    make_everything(lab.live)
    backed_up(blocksnap, lab.live)
    (lab.live / "many").rename(lab.live / "deep" / "moved")
    shutil.rmtree(lab.live / "deep" / "deep")
    (lab.live / "plain").unlink()
    (lab.live / "empty").rename(lab.live / "small")
    (lab.live / "deep" / "deep").write_bytes(b"a file where a directory was")
    with (lab.live / "layout").open("r+b") as file:
        file.truncate(1_050_000)
        file.truncate(2 << 20)
        file.seek(5)
        file.write(b"changed")
    (changed,) = backed_up(blocksnap, lab.live)
    assert changed["method"] == "btrfs-tree"
    with reference(lab) as snapshot:
        blocksnap.done("restore", "latest", lab.mount / "back")
        assert rsync_differences(snapshot, lab.mount / "back") == ""
        expected = describe(snapshot)
        expected["zeros"]["data"] = []
        assert differences(expected, describe(lab.mount / "back")) == []
    blocksnap.done("check", "--read-data")


def test_nested_subvolumes_go_with_theirs(lab: BtrfsLab, blocksnap: CommandLine) -> None:
    (lab.live / "folder").mkdir()
    nested, inner = lab.live / "folder" / "nested", lab.live / "folder" / "nested" / "inner"
    for path in (nested, inner):
        calls.create_subvolume(str(path))
        (path / "file").write_text(path.name)
    calls.snapshot(str(nested), str(lab.live / "kept"))
    outcome = blocksnap.done("backup", "-v", lab.live)
    assert "left out" in outcome.stderr
    assert "kept" in outcome.stderr
    names = {backup["volume"] for backup in blocksnap.done("list", "--json").document["backups"]}
    assert names == {str(lab.live), str(nested), str(inner)}
    assert leftovers(lab) == []
    done = blocksnap.done("restore", "--json", f"{lab.live}@latest", lab.mount / "back").events[-1]
    assert sorted(done["nested"]) == ["folder/nested", "kept"]
    assert os.listdir(lab.mount / "back" / "folder" / "nested") == []
    blocksnap.done("restore", f"{inner}@latest", lab.mount / "inner")
    assert (lab.mount / "inner" / "file").read_text() == "inner"


def test_equal_files_are_shared_again(lab: BtrfsLab, blocksnap: CommandLine) -> None:
    (lab.live / "one").write_bytes(noise(1, 4_000_000))
    for name in ("two", "three"):
        (lab.live / name).touch()
        with (lab.live / "one").open("rb") as source, (lab.live / name).open("r+b") as target:
            calls.clone(source.fileno(), target.fileno())
    with (lab.live / "three").open("r+b") as file:
        file.write(b"not quite the same")
    (stored,) = backed_up(blocksnap, lab.live)
    assert stored["new_bytes"] < 4_300_000
    done = blocksnap.done("restore", "--json", "latest", lab.mount / "back").events[-1]
    assert done["shared_bytes"] > 7_500_000
    with reference(lab) as snapshot:
        assert rsync_differences(snapshot, lab.mount / "back") == ""


def test_a_target_is_whole_or_not_there(lab: BtrfsLab, blocksnap: CommandLine, elsewhere: Path) -> None:
    (lab.live / "large").write_bytes(noise(1, 100 << 20))
    backed_up(blocksnap, lab.live)
    (elsewhere / "there").mkdir()
    refused = blocksnap("restore", "latest", elsewhere / "there")
    assert (refused.code, len(refused.errors)) == (1, 1), refused
    filler = elsewhere / "filler"
    with filler.open("wb") as file:
        room = os.statvfs(elsewhere)
        os.posix_fallocate(file.fileno(), 0, room.f_bavail * room.f_frsize - (50 << 20))
    full = blocksnap("restore", "latest", elsewhere / "back")
    assert (full.code, len(full.errors)) == (1, 1), full
    assert "No space left" in full.stderr
    assert sorted(os.listdir(elsewhere)) == ["filler", "lost+found", "there"]
    filler.unlink()
    for place in (elsewhere, lab.mount):
        kill_when(
            lambda place=place: any(name.endswith(".partial") for name in os.listdir(place)),
            lambda place=place: blocksnap.start("restore", "latest", place / "killed"),
            place / "killed",
        )
        assert not (place / "killed").exists()
        blocksnap.done("restore", "latest", place / "killed")
        assert not [name for name in os.listdir(place) if name.endswith(".partial")]
        assert rsync_differences(lab.live, place / "killed") == ""


def test_subvolumes_are_listed(lab: BtrfsLab, blocksnap: CommandLine) -> None:
    calls.create_subvolume(str(lab.live / "nested"))
    lab.snapshot()
    backed_up(blocksnap, lab.live)
    listed = {each["name"]: each for each in blocksnap.done("volumes", "--json").document["volumes"]}
    for path in (lab.live, lab.live / "nested"):
        seen = listed[str(path)]
        assert (seen["kind"], seen["tracking"], seen["supported"]) == ("subvolume", "btrfs-tree", True)
        assert seen["last_backup"]
    assert not [name for name in listed if "snapshot-" in name]
    (lab.live / "folder").mkdir()
    refused = blocksnap("backup", lab.live / "folder")
    assert refused.code == 14, refused
    assert str(lab.live) in refused.stderr


def test_a_backup_is_compared_with_the_live_subvolume(lab: BtrfsLab, blocksnap: CommandLine) -> None:
    make_everything(lab.live)
    backed_up(blocksnap, lab.live)
    same = blocksnap.done("verify", "--json", "latest", lab.live).events[-1]
    assert (same["identical"], same["problems"]) == (True, [])
    # Moved blocks are no difference.
    call("btrfs", "filesystem", "defragment", "-r", lab.live)
    blocksnap.done("verify", "latest", lab.live)
    with (lab.live / "plain").open("r+b") as file:
        file.seek(200_000)
        file.write(b"changed")
    os.utime(lab.live / "plain", ns=(0, (lab.live / "small").stat().st_mtime_ns))
    (lab.live / "empty").unlink()
    (lab.live / "acl").chmod(0o700)
    (lab.live / "added").touch()
    outcome = blocksnap("verify", "--json", "latest", lab.live)
    told = " ".join(outcome.events[-1]["problems"])
    assert outcome.code != 0
    for what in ("content", "that it is gone", "that it is new", "names", "mode"):
        assert what in told, (what, told)
    assert leftovers(lab) == []


def test_names_that_are_no_text(lab: BtrfsLab, blocksnap: CommandLine) -> None:
    odd = lab.live / os.fsdecode(b"odd \xff\nname")
    calls.create_subvolume(str(odd))
    (odd / os.fsdecode(b"file \xfe")).write_bytes(b"x")
    backed_up(blocksnap, lab.live)
    (odd / "second").write_bytes(b"y")
    backups = backed_up(blocksnap, lab.live)
    name = f"{lab.live}/odd \\xff\nname"
    assert [(each["volume"], each["method"]) for each in backups] == [
        (str(lab.live), "btrfs-tree"), (name, "btrfs-tree"),
    ]  # fmt: skip
    outcome = blocksnap.done("restore", f"{lab.live}@latest", lab.mount / "back")
    assert "odd \\xff" in outcome.text
    blocksnap.done("restore", f"{name}@latest", lab.mount / "odd")
    assert sorted(os.listdir(os.fsencode(lab.mount / "odd"))) == [b"file \xfe", b"second"]


def test_a_filesystem_that_is_mounted_nodatacow(make_lab: LabMaker, blocksnap: CommandLine) -> None:
    lab = make_lab("noatime")
    (lab.live / "file").write_bytes(noise(1, 100_000))
    (lab.live / "compressed").touch()
    set_flags(lab.live / "compressed", 0x4)
    (lab.live / "compressed").write_bytes(b"compress me " * 10_000)
    backed_up(blocksnap, lab.live)
    lab.cycle("noatime,nodatacow")
    with reference(lab) as snapshot:
        blocksnap.done("restore", "latest", lab.mount / "back")
        assert differences(describe(snapshot), describe(lab.mount / "back")) == []
