"""One run at a time for each volume, by a lock that the kernel takes back when its holder dies."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterable
from hashlib import blake2b
from pathlib import Path
from types import TracebackType
from typing import Self

from blocksnap.controller.journal import StateError
from blocksnap.errors import BusyError
from blocksnap.system.flock import try_lock
from blocksnap.system.host import host_name

_LOOK_AGAIN_SECONDS = 0.1


class VolumeBusyError(BusyError):
    """Another run holds a volume (exit code 11)."""

    def __init__(self, volume: str, holder: dict[str, object]) -> None:
        self.volume = volume
        self.holder = holder
        began = holder.get("began")
        age = f" for {time.time() - began:.0f} s" if isinstance(began, float) else ""
        who = f"process {holder.get('pid', '?')} on {holder.get('host', '?')}"
        super().__init__(
            f"{volume} is held by another run: {who}{age}",
            resolution="wait until it is done (--wait SECONDS), or stop it",
        )


class VolumeLocks:
    """The locks of several volumes, taken all or none."""

    def __init__(
        self,
        state_directory: str | Path,
        volumes: Iterable[tuple[str, str]],
        *,
        wait_seconds: float = 0.0,
    ) -> None:
        """Name the volumes as (key, name) pairs; nothing is taken yet.

        A volume that another run has is waited for ``wait_seconds``, for all of them together.
        """
        self._wait = wait_seconds
        self._folder = Path(state_directory) / "locks"
        # Everybody takes them in the same order, so two runs cannot wait for each other.
        self._volumes = sorted(set(volumes))
        self._held: list[int] = []

    def __enter__(self) -> Self:
        """Take them; raises VolumeBusyError, StateError."""
        deadline = time.monotonic() + self._wait
        try:
            self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            for key, name in self._volumes:
                self._held.append(self._take(key, name, deadline))
        except OSError as err:
            self.release()
            raise StateError(str(self._folder), err) from err
        except BaseException:
            self.release()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, err: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()

    def release(self) -> None:
        """Let all of them go. The files stay: removing one would race with who is about to lock it."""
        while self._held:
            os.close(self._held.pop())

    def _take(self, key: str, name: str, deadline: float) -> int:
        path = self._folder / (blake2b(key.encode(), digest_size=16).hexdigest() + ".lock")
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            while not try_lock(fd):
                if time.monotonic() >= deadline:
                    raise VolumeBusyError(name, _holder(fd))
                time.sleep(_LOOK_AGAIN_SECONDS)
        except BaseException:
            os.close(fd)
            raise
        facts = {
            "pid": os.getpid(),
            "host": host_name(),
            "began": time.time(),
            "volume": name,
        }
        os.ftruncate(fd, 0)
        os.pwrite(fd, json.dumps(facts).encode(), 0)
        return fd


def _holder(fd: int) -> dict[str, object]:
    try:
        facts = json.loads(os.pread(fd, 4096, 0))
    except (OSError, ValueError):
        return {}
    return facts if isinstance(facts, dict) else {}
