"""Real LVM: a volume group with a thin pool on the scratch disks that the lab gives."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))

from blocksnap.system import command
from support.lvm_lab import ThinPool, obstacle, thin_pool
from support.require import require


@pytest.fixture(scope="session")
def _lab() -> None:
    reason = obstacle()
    require("lvm", reason is None, reason or "")


@pytest.fixture(autouse=True)
def _programs_without_a_fork(monkeypatch: pytest.MonkeyPatch) -> None:
    """Start programs as is done beside threads: forking a test is the slowest thing that happens in the lab.

    Commands that tests run as interpreters of their own start theirs by sh, and so do all tests elsewhere.
    """
    monkeypatch.setattr(command, "_is_text", lambda _: False)


@pytest.fixture(scope="module")
def pool(_lab: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ThinPool]:
    """A pool for the tests of a module; each makes volumes of its own."""
    with thin_pool(tmp_path_factory.mktemp("pool")) as made:
        yield made
