"""Walks down and up again with few open directories, which come back to where they were or not at all."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from blocksnap.restore import descent
from blocksnap.restore.descent import Descent

FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW
DEPTH = 100


def inode(fd: int) -> int:
    return os.fstat(fd).st_ino


def go_down(top: Path, depth: int) -> tuple[Descent, list[int]]:
    """Make directories below each other; return where a walk is then, and the inodes above."""
    walk, above = Descent(os.open(top, FOLDER)), list[int]()
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(depth):
        above.append(inode(walk.fd))
        os.mkdir("d", dir_fd=walk.fd)
        walk.enter(os.open("d", FOLDER, dir_fd=walk.fd))
        assert len(os.listdir("/proc/self/fd")) < before + descent._HELD
    return walk, above


def test_it_comes_back(tmp_path: Path) -> None:
    walk, above = go_down(tmp_path, DEPTH)
    try:
        for number in reversed(above):
            # What is complete may be such that nobody passes through it.
            os.fchmod(walk.fd, 0)
            walk.leave()
            assert inode(walk.fd) == number
            # Down again and up, where it was closed before.
            os.mkdir("other", dir_fd=walk.fd)
            walk.enter(os.open("other", FOLDER, dir_fd=walk.fd))
            walk.leave()
            assert inode(walk.fd) == number
        os.rmdir("other", dir_fd=walk.fd)
    finally:
        walk.close()
        walk.close()
        for path, _, _ in os.walk(tmp_path):
            os.chmod(path, 0o700)
            if os.path.isdir(f"{path}/d"):
                os.chmod(f"{path}/d", 0o700)


def test_it_does_not_come_back_elsewhere(tmp_path: Path) -> None:
    """Somebody moves a directory away from below one that is closed, and puts a link where it was."""
    (tmp_path / "top").mkdir()
    (tmp_path / "away").mkdir()
    walk, above = go_down(tmp_path / "top", DEPTH)
    try:
        moved = tmp_path / "top" / "d" / "d"
        moved.rename(tmp_path / "away" / "d")
        moved.symlink_to(tmp_path / "away")
        for number in reversed(above[2:]):
            walk.leave()
            assert inode(walk.fd) == number
    except OSError as err:
        assert os.strerror(err.errno or 0) == "Stale file handle"
    else:
        pytest.fail("the walk is where it was never before")
    finally:
        walk.close()
