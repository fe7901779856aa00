"""debug btrfs-diff as people and programs use it, and the ioctls under it, on a real filesystem."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from blocksnap.cli.main import run
from blocksnap.system.btrfs import (
    BtrfsError,
    create_snapshot,
    delete_snapshot,
    directory_path,
    exclusive_operation,
    filesystem_info,
    subvolume_info,
)
from support import btrfs_calls as calls
from support.btrfs_lab import BtrfsLab
from support.btrfs_rounds import opened
from support.loops import call

KIB = 1024


@pytest.fixture
def pair(lab: BtrfsLab) -> tuple[Path, Path]:
    """Two snapshots with a bit of everything between them."""
    live = lab.live
    (live / "folder/deeper").mkdir(parents=True)
    (live / "folder/deeper/big").write_bytes(os.urandom(256 * KIB))
    (live / "gone").write_bytes(b"x")
    (live / "moved").write_bytes(b"x")
    (live / "odd\n\udcff\\name").write_bytes(os.urandom(8 * KIB))
    # What is done in the very transaction of a snapshot counts as touched.
    lab.sync()
    base = lab.snapshot()
    with (live / "folder/deeper/big").open("r+b") as file:
        file.seek(64 * KIB)
        file.write(b"new" * KIB)
        calls.fallocate(file.fileno(), calls.FALLOC_PUNCH_HOLE | calls.FALLOC_KEEP_SIZE, 128 * KIB, 4 * KIB)
    (live / "gone").unlink()
    (live / "moved").rename(live / "folder/moved here")
    with (live / "odd\n\udcff\\name").open("r+b") as file:
        file.write(b"y")
    os.symlink("somewhere", live / "link")
    os.setxattr(live / "folder", "user.x", b"\x00\xff")
    return base, lab.snapshot()


def test_lines(pair: tuple[Path, Path], capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    assert run(["debug", "btrfs-diff", *map(str, pair)]) == 0
    assert sorted(capfdbinary.readouterr().out.splitlines()) == [
        b"0 4096 odd\\n\xff\\\\name",
        b"131072 4096 folder/deeper/big",
        b"65536 4096 folder/deeper/big",
    ]
    assert run(["debug", "btrfs-diff", "-q", "-v", *map(str, pair)]) == 0
    told = capfdbinary.readouterr()
    assert told.out == b""
    assert told.err.startswith(b"btrfs-tree: compared with the snapshot of transaction ")


def test_json(pair: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    base, snapshot = pair
    assert run(["debug", "btrfs-diff", "--json", str(base), str(snapshot)]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["engine"] == "btrfs-tree"
    assert document["inherits"] is True
    assert document["seconds"] > 0
    assert (document["changed_bytes"], document["hole_bytes"], document["count"]) == (8 * KIB, 4 * KIB, 2)
    assert [131072, 4096, "folder/deeper/big"] in document["extents"]
    assert document["removed"] == [(base / "gone").stat().st_ino]
    inodes = {each["path"]: each for each in document["inodes"]}
    assert set(inodes) == {
        "",
        "folder",
        "folder/deeper/big",
        "folder/moved here",
        "link",
        "odd\n\udcff\\name",
    }
    assert {each["name"] for each in inodes[""]["removed"]} == {"gone", "moved"}
    assert [each["name"] for each in inodes["folder"]["added"]] == ["moved here"]
    assert inodes["folder"]["xattrs"] == {"user.x": "00ff"}
    assert inodes["link"]["new"] is True
    assert inodes["link"]["target"] == "somewhere"
    big = inodes["folder/deeper/big"]
    assert (big["changed"], big["holes"]) == ([[65536, 4096]], [[131072, 4096]])
    assert big["mtime"] == (snapshot / "folder/deeper/big").stat().st_mtime_ns
    assert big["names"] == [[(snapshot / "folder/deeper").stat().st_ino, "big"]]


def test_what_is_refused(lab: BtrfsLab, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = lab.snapshot()
    folder = lab.live / "folder"
    folder.mkdir()
    assert run(["debug", "btrfs-diff", str(base), str(folder)]) == 14
    assert "is no btrfs subvolume" in capsys.readouterr().err
    assert run(["debug", "btrfs-diff", str(base), str(lab.live)]) == 14
    told = capsys.readouterr().err
    assert "the subvolume is writable" in told
    assert "fix:   take a read-only snapshot" in told


def test_a_path_longer_than_the_kernel_tells(lab: BtrfsLab, capsys: pytest.CaptureFixture[str]) -> None:
    base = lab.snapshot()
    here = os.open(lab.live, os.O_RDONLY)
    for _ in range(18):
        os.mkdir("d" * 255, dir_fd=here)
        deeper = os.open("d" * 255, os.O_RDONLY, dir_fd=here)
        os.close(here)
        here = deeper
    file = os.open("file", os.O_CREAT | os.O_WRONLY, dir_fd=here)
    os.write(file, b"x")
    os.close(file)
    number = os.fstat(here).st_ino
    os.close(here)
    snapshot = lab.snapshot()
    assert run(["debug", "btrfs-diff", str(base), str(snapshot)]) == 0
    assert capsys.readouterr().out == f"0 1 <inode {number}>/file\n"
    with opened(snapshot) as fd, pytest.raises(BtrfsError, match="too long"):
        directory_path(fd, number)


def test_snapshots_by_descriptor(lab: BtrfsLab) -> None:
    (lab.live / "file").write_bytes(b"not synced")
    with opened(lab.live) as source, opened(lab.mount) as folder:
        create_snapshot(source, folder, "by descriptor")
        path = lab.mount / "by descriptor"
        assert (path / "file").read_bytes() == b"not synced"
        with opened(path) as fd:
            info, live = subvolume_info(fd), subvolume_info(source)
            assert info.read_only
            assert not live.read_only
            assert info.name == "by descriptor"
            assert info.parent_uuid == live.uuid
            assert 0 < info.snapshot_transaction <= info.generation
            filesystem = filesystem_info(fd)
        assert filesystem.sector_size == 4096
        assert str(filesystem.uuid) in call("btrfs", "filesystem", "show", lab.mount)
        assert exclusive_operation(filesystem.uuid) == "none"
        with pytest.raises(BtrfsError, match="File exists"):
            create_snapshot(source, folder, "by descriptor")
        delete_snapshot(folder, "by descriptor")
        assert not path.exists()
        with pytest.raises(BtrfsError, match="No such file"):
            delete_snapshot(folder, "by descriptor")
