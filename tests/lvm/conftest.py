"""Real LVM: a volume group with a thin pool on the scratch disks that the lab gives."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))

from support.lvm_lab import ThinPool, obstacle, thin_pool
from support.require import require


@pytest.fixture(scope="session")
def _lab() -> None:
    reason = obstacle()
    require("lvm", reason is None, reason or "")


@pytest.fixture(scope="module")
def pool(_lab: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ThinPool]:
    """A pool for the tests of a module; each makes volumes of its own."""
    with thin_pool(tmp_path_factory.mktemp("pool")) as made:
        yield made
