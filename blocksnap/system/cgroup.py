"""Control groups, version 2: where they are, who is in them, whether they are frozen.

See cgroups(7) and the kernel's admin-guide/cgroup-v2.rst.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path

from blocksnap.errors import QuiesceError
from blocksnap.system import mounts, sysfs
from blocksnap.system.command import CommandError, CommandTimeoutError, MissingProgramError, run

_PROC = Path("/proc")
FROZEN, THAWED = "1", "0"


class CgroupError(QuiesceError):
    """A control group cannot be frozen (exit code 15)."""

    def __init__(self, name: str, problem: str, resolution: str | None = None) -> None:
        self.name = name
        self.problem = problem
        super().__init__(f"{name} cannot be frozen: {problem}", resolution=resolution)


def root() -> Path | None:
    """Return where the hierarchy of version 2 is mounted; None where it is not."""
    found = [
        mount.point for mount in mounts.read_mounts() if mount.filesystem == "cgroup2" and mount.root == "/"
    ]
    return Path(found[0]) if found else None


def of_unit(unit: str) -> Path:
    """Return the directory of a systemd unit's control group; raises CgroupError."""
    top = root()
    if top is None:
        raise CgroupError(unit, "there is no control group hierarchy of version 2 here")
    try:
        path = run("systemctl", "show", "--property", "ControlGroup", "--value", "--", unit).strip()
    except (CommandError, CommandTimeoutError, MissingProgramError) as err:
        raise CgroupError(unit, err.brief) from err
    if not path or path == "/":
        raise CgroupError(unit, "no process of it runs", "start the unit, or take it out of the job")
    return top / path.lstrip("/")


def processes(folder: Path) -> Iterator[int]:
    """Yield the processes in a group and in the groups below it; one may be gone by then."""
    for name, _, _ in os.walk(folder):
        try:
            text = sysfs.exact_text(Path(name) / "cgroup.procs")
        except OSError as err:
            sysfs.raise_lack(err)
            continue
        # 0 stands for a process of another PID namespace.
        yield from (int(word) for word in text.split() if word != "0")


def command_of(pid: int) -> str:
    """Return the name of a process, empty when it is gone; the kernel cuts it at 15 letters."""
    try:
        return sysfs.exact_text(_PROC / str(pid) / "comm").removesuffix("\n")
    except OSError:
        return ""


def is_asked_to_freeze(fd: int) -> bool:
    """Tell by an open ``cgroup.freeze`` whether somebody wants the group frozen."""
    return os.pread(fd, 2, 0).startswith(b"1")


def is_frozen(fd: int) -> bool:
    """Tell by an open ``cgroup.events`` whether all processes of the group stand still."""
    return b"frozen 1" in os.pread(fd, 4096, 0)


def wait_frozen(fd: int, deadline: float) -> bool:
    """Wait until all processes stand still; False when they do not before ``deadline`` (CLOCK_MONOTONIC)."""
    pause = 0.0002
    while not is_frozen(fd):
        if time.monotonic() > deadline:
            return False
        time.sleep(pause)
        pause = min(pause * 1.5, 0.005)
    return True


def stands_still(pid: int) -> bool:
    """Tell whether a process is in a group that is frozen as a whole; False when it is gone."""
    top = root()
    try:
        lines = sysfs.exact_text(_PROC / str(pid) / "cgroup").split("\n")
        path = next(line.removeprefix("0::") for line in lines if line.startswith("0::"))
        events = sysfs.exact_text(top / path.lstrip("/") / "cgroup.events") if top is not None else ""
    except (OSError, StopIteration):
        return False
    return "frozen 1" in events
