"""What is no btrfs is told plainly; tests/btrfs has the rest."""

from __future__ import annotations

import os
from pathlib import Path
from uuid import UUID

import pytest

from blocksnap.cli.main import run
from blocksnap.system.btrfs import (
    BtrfsError,
    NoSubvolumeError,
    commit,
    create_snapshot,
    delete_snapshot,
    exclusive_operation,
    filesystem_info,
    open_subvolume,
    subvolume_info,
)

NOT_BTRFS = Path("/proc")


def test_other_filesystems_are_no_subvolumes(tmp_path: Path) -> None:
    for path in (NOT_BTRFS, tmp_path / "missing"):
        with pytest.raises(NoSubvolumeError, match="is no btrfs subvolume") as caught:
            open_subvolume(str(path))
        assert caught.value.exit_code == 14
        assert caught.value.resolution
    fd = os.open(NOT_BTRFS, os.O_RDONLY)
    try:
        with pytest.raises(NoSubvolumeError):
            filesystem_info(fd)
        for call in (subvolume_info, commit):
            with pytest.raises(BtrfsError, match="cannot"):
                call(fd)
        with pytest.raises(BtrfsError, match="take the snapshot new"):
            create_snapshot(fd, fd, "new")
        with pytest.raises(BtrfsError, match="delete the snapshot new"):
            delete_snapshot(fd, "new")
    finally:
        os.close(fd)


@pytest.mark.parametrize("name", ["", "a/b", "n" * 256, "nul\0"])
def test_names_are_checked(name: str) -> None:
    with pytest.raises(ValueError, match="no file name"):
        delete_snapshot(-1, name)


def test_a_filesystem_that_is_not_there_does_nothing() -> None:
    assert exclusive_operation(UUID(int=0)) == "none"


def test_the_command_says_what_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["debug", "btrfs-diff", str(tmp_path / "a"), str(tmp_path / "b")]) == 2
    assert f"no directory {tmp_path / 'a'}" in capsys.readouterr().err
    assert run(["debug", "btrfs-diff", "/proc", "/proc"]) == 14
    told = capsys.readouterr().err
    assert "/proc is no btrfs subvolume" in told
    assert "fix:" in told
