"""What the tests of this folder share."""

from __future__ import annotations

from pathlib import Path

import pytest

from support.commands import CommandLine


@pytest.fixture
def blocksnap(tmp_path: Path) -> CommandLine:
    """A command line with an empty repository of small chunks, not encrypted."""
    command = CommandLine(tmp_path)
    command.environment.pop("BLOCKSNAP_PASSPHRASE")
    command.done("init", "--no-encryption", "--chunk-size", "16K")
    return command
