"""Standing still on this machine's own kernel: control groups, loop devices, filesystems above others."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from blocksnap.system import cgroup
from support.require import require
from support.standing import control_group, hook_folder, safe_base


def obstacle() -> str | None:
    """What keeps a group from being made and frozen here."""
    if os.geteuid():
        return "control groups need root"
    top = cgroup.root()
    if top is None or not os.access(top, os.W_OK):
        return "there is no hierarchy of version 2 that can be written to"
    return None


@pytest.fixture
def group() -> Iterator[Path]:
    """A control group of the test's own."""
    reason = obstacle()
    require("cgroup2", reason is None, reason or "")
    with control_group() as folder:
        yield folder


@pytest.fixture
def hooks() -> Iterator[Path]:
    """A folder for hooks."""
    require("hooks", safe_base() is not None, "no directory here is only ours, with all above it")
    with hook_folder() as folder:
        yield folder
