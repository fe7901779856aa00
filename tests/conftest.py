"""What holds for all tests."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from hypothesis import settings

sys.path.insert(0, str(Path(__file__).parent))

from support.in_process import InProcess

# A deadline makes a busy machine look like a broken program.
settings.register_profile("blocksnap", deadline=None)
settings.load_profile("blocksnap")


@pytest.fixture
def state(tmp_path: Path) -> Path:
    """A state directory."""
    return tmp_path / "state"


@pytest.fixture
def in_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsysbinary: pytest.CaptureFixture[bytes]
) -> InProcess:
    """A command line within the process of the test, without a repository."""
    return InProcess(tmp_path, monkeypatch, capsysbinary)


@pytest.fixture
def blocksnap(in_process: InProcess) -> InProcess:
    """The same with an empty repository, for tests that are not about encryption."""
    in_process.done("init", "--no-encryption")
    return in_process
