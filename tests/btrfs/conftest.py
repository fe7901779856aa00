"""What the tests on real btrfs filesystems share."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))

from support.btrfs_lab import BtrfsLab, btrfs_lab, require_btrfs
from support.commands import CommandLine

LabMaker = Callable[[str], BtrfsLab]


@pytest.fixture
def make_lab(tmp_path: Path) -> Iterator[LabMaker]:
    """Make filesystems, one for each call, mounted as btrfs_lab.MOUNTS says by name."""
    require_btrfs()
    with ExitStack() as stack:

        def make(mount: str) -> BtrfsLab:
            folder = tmp_path / f"lab-{len(list(tmp_path.iterdir()))}"
            folder.mkdir()
            return stack.enter_context(btrfs_lab(folder, mount=mount))

        yield make


@pytest.fixture
def lab(make_lab: LabMaker) -> BtrfsLab:
    """A filesystem mounted with noatime."""
    return make_lab("noatime")


@pytest.fixture
def blocksnap(tmp_path: Path) -> CommandLine:
    """A command line with an empty repository, which is not encrypted."""
    command_line = CommandLine(tmp_path)
    command_line.done("init", "--no-encryption")
    return command_line
