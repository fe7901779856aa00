"""What an instant restore is about, written down before it leaves anything on the host.

One file a volume, ``STATE_DIR/instant/VG-NAME.json``, replaced as a whole and flushed before each step that
it names; it is removed when the volume is one of LVM's like any other. Whoever works on the volume holds the
file beside it locked, so one whose lock is free was interrupted (docs/design.md, section 6.5).
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from blocksnap.controller.journal import StateError
from blocksnap.errors import BlocksnapError, BusyError
from blocksnap.system.devmapper import encode_name
from blocksnap.system.flock import lock_within, try_lock
from blocksnap.system.lvm_config import ARRIVING_SUFFIX

_FOLDER = "instant"
_LOCK_SECONDS = 1.0
Stage = Literal["making", "arriving", "verifying", "whole", "merged"]
"""Nothing can be used yet; what is missing is read from the repository; it is all there and read back, if
that was asked for; it is all there, and what was written meanwhile goes to it; that is there too."""


class InstantBusyError(BusyError):
    """Somebody is at work on the volume (exit code 11)."""

    def __init__(self, volume: str) -> None:
        self.volume = volume
        super().__init__(
            f"a restore of {volume} is at work already", resolution="wait until it is done, or end it"
        )


class NothingArrivesError(BlocksnapError):
    """There is no such restore (exit code 1)."""

    def __init__(self, volume: str, reason: str = "no instant restore of it was begun on this host") -> None:
        self.volume = volume
        super().__init__(f"{volume}: {reason}", resolution="blocksnap doctor tells what is under way")


class Arrival(BaseModel):
    """An instant restore.

    ``arriving`` is the volume that the backup goes to, and ``meanwhile`` the one for what is written before
    it is whole; both get names of their own. ``token`` tells its network block device from others.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    stage: Stage
    repository: str
    backup: str
    size: int
    group: str
    name: str
    arriving: str
    meanwhile: str
    token: str
    verify: bool = False

    @property
    def has_all(self) -> bool:
        """Whether all of the backup is in the volume, so that nothing of the repository is needed."""
        return self.stage in ("whole", "merged")

    @property
    def volume(self) -> str:
        """``VG/NAME``."""
        return f"{self.group}/{self.name}"

    @property
    def device(self) -> str:
        """The name of its device in device-mapper, which is the one that LVM would give it."""
        return encode_name(self.group, self.name)

    @property
    def below(self) -> str:
        """The name of the device that has what arrived, and what has not."""
        return self.device + ARRIVING_SUFFIX


class ArrivalFile:
    """Where an instant restore is written down, locked from ``__enter__`` to ``__exit__``."""

    def __init__(self, state_directory: str, group: str, name: str) -> None:
        self._folder = Path(state_directory) / _FOLDER
        self._path = self._folder / f"{encode_name(group, name)}.json"
        self._volume = f"{group}/{name}"

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Hold it for as long as the block lasts; raises InstantBusyError, StateError."""
        try:
            self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            fd = os.open(self._path.with_suffix(".lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as err:
            raise StateError(str(self._folder), err) from err
        try:
            if not lock_within(fd, _LOCK_SECONDS):
                raise InstantBusyError(self._volume)
            yield
        finally:
            os.close(fd)

    def is_held(self) -> bool:
        """Tell whether somebody is at work."""
        try:
            fd = os.open(self._path.with_suffix(".lock"), os.O_RDWR | os.O_CLOEXEC)
        except OSError:
            return False
        try:
            return not try_lock(fd, shared=True)
        finally:
            os.close(fd)

    def read(self) -> Arrival | None:
        """Return what is written down; None when there is nothing that can be understood."""
        try:
            return Arrival.model_validate_json(self._path.read_bytes())
        except (OSError, ValidationError):
            return None

    def write(self, arrival: Arrival) -> None:
        """Write it down, durably; raises StateError."""
        beside = self._path.with_suffix(".new")
        try:
            with beside.open("w") as file:
                file.write(arrival.model_dump_json())
                file.flush()
                os.fsync(file.fileno())
            beside.replace(self._path)
            self._flush_folder()
        except OSError as err:
            raise StateError(str(self._path), err) from err

    def remove(self) -> None:
        """Nothing is left that anybody has to know of; raises StateError."""
        try:
            self._path.unlink(missing_ok=True)
            self._flush_folder()
        except OSError as err:
            raise StateError(str(self._path), err) from err

    def _flush_folder(self) -> None:
        fd = os.open(self._folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


def read_arrivals(state_directory: str) -> list[tuple[Arrival, bool]]:
    """Return all instant restores of this host that are not complete, and whether somebody is at work."""
    found = []
    for path in sorted((Path(state_directory) / _FOLDER).glob("*.json")):
        with contextlib.suppress(OSError, ValidationError):
            arrival = Arrival.model_validate_json(path.read_bytes())
            held = ArrivalFile(state_directory, arrival.group, arrival.name).is_held()
            found.append((arrival, held))
    return found
