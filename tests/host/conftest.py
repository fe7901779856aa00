"""What the tests on this machine's own kernel share."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from support.commands import CommandLine
from support.require import require


@pytest.fixture(autouse=True)
def _root() -> None:
    require("root", os.geteuid() == 0 and os.path.exists("/dev/loop-control"), "needs root and loop devices")


@pytest.fixture
def blocksnap(tmp_path: Path) -> CommandLine:
    command = CommandLine(tmp_path)
    command.done("init")
    return command
