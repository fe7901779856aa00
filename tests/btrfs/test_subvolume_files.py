"""Single files out of the backup of a subvolume: listed, found, copied with all that a restore gives them."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

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
)
from support.killed import kill_when
from support.loops import call, loop_device, mounted
from support.repositories import harm_largest_pack

MIB = 1 << 20
KINDS = {
    "file": stat.S_IFREG,
    "directory": stat.S_IFDIR,
    "link": stat.S_IFLNK,
    "pipe": stat.S_IFIFO,
    "socket": stat.S_IFSOCK,
    "block device": stat.S_IFBLK,
    "character device": stat.S_IFCHR,
}


@pytest.fixture
def backed_up(lab: BtrfsLab, blocksnap: CommandLine) -> Iterator[Path]:
    """A snapshot of what was backed up: one of everything."""
    make_everything(lab.live)
    make_of_btrfs(lab.live)
    make_final(lab.live)
    (lab.live / "sparse").unlink()
    blocksnap.done("backup", "-q", lab.live)
    yield lab.snapshot()
    allow_changes(lab.live)


def without_zeros(found: dict[str, dict[str, object]]) -> dict[str, dict[str, object]]:
    """Leave out what a restore changes: zeros that were written become holes."""
    return {name: {**seen, "data": []} if name.endswith("zeros") else seen for name, seen in found.items()}


def test_listing(backed_up: Path, blocksnap: CommandLine) -> None:
    entries = {e["path"]: e for e in blocksnap.done("files", "latest", "-r", "--json").document["entries"]}
    paths = {str(path.relative_to(backed_up)): path for path in backed_up.rglob("*")}
    assert entries.keys() == paths.keys()
    for name, path in paths.items():
        status, entry = path.lstat(), entries[name]
        assert (KINDS[entry["kind"]] | entry["mode"], entry["uid"], entry["gid"], entry["size"]) == (
            status.st_mode, status.st_uid, status.st_gid, status.st_size
        ), name  # fmt: skip
        assert abs(entry["modified"] - status.st_mtime) < 1e-3
        assert entry["target"] == (os.readlink(path) if path.is_symlink() else None)
    found = blocksnap.done("files", "latest", "--find", "h*d", "--json").document["entries"]
    assert sorted(entry["path"] for entry in found) == ["deep/hard", "many/hard"]
    (one,) = blocksnap.done("files", "latest", "/attributes", "--json").document["entries"]
    assert (one["path"], one["mode"], one["uid"]) == ("attributes", 0o4711, 12345)
    text = blocksnap.done("files", "latest").text
    assert "link -> plain" in text
    assert "\\xff\\xfe text\\nnor" in text


def test_copying_everything(backed_up: Path, blocksnap: CommandLine, lab: BtrfsLab) -> None:
    out = lab.mount / "out"
    out.mkdir()
    try:
        done = blocksnap.done("files", "latest", "--to", out, "--json").document
        assert sorted(done["copied"]) == sorted(str(out / name) for name in os.listdir(backed_up))
        one, other = without_zeros(describe(backed_up)), without_zeros(describe(out))
        assert differences({**one, ".": {}}, {**other, ".": {}}) == []
        again = blocksnap("files", "latest", "plain", "--to", out)
        assert (again.code, len(again.errors)) == (1, 1)
        assert "exists already" in again.errors[0]
        assert [name for name in os.listdir(out) if name.startswith(".blocksnap")] == []
    finally:
        allow_changes(out)


def test_copying_one(backed_up: Path, blocksnap: CommandLine, tmp_path: Path) -> None:
    with loop_device(tmp_path / "else.img", size=512 * MIB) as device:
        call("mkfs.ext4", "-q", device)
        with mounted(device, tmp_path / "elsewhere") as out:
            deep = "/".join(["deep"] * 30)
            done = blocksnap.done("files", "latest", f"{deep}/file", "--to", out, "--json").document
            assert done["copied"] == [str(out / "file")]
            assert (out / "file").read_bytes() == noise(2, 5000)
            for name in ("attributes", "character", "acl"):
                blocksnap.done("files", "latest", name, "--to", out, "-q")
            one = describe(backed_up, layouts=False)
            other = describe(out, layouts=False)
            names = [each for each in other if each.split("/")[0] not in (".", "file", "lost+found")]
            ignored = {"links": 0, "same as": ""}
            assert (
                differences({n: one[n] | ignored for n in names}, {n: other[n] | ignored for n in names})
                == []
            )
            kept = blocksnap("files", "latest", "nocow", "--to", out)
            assert kept.code == 3
            assert "not kept: flag nodatacow" in kept.stderr
            assert (out / "nocow").read_bytes() == noise(4, 100_000)
            assert [name for name in os.listdir(out) if name.startswith(".blocksnap")] == []


def test_a_path_that_leads_nowhere(lab: BtrfsLab, blocksnap: CommandLine, tmp_path: Path) -> None:
    (lab.live / "plain").write_text("x")
    (lab.live / "link").symlink_to("plain")
    blocksnap.done("backup", "-q", lab.live)
    (tmp_path / "out").mkdir()
    for path, reason, more in (
        ("../etc/passwd", "leads out of the backup", ()),
        ("link/below", "link is a symbolic link to plain", ("--to", tmp_path / "out")),
    ):
        outcome = blocksnap("files", "latest", path, *more)
        assert (outcome.code, len(outcome.errors)) == (1, 1), outcome
        assert reason in outcome.errors[0]
    assert os.listdir(tmp_path / "out") == []


def test_a_time_that_no_calendar_has(lab: BtrfsLab, blocksnap: CommandLine) -> None:
    (lab.live / "far").write_text("x")
    os.utime(lab.live / "far", (0, 10**13))
    blocksnap.done("backup", "-q", lab.live)
    assert "@10000000000000" in blocksnap.done("files", "latest").text


def test_it_needs_no_fuse_and_no_mounts(lab: BtrfsLab, blocksnap: CommandLine, tmp_path: Path) -> None:
    """Also who may not mount can have their own files: here a process without that right, nor others."""
    (lab.live / "file").write_bytes(noise(1, 200_000))
    (lab.live / "closed" / "below").mkdir(parents=True)
    (lab.live / "closed" / "below" / "file").write_text("x")
    for path, mode in (("closed/below/file", 0o000), ("closed/below", 0o000), ("closed", 0o555)):
        os.chmod(lab.live / path, mode)
    blocksnap.done("backup", "-q", lab.live)
    out = tmp_path / "out"
    out.mkdir()
    without = ",".join(f"-{name}" for name in ("sys_admin", "dac_override", "dac_read_search"))
    # What was left behind is taken away, whatever its modes.
    left = out / ".blocksnap-abcdefgh.partial"
    (left / "folder" / "below").mkdir(parents=True)
    (left / "folder" / "file").write_text("x")
    for path, mode in (("folder/file", 0o000), ("folder/below", 0o000), ("folder", 0o000), (".", 0o700)):
        os.chmod(left / path, mode)
    for name in ("file", "closed"):
        argv = blocksnap.argv("files", "latest", name, "--to", out)
        call("env", *[f"{k}={v}" for k, v in blocksnap.environment.items() if k.startswith("BLOCKSNAP")],
             "setpriv", f"--bounding-set={without}", f"--inh-caps={without}", *argv)  # fmt: skip
    assert (out / "file").read_bytes() == noise(1, 200_000)
    assert sorted(os.listdir(out)) == ["closed", "file"]
    modes = [stat.S_IMODE((out / "closed" / each).stat().st_mode) for each in (".", "below", "below/file")]
    assert modes == [0o555, 0o000, 0o000]


def test_damage_and_a_kill_leave_nothing(lab: BtrfsLab, blocksnap: CommandLine, tmp_path: Path) -> None:
    (lab.live / "folder").mkdir()
    (lab.live / "folder" / "big").write_bytes(noise(5, 64 * MIB))
    (lab.live / "other").write_bytes(noise(6, 3000))
    blocksnap.done("backup", "-q", lab.live)
    out = tmp_path / "out"
    out.mkdir()

    def begun() -> bool:
        # It may be under its own name before it was looked at.
        with suppress(FileNotFoundError):
            return any(path.stat().st_blocks for path in out.glob(".blocksnap-*.partial/folder/big"))
        return False

    kill_when(begun, lambda: blocksnap.start("files", "latest", "folder", "--to", out), out / "folder")
    assert [name for name in os.listdir(out) if not name.startswith(".blocksnap-")] == []
    # What is left is taken away by whoever comes next.
    blocksnap.done("files", "latest", "other", "--to", out)
    assert os.listdir(out) == ["other"]

    harm_largest_pack(blocksnap.repository)
    outcome = blocksnap("files", "latest", "folder", "--to", out, "--json")
    assert outcome.code == 13, outcome
    assert "of folder/big cannot be restored" in outcome.stderr
    assert os.listdir(out) == ["other"]
    assert json.loads(blocksnap.done("files", "latest", "--json").stdout)["entries"]
