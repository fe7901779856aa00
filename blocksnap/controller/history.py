"""Which runs this host has committed for a volume: what a host that was rolled back or cloned does not know.

An incremental backup trusts a thin pool's own counters, and counters alone are no proof: when the
disks under a pool are rolled back by a hypervisor or an array, or a machine is cloned, they go on
and soon look right again. So each run is written down here before it commits, and a parent whose
run is not known is not trusted. Nothing is left on the pool for that. What it cannot see is a pool
rolled back under a host that was not (docs/design.md, section 4.1).
"""

from __future__ import annotations

import json
import os
from hashlib import blake2b
from pathlib import Path

_FOLDER = "history"
_RUNS_KEPT = 4096
"""Of all repositories of a volume together: hourly runs to one do not push out quarterly ones to another.

They are 150 KB, which each run writes anew.
"""


class History:
    """The runs of one volume, newest last."""

    def __init__(self, state_directory: str | Path, volume_key: str) -> None:
        self._folder = Path(state_directory) / _FOLDER
        self._path = self._folder / f"{blake2b(volume_key.encode(), digest_size=16).hexdigest()}.json"
        self._key = volume_key

    def knows(self, run: str) -> bool:
        """Tell whether this host has written the run down; a damaged history knows nothing."""
        return run in self._load()

    def add(self, run: str) -> None:
        """Write a run down; durable when this returns. Raises OSError."""
        runs = [*[known for known in self._load() if known != run][1 - _RUNS_KEPT :], run]
        self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        beside = self._path.with_suffix(".new")
        with beside.open("w") as file:
            json.dump({"volume": self._key, "runs": runs}, file)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(self._path)
        folder = os.open(self._folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)

    def _load(self) -> list[str]:
        try:
            document = json.loads(self._path.read_bytes())
        except (OSError, ValueError):
            return []
        runs = document.get("runs") if isinstance(document, dict) else None
        return [run for run in runs if isinstance(run, str)] if isinstance(runs, list) else []
