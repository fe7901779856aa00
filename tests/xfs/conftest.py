"""What the tests on real XFS share."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from support.require import require


@pytest.fixture(autouse=True)
def _xfs() -> None:
    require("root", os.geteuid() == 0 and os.path.exists("/dev/loop-control"), "needs root and loop devices")
    ready = all(map(shutil.which, ("mkfs.xfs", "xfs_fsr")))
    require("xfs", ready and "xfs" in Path("/proc/filesystems").read_text(), "no XFS, or no xfsprogs")
