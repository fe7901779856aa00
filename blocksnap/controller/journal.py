"""A durable record of what a run is about to leave on the host, written before it does.

One file a run, ``STATE_DIR/journal/RUN.jsonl``: a line for each step, each flushed to the medium before
the step is taken. The first line says who the run is. The file is locked while its owner lives and is
removed at the very end, when nothing is left; so a file that nobody holds is a run that died, and its
lines say what to look for. The last line may be torn, when the power went while it was written: then
its step was not taken.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from blocksnap.errors import BlocksnapError, UsageError
from blocksnap.system import host
from blocksnap.system.flock import lock_within, try_lock

Step = Literal[
    "begin",
    "quiesce",
    "snapshot",
    "taken",
    "released",
    "hold",
    "activate",
    "commit",
    "rotate",
    "remove",
    "removed",
    "recovered",
]
_SUFFIX = ".jsonl"
_TAKE_OVER_SECONDS = 1.0
_RUN = re.compile(r"[a-zA-Z0-9][a-zA-Z0-9_.-]{0,99}")


class StateError(BlocksnapError):
    """The state directory cannot be written (exit code 1)."""

    def __init__(self, path: str, err: OSError) -> None:
        self.path = path
        super().__init__(
            f"cannot write {path}: {os.strerror(err.errno or 0)}",
            details="a run first writes down what it leaves on the host, to clean up after a crash",
            resolution="make room there, or name another state directory",
        )


@dataclass(frozen=True, slots=True)
class Owner:
    """The process that writes a journal, told from any later one with its number."""

    pid: int
    start: int
    boot: str
    host: str
    began: float

    @classmethod
    def current(cls) -> Owner:
        """Return this process."""
        pid = os.getpid()
        return cls(pid, host.process_start(pid) or 0, host.boot_id(), host.host_name(), time.time())

    def is_alive(self) -> bool:
        """Whether that process still runs, as far as can be seen from here."""
        return self.boot == host.boot_id() and host.process_start(self.pid) == self.start


@dataclass(frozen=True, slots=True)
class Rotation:
    """A committed run's decision: its snapshot stays as base, or not, and the bases before it go."""

    volume: str
    vg: str
    snapshot: str
    owner: str
    lv_uuid: str
    stays: bool


@dataclass(frozen=True, slots=True)
class CloneRotation:
    """The same of the clone of an image."""

    volume: str
    path: str
    name: str
    owner: str
    stays: bool


def rotation_facts(trace: Mapping[str, str]) -> dict[str, str]:
    """Return what of the trace of a snapshot the step ``rotate`` says."""
    if "vg" in trace:
        return {"vg": trace["vg"], "lv": trace["lv"], "lv_uuid": trace["origin_uuid"]}
    return {"path": trace["path"], "name": trace["name"]}


@dataclass(frozen=True, slots=True)
class Entry:
    """What the journal of one run says."""

    run: str
    path: Path
    owner: Owner | None
    steps: tuple[dict[str, object], ...]
    alive: bool
    ending: bool = False
    """The run is dead, but its watchdog is still at work."""

    @property
    def is_of_this_boot(self) -> bool:
        """Whether what the run froze or suspended may still be so: at a reboot the kernel forgets it."""
        return self.owner is not None and self.owner.boot == host.boot_id()

    def traces(self, volume: str | None = None) -> list[dict[str, str]]:
        """Return what may be left on the host, of one volume or of all."""
        left: dict[str, dict[str, str]] = {}
        for step in self.steps:
            trace = step.get("trace")
            if not isinstance(trace, dict):
                continue
            name = json.dumps(trace, sort_keys=True)
            if step.get("step") == "removed":
                left.pop(name, None)
            elif volume is None or step.get("volume") == volume:
                left[name] = {str(key): str(value) for key, value in trace.items()}
        return list(left.values())

    def origin_of(self, vg: str, snapshot: str) -> str | None:
        """Return the UUID of the volume of which the run announced a snapshot of that name."""
        for trace in self.traces():
            if (trace.get("vg"), trace.get("lv")) == (vg, snapshot):
                return trace.get("origin_uuid")
        return None

    def rotations(self) -> list[Rotation]:
        """Return what was to become of the bases, if the run got so far: its backups are committed then."""
        return [
            Rotation(
                volume=str(step.get("volume")),
                vg=str(step["vg"]),
                snapshot=str(step["lv"]),
                owner=str(step["owner"]),
                lv_uuid=str(step["lv_uuid"]),
                stays=step.get("stays") is True,
            )
            for step in self.steps
            if step.get("step") == "rotate" and {"vg", "lv", "owner", "lv_uuid"} <= step.keys()
        ]

    def clone_rotations(self) -> list[CloneRotation]:
        """Return the same of images."""
        return [
            CloneRotation(
                volume=str(step.get("volume")),
                path=str(step["path"]),
                name=str(step["name"]),
                owner=str(step["owner"]),
                stays=step.get("stays") is True,
            )
            for step in self.steps
            if step.get("step") == "rotate" and {"path", "name", "owner"} <= step.keys()
        ]

    def standstill(self) -> dict[str, object] | None:
        """Return the step that says what may stand still; None when there is none, or all was let go."""
        found = None
        for step in self.steps:
            if step.get("step") == "quiesce":
                found = step
            elif step.get("step") == "released" and not step.get("failed"):
                found = None
        return found

    def volumes(self) -> set[str]:
        """Return the keys of the volumes that the run announced."""
        return {str(step["volume"]) for step in self.steps if "volume" in step}


class Journal:
    """The journal of the run of this process."""

    def __init__(self, state_directory: str | Path, run: str) -> None:
        """Create it; raises UsageError for a name that cannot be a run's, StateError."""
        if not _RUN.fullmatch(run):
            raise UsageError(f"{run!r} cannot be the name of a run")
        self.run = run
        self._torn = False
        folder = _folder(state_directory)
        self._path = folder / (run + _SUFFIX)
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            with _hold_folder(folder, fcntl.LOCK_EX):
                self._create(folder)
        except FileExistsError as err:
            raise UsageError(f"there is a run {run} already", resolution="run it again") from err
        except OSError as err:
            raise StateError(str(folder), err) from err

    def _create(self, folder: Path) -> None:
        """Make the file; nobody reads the folder meanwhile and takes it for that of a dead run."""
        self._fd = os.open(
            self._path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND | os.O_CLOEXEC, 0o600
        )
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX)
            self.append("begin", run=self.run, **asdict(Owner.current()))
            _sync_folder(folder)
        except BaseException:
            self._path.unlink()
            os.close(self._fd)
            raise

    @property
    def path(self) -> Path:
        """Where it is."""
        return self._path

    def fileno(self) -> int:
        """Return its descriptor; whoever holds a copy keeps the run from being taken for a dead one."""
        return self._fd

    def append(self, step: Step, **facts: object) -> None:
        """Write a step down, durably, before it is taken."""
        self.append_all([(step, facts)])

    def append_all(self, steps: list[tuple[Step, dict[str, object]]]) -> None:
        """Write several steps down with one flush; what could not be written keeps no later step from it."""
        lines = "".join(
            json.dumps({"step": step, "time": time.time(), **facts}) + "\n" for step, facts in steps
        )
        left = (f"\n{lines}" if self._torn else lines).encode()
        self._torn = True
        try:
            while left:
                # A medium that fills up takes a part first, and refuses the rest.
                left = left[os.write(self._fd, left) :]
            os.fdatasync(self._fd)
        except OSError as err:
            raise StateError(str(self._path), err) from err
        self._torn = False

    def finish(self) -> None:
        """Remove it: nothing is left on the host. Raises StateError, and is open then."""
        if self._fd >= 0:
            _remove(self._path)
            self.close()

    def close(self) -> None:
        """Let it go without removing it: the next run will clean up."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def read_entries(state_directory: str | Path) -> list[Entry]:
    """Return the journals of all runs, the oldest first; none where they may not be read."""
    folder = _folder(state_directory)
    if not os.access(folder, os.R_OK | os.X_OK):
        return []
    # One that is just being made is not locked yet, and would be taken for that of a dead run.
    with _hold_folder(folder, fcntl.LOCK_SH):
        paths = [path for path in folder.glob("*" + _SUFFIX) if not path.name.startswith(".")]
        entries = [entry for path in paths if (entry := _read_entry(path))]
    return sorted(entries, key=lambda entry: (entry.owner.began if entry.owner else 0.0, entry.run))


def read_entry(path: Path) -> Entry | None:
    """Return one journal as it is now, None when it is gone."""
    return _read_entry(path)


@contextlib.contextmanager
def take_over(entry: Entry) -> Iterator[int | None]:
    """Hold the journal of a dead run, to finish what it says; None when somebody else does, or it is gone.

    Whoever only reads it has it locked for an instant (``read_entries``), and is waited for.
    """
    try:
        fd = os.open(entry.path, os.O_RDWR | os.O_APPEND | os.O_CLOEXEC)
    except FileNotFoundError:
        yield None
        return
    try:
        yield fd if lock_within(fd, _TAKE_OVER_SECONDS) else None
    finally:
        os.close(fd)


def close_entry(entry: Entry) -> None:
    """Remove the journal of a dead run, of which nothing is left; raises StateError."""
    _remove(entry.path)


def _remove(path: Path) -> None:
    try:
        path.unlink(missing_ok=True)
    except OSError as err:
        raise StateError(str(path), err) from err
    _sync_folder(path.parent)


def _read_entry(path: Path) -> Entry | None:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    try:
        held = not try_lock(fd, shared=True)
        text = path.read_text(errors="replace")
    except FileNotFoundError:
        return None
    finally:
        os.close(fd)
    steps = _parse(text)
    first = steps[0] if steps else {}
    try:
        owner = Owner(
            int(str(first["pid"])),
            int(str(first["start"])),
            str(first["boot"]),
            str(first["host"]),
            float(str(first["began"])),
        )
    except (KeyError, ValueError):
        owner = None
    # A worker of a dead run may still hold the lock; a run in another PID namespace shows no process here.
    running = owner is not None and owner.is_alive()
    return Entry(
        run=path.name.removesuffix(_SUFFIX),
        path=path,
        owner=owner,
        steps=tuple(steps),
        alive=held or running,
        ending=held and owner is not None and owner.boot == host.boot_id() and not running,
    )


def _parse(text: str) -> list[dict[str, object]]:
    steps = []
    for line in text.splitlines():
        try:
            step = json.loads(line)
        except ValueError:
            # A torn line is the last one of the run; a watchdog or a later run may have written behind it.
            continue
        if isinstance(step, dict):
            steps.append(step)
    return steps


def _folder(state_directory: str | Path) -> Path:
    return Path(state_directory) / "journal"


@contextlib.contextmanager
def _hold_folder(folder: Path, how: int) -> Iterator[None]:
    """Lock the folder of journals for a moment."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, how)
        yield
    finally:
        os.close(fd)


def _sync_folder(folder: Path) -> None:
    try:
        fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
    except OSError as err:
        raise StateError(str(folder), err) from err
