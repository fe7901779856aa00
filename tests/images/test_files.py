"""Single files out of a backup: listed, found, copied with all that belongs to them; nothing stays."""

from __future__ import annotations

import json
import os
import random
import shutil
import struct
import subprocess
import time
from pathlib import Path

import pytest

from support.commands import CommandLine
from support.loops import call, loop_device, mounted, unmount
from support.repositories import harm_largest_pack
from support.require import require

MIB = 1 << 20


@pytest.fixture
def volume(blocksnap: CommandLine, tmp_path: Path) -> Path:
    """A backed up ext4 whose journal was not replayed, as a snapshot of a mounted one has it."""
    image, live = tmp_path / "volume.img", tmp_path / "live.img"
    with loop_device(live, size=128 * MIB) as device:
        call("mkfs.ext4", "-q", device)
        with mounted(device, tmp_path / "work") as folder:
            (folder / "etc" / "deep").mkdir(parents=True)
            (folder / "etc" / "a.conf").write_text("a = 1\n")
            (folder / "etc" / "deep" / "b.conf").write_text("b = 2\n")
            os.chown(folder / "etc" / "a.conf", 1234, 567)
            call("chmod", "4750", folder / "etc" / "a.conf")
            os.utime(folder / "etc" / "a.conf", ns=(10**18, 10**18 + 123))
            os.setxattr(folder / "etc" / "a.conf", "user.why", b"because")
            os.link(folder / "etc" / "a.conf", folder / "etc" / "same.conf")
            os.symlink("/etc/hostname", folder / "etc" / "link")
            os.symlink("etc", folder / "short")
            with (folder / "sparse").open("wb") as file:
                file.seek(20 * MIB)
                file.write(b"end")
            (folder / "big").write_bytes(random.Random(1).randbytes(40 * MIB))
            (folder / os.fsdecode(b"not utf-8 \xff\nname")).write_text("x")
            call("sync", "-f", folder)
            call("cp", "--sparse=always", live, image)
    blocksnap.done("backup", image, "-q")
    return image


def test_listing(blocksnap: CommandLine, volume: Path) -> None:
    entries = blocksnap.done("files", "latest", "--json").document["entries"]
    assert {entry["path"] for entry in entries} >= {"big", "etc", "lost+found", "short", "sparse"}
    (conf,) = [
        e
        for e in blocksnap.done("files", "latest", "/etc", "--json").document["entries"]
        if e["path"] == "etc/a.conf"
    ]
    assert (conf["kind"], conf["size"], conf["mode"], conf["uid"], conf["gid"]) == (
        "file",
        6,
        0o4750,
        1234,
        567,
    )
    found = blocksnap.done("files", "latest", "--find", "*.conf", "--json").document["entries"]
    assert [entry["path"] for entry in found] == ["etc/a.conf", "etc/same.conf", "etc/deep/b.conf"]
    text = blocksnap.done("files", "latest").text
    assert "-rwsr-x---" not in text
    assert "\\xff\\nname" in text
    assert "short -> etc" in text
    assert "-rwsr-x---" in blocksnap.done("files", "latest", "-r").text


def test_copying(blocksnap: CommandLine, volume: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    blocksnap.done("files", "latest", "etc", "--to", out)
    copied = out / "etc" / "a.conf"
    status = copied.stat()
    assert (copied.read_text(), status.st_uid, status.st_gid, status.st_mode & 0o7777) == (
        "a = 1\n",
        1234,
        567,
        0o4750,
    )
    assert status.st_mtime_ns == 10**18 + 123
    assert os.getxattr(copied, "user.why") == b"because"
    assert copied.samefile(out / "etc" / "same.conf")
    assert os.readlink(out / "etc" / "link") == "/etc/hostname"
    blocksnap.done("files", "latest", "sparse", "--to", out)
    assert (out / "sparse").stat().st_size == 20 * MIB + 3
    assert (out / "sparse").stat().st_blocks * 512 < MIB
    taken = blocksnap("files", "latest", "etc", "--to", out)
    assert (taken.code, len(taken.errors)) == (1, 1), taken
    assert "exists already" in taken.stderr
    (tmp_path / "all").mkdir()
    blocksnap.done("files", "latest", "--to", tmp_path / "all")
    assert (tmp_path / "all" / "big").read_bytes() == random.Random(1).randbytes(40 * MIB)


def test_what_cannot_be_kept_is_told(blocksnap: CommandLine, tmp_path: Path) -> None:
    """A filesystem without extended attributes of users, as many file servers are."""
    image, out = tmp_path / "volume.img", tmp_path / "out"
    with loop_device(image, size=32 * MIB) as device:
        call("mkfs.ext4", "-q", device)
        with mounted(device, tmp_path / "work") as folder:
            (folder / "etc" / "deep").mkdir(parents=True)
            for number in range(5):
                (folder / "etc" / "deep" / f"{number}.conf").write_text("a = 1\n")
                os.setxattr(folder / "etc" / "deep" / f"{number}.conf", "user.why", b"because")
            os.setxattr(folder / "etc", "trusted.who", b"me")
            os.symlink("/nowhere", folder / "etc" / "link")
    blocksnap.done("backup", image, "-q")
    out.mkdir()
    call("mount", "-t", "ramfs", "ramfs", out)
    try:
        told = blocksnap("files", "latest", "etc", "--to", out)
        assert told.code == 3, told
        assert "not kept: extended attribute trusted.who, of 1: etc" in told.stderr
        examples = ", ".join(f"etc/deep/{number}.conf" for number in range(3))
        assert f"not kept: extended attribute user.why, of 5: {examples}, ..." in told.stderr
        assert told.text == f"copied to {out}/etc\n"
        assert len(os.listdir(out / "etc" / "deep")) == 5
    finally:
        unmount(out)


def test_an_acl_has_two_names_on_xfs_and_is_kept(blocksnap: CommandLine, tmp_path: Path) -> None:
    require("xfs", shutil.which("mkfs.xfs") is not None, "no mkfs.xfs")
    entries = ((1, 6, -1), (2, 4, 1234), (4, 4, -1), (16, 4, -1), (32, 0, -1))
    # linux/posix_acl_xattr.h: version, and tag, permissions and id of each.
    acl = struct.pack("<I", 2) + b"".join(struct.pack("<HHi", *entry) for entry in entries)
    image, out = tmp_path / "volume.img", tmp_path / "out"
    with loop_device(image, size=304 * MIB) as device:
        call("mkfs.xfs", "-q", device)
        with mounted(device, tmp_path / "work") as folder:
            (folder / "file").write_text("a = 1\n")
            os.setxattr(folder / "file", "system.posix_acl_access", acl)
            assert "trusted.SGI_ACL_FILE" in os.listxattr(folder / "file")
    blocksnap.done("backup", image, "-q")
    with loop_device(tmp_path / "target.img", size=16 * MIB) as device:
        call("mkfs.ext4", "-q", device)
        with mounted(device, out):
            blocksnap.done("files", "latest", "file", "--to", out)
            assert os.getxattr(out / "file", "system.posix_acl_access") == acl


def test_what_cannot_be_read_is_not_there_in_part(
    blocksnap: CommandLine, volume: Path, tmp_path: Path
) -> None:
    harm_largest_pack(blocksnap.repository)
    out = tmp_path / "out"
    out.mkdir()
    failed = blocksnap("files", "latest", "big", "--to", out)
    assert failed.code == 1, failed
    assert os.listdir(out) == []


def test_nothing_leads_out_of_the_backup(blocksnap: CommandLine, volume: Path, tmp_path: Path) -> None:
    for path, why in (
        ("../../etc/passwd", "leads out"),
        ("short/a.conf", "symbolic link to etc"),
        ("etc/link/x", "symbolic link to /etc/hostname"),
        ("nothing", "there is no nothing"),
        ("big/x", "big is no directory"),
    ):
        refused = blocksnap("files", "latest", path, "--to", tmp_path)
        assert (refused.code, len(refused.errors)) == (1, 1), refused
        assert why in refused.stderr


def test_a_volume_without_a_filesystem(blocksnap: CommandLine, tmp_path: Path) -> None:
    (tmp_path / "noise").write_bytes(random.Random(2).randbytes(MIB))
    blocksnap.done("backup", tmp_path / "noise", "-q")
    refused = blocksnap("files", "latest")
    assert (refused.code, len(refused.errors)) == (1, 1), refused
    assert "no ext4, XFS or btrfs" in refused.stderr


@pytest.mark.parametrize("moment", [0.5, 0.8, 1.1])
def test_killed_while_it_copies(blocksnap: CommandLine, volume: Path, tmp_path: Path, moment: float) -> None:
    """What is mounted and attached goes with the process; the fixture waits for that and insists."""
    out = tmp_path / "out"
    out.mkdir()
    process = blocksnap.start("files", "latest", "--to", out)
    try:
        process.wait(timeout=moment)
    except subprocess.TimeoutExpired:
        process.kill()
    process.communicate()
    time.sleep(0.1)
    (tmp_path / "again").mkdir()
    blocksnap.done("files", "latest", "etc", "--to", tmp_path / "again")
    assert json.loads(blocksnap.done("files", "latest", "--json").stdout)["entries"]
