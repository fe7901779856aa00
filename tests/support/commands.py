"""Run the command line as users do: a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from support.forks import become_blocksnap, load_everything

PASSPHRASE = "correct horse battery staple"


@dataclass(frozen=True)
class Outcome:
    """What a command ended with."""

    code: int
    stdout: bytes
    stderr: str

    @property
    def text(self) -> str:
        return self.stdout.decode()

    @property
    def document(self) -> Any:
        return json.loads(self.stdout)

    @property
    def events(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.text.splitlines()]

    @property
    def backups(self) -> list[dict[str, Any]]:
        done = self.events[-1]
        assert done["event"] == "done", (done, self.stderr)
        found: list[dict[str, Any]] = done["backups"]
        return found

    @property
    def errors(self) -> list[str]:
        return [line for line in self.stderr.splitlines() if line.startswith("error:")]


@dataclass
class CommandLine:
    """blocksnap with a repository, a state directory and a passphrase of its own."""

    folder: Path
    new_interpreters: bool = False
    """Also for commands that run to their end: they are forks of the test otherwise, which is much faster."""
    repository: Path = field(init=False)
    environment: dict[str, str] = field(init=False)

    def __post_init__(self) -> None:
        self.repository = self.folder / "repository"
        inherited = {k: v for k, v in os.environ.items() if not k.startswith("BLOCKSNAP_")}
        self.environment = {
            **inherited,
            "BLOCKSNAP_REPOSITORY": str(self.repository),
            "BLOCKSNAP_STATE_DIRECTORY": str(self.folder / "state"),
            "BLOCKSNAP_CACHE": str(self.folder / "cache"),
            "BLOCKSNAP_PASSPHRASE": PASSPHRASE,
            "BLOCKSNAP_CONFIG": str(self.folder / "blocksnap.toml"),
        }

    def argv(self, *arguments: str | Path) -> list[str]:
        return [sys.executable, "-m", "blocksnap", *map(str, arguments)]

    def start(self, *arguments: str | Path, **environment: str | None) -> subprocess.Popen[bytes]:
        """Start a new interpreter, as users do."""
        return subprocess.Popen(
            self.argv(*arguments),
            env=self._environment(environment),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )

    def __call__(self, *arguments: str | Path, **environment: str | None) -> Outcome:
        """Run to the end; keyword arguments set environment variables, None removes one."""
        if self.new_interpreters:
            process = self.start(*arguments, **environment)
        else:
            process = self._fork(*arguments, **environment)
        stdout, stderr = process.communicate(timeout=600)
        return Outcome(process.returncode, stdout, stderr.decode())

    def _fork(self, *arguments: str | Path, **environment: str | None) -> subprocess.Popen[bytes]:
        load_everything()
        words = [str(word) for word in arguments]
        return subprocess.Popen(
            self.argv(*arguments),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            preexec_fn=partial(become_blocksnap, words, self._environment(environment)),  # noqa: PLW1509
        )

    def done(self, *arguments: str | Path, **environment: str | None) -> Outcome:
        """Run, and insist on success."""
        outcome = self(*arguments, **environment)
        assert outcome.code == 0, (arguments, outcome)
        return outcome

    def _environment(self, changes: dict[str, str | None]) -> dict[str, str]:
        merged = {**self.environment, **{k: v for k, v in changes.items() if v is not None}}
        return {k: v for k, v in merged.items() if changes.get(k, v) is not None}
