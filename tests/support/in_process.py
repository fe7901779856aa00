"""Run commands inside the test's process: what costs seconds under User Mode Linux is starting Python."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from blocksnap.cli.main import run
from blocksnap.repository import keys as keys_module
from blocksnap.repository.keys import MINIMUM_COST

PASSPHRASE = "correct horse battery staple"


class InProcess:
    """blocksnap with a repository and a state directory of its own."""

    def __init__(
        self, folder: Path, monkeypatch: pytest.MonkeyPatch, capsysbinary: pytest.CaptureFixture[bytes]
    ) -> None:
        self.folder = folder
        self._capture = capsysbinary
        for name in [name for name in os.environ if name.startswith("BLOCKSNAP_")]:
            monkeypatch.delenv(name)
        monkeypatch.setenv("BLOCKSNAP_REPOSITORY", str(folder / "repository"))
        monkeypatch.setenv("BLOCKSNAP_STATE_DIRECTORY", str(folder / "state"))
        monkeypatch.setenv("BLOCKSNAP_CACHE", str(folder / "cache"))
        monkeypatch.setenv("BLOCKSNAP_PASSPHRASE", PASSPHRASE)
        monkeypatch.setenv("BLOCKSNAP_CONFIG", str(folder / "blocksnap.toml"))
        # argon2id's memory is 16,000 page faults, the slowest thing there is in the lab.
        monkeypatch.setattr(keys_module, "DEFAULT_COST", MINIMUM_COST)

    def __call__(self, *arguments: str | Path) -> tuple[int, bytes, str]:
        """Return exit code, standard output and standard error."""
        self._capture.readouterr()
        code = run([str(word) for word in arguments])
        out, err = self._capture.readouterr()
        return code, out, err.decode()

    def done(self, *arguments: str | Path) -> bytes:
        """Run, insist on success, and return standard output."""
        code, out, err = self(*arguments)
        assert code == 0, (arguments, code, out, err)
        return out

    def backup(self, *arguments: str) -> dict[str, Any]:
        """Back up, and return what the last event says of the first volume."""
        backups = json.loads(self.done("backup", "--json", *arguments).splitlines()[-1])["backups"]
        first: dict[str, Any] = backups[0]
        return first
