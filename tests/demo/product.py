# SPDX-License-Identifier: Apache-2.0
"""blocksnap as an administrator uses it: its command line, and the JSON it prints."""

from __future__ import annotations

import json
import os
import secrets
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from commands import DemoError, run


@dataclass(frozen=True, slots=True)
class Backup:
    """What `backup --json` told of a backup, and when the command was started and ended."""

    id: str
    time: float
    kind: str
    method: str
    reason: str
    volume_bytes: int
    read_bytes: int
    stored_bytes: int
    freeze_ms: float
    seconds: float
    began: float
    ended: float

    @property
    def certain_before(self) -> float:
        """What was committed until this instant is in the backup.

        The backup's time is when the volume was first seen standing still. If it was never seen so, the
        snapshot may be older than that time, and only the start of the command is certain.
        """
        return self.time if self.freeze_ms else self.began

    @property
    def certain_after(self) -> float:
        """What was begun from this instant on is not in the backup."""
        return self.time + self.freeze_ms / 1000 if self.freeze_ms else self.ended


class Blocksnap:
    """The command, with a repository and passphrase of its own and nothing of the machine's configuration."""

    def __init__(self, repository: Path, run_directory: Path) -> None:
        self._environment = {
            **dict.fromkeys((name for name in os.environ if name.startswith("BLOCKSNAP_")), ""),
            "BLOCKSNAP_REPOSITORY": str(repository),
            "BLOCKSNAP_PASSPHRASE": secrets.token_hex(16),
            "BLOCKSNAP_STATE_DIRECTORY": str(run_directory / "state"),
            "BLOCKSNAP_CACHE": str(run_directory / "cache"),
            "BLOCKSNAP_CONFIG": str(run_directory / "no-configuration"),
        }

    def init(self) -> None:
        """Make the repository."""
        self._call("init")

    def back_up(self, volume: str) -> Backup:
        """Back a volume up; raises DemoError for anything but a backup without warnings."""
        began = time.time()
        told = self._call("backup", volume)
        ended = time.time()
        fields = {name: told["backups"][0][name] for name in _TOLD}
        taken_at = datetime.fromisoformat(told["backups"][0]["time"]).timestamp()
        return Backup(**fields, time=taken_at, began=began, ended=ended)

    def restore(self, backup: str, volume: str) -> float:
        """Restore to a new volume, read it back; return the seconds it took itself."""
        return float(self._call("restore", backup, volume, "--create", "--verify")["seconds"])

    def restore_instantly(self, backup: str, volume: str) -> InstantRestore:
        """Begin an instant restore at a pace that leaves time to look; return when the volume can be used."""
        argv = [sys.executable, "-m", "blocksnap", "restore", backup, volume, "--instant", "--rate", "4M"]
        return InstantRestore([*argv, "--json"], self._environment)

    def verify(self, backup: str) -> None:
        """Read a backup back from the repository; raises DemoError when anything is damaged."""
        self._call("verify", backup)

    def listed(self) -> list[str]:
        """Return the ids of all backups, oldest first."""
        return [str(backup["id"]) for backup in self._call("list")["backups"]]

    def _call(self, command: str, *arguments: str) -> dict[str, Any]:
        """Return the document that the command printed: the only one, or its last event."""
        argv = [sys.executable, "-m", "blocksnap", command, *arguments, "--json"]
        printed = run(*argv, environment=self._environment)
        try:
            document: dict[str, Any] = json.loads(printed)
        except json.JSONDecodeError:
            document = json.loads(printed.splitlines()[-1])
        return document


class InstantRestore:
    """A restore that goes on while its volume is used."""

    def __init__(self, argv: Sequence[str], environment: Mapping[str, str]) -> None:
        self._process = subprocess.Popen(
            argv,
            env={**os.environ, **environment},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.seconds = float(self._until("usable")["seconds"])

    @property
    def is_at_work(self) -> bool:
        """Whether the data is still arriving."""
        return self._process.poll() is None

    def finish(self) -> float:
        """Wait until the volume is one like any other; return the seconds it took."""
        seconds = float(self._until("done")["seconds"])
        self._process.communicate()
        if self._process.returncode:
            raise DemoError(f"the restore ended with {self._process.returncode}")
        return seconds

    def kill(self) -> None:
        """End it if it still runs."""
        self._process.kill()
        self._process.wait()

    def _until(self, name: str) -> dict[str, Any]:
        if self._process.stdout is None:
            raise DemoError("the restore has no pipe")
        for line in self._process.stdout:
            event: dict[str, Any] = json.loads(line)
            if event["event"] == name:
                return event
        raise DemoError(f"the restore ended without {name}: {self._process.communicate()[1].strip()}")


_TOLD = (
    "id",
    "kind",
    "method",
    "reason",
    "volume_bytes",
    "read_bytes",
    "stored_bytes",
    "freeze_ms",
    "seconds",
)
