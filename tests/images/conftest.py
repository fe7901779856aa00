"""What the tests of mounted backups share: FUSE, loop devices, and the certainty that nothing is left."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.commands import CommandLine
from support.loops import call
from support.require import require
from support.standing import wait_until


@pytest.fixture(autouse=True)
def _root() -> None:
    able = os.geteuid() == 0 and os.path.exists("/dev/loop-control") and os.path.exists("/dev/fuse")
    require("fuse", able, "needs root, loop devices and /dev/fuse")


@pytest.fixture
def blocksnap(tmp_path: Path) -> CommandLine:
    command = CommandLine(tmp_path)
    command.done("init")
    return command


@pytest.fixture(autouse=True)
def _nothing_is_left(blocksnap: CommandLine, tmp_path: Path) -> Iterator[None]:
    """Wait for loop devices over images of this test's backups, and mounts of its trees, to go."""
    yield
    ids = [backup["id"] for backup in blocksnap.done("list", "--json").document["backups"]]

    def left() -> list[str]:
        lines = call("losetup", "--list", "--noheadings", "--output", "NAME,BACK-FILE").splitlines()
        loops = [line for line in lines if any(id_ in line for id_ in ids)]
        mounts = Path("/proc/mounts").read_text().splitlines()
        return loops + [line for line in mounts if "fuse.blocksnap" in line and str(tmp_path) in line]

    wait_until(lambda: not left(), 60)
    assert left() == []
