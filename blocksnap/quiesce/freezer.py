"""Processes that do not run for an instant: the freezer of control groups, version 2.

It asks nothing of the application, and is the way to one instant across several volumes: who does not run
does not write between the first snapshot and the last. What it had written by then is in the page cache, so
the filesystems are flushed or frozen after it, never before. Groups that the host or we ourselves need to
take a snapshot are refused.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from pathlib import Path

from blocksnap.quiesce.base import Guard, Strength, Trace
from blocksnap.system import cgroup
from blocksnap.system.cgroup import FROZEN, THAWED, CgroupError
from blocksnap.system.watchdog import Safeguard, Write

NEEDED = frozenset(
    {
        "systemd",
        "systemd-journal",
        "systemd-udevd",
        "dbus-daemon",
        "dbus-broker",
        "dmeventd",
        "lvmdbusd",
        "lvmlockd",
        "lvmpolld",
        "multipathd",
        "blocksnap-watch",
    }
)
"""Processes, by the first 15 letters of their names, that LVM, udev or we wait for."""


class CgroupFreezer:
    """The processes of a control group and of the groups below it."""

    strength: Strength = "frozen"

    def __init__(self, name: str, folder: Path) -> None:
        """Open what is needed; raises CgroupError."""
        self._name = name
        self._folder = folder
        self._freeze = self._events = -1
        self._guard: Guard | None = None
        self._began = False
        top = cgroup.root()
        if top is None or not folder.is_relative_to(top) or folder == top:
            raise CgroupError(name, f"{folder} is no control group of version 2 below its root")
        refuse_needed(name, folder)
        try:
            self._freeze = os.open(folder / "cgroup.freeze", os.O_RDWR | os.O_CLOEXEC)
            self._events = os.open(folder / "cgroup.events", os.O_RDONLY | os.O_CLOEXEC)
            already = cgroup.is_asked_to_freeze(self._freeze)
        except OSError as err:
            self.close()
            raise CgroupError(name, os.strerror(err.errno or 0)) from err
        if already:
            self.close()
            raise CgroupError(name, "somebody else has frozen it", f"see {folder}/cgroup.freeze")

    @classmethod
    def of_unit(cls, unit: str) -> CgroupFreezer:
        """Return the freezer of a systemd unit; raises CgroupError."""
        return cls(f"unit {unit}", cgroup.of_unit(unit))

    @classmethod
    def of_folder(cls, folder: str) -> CgroupFreezer:
        """Return the freezer of a group, given by its directory; raises CgroupError."""
        return cls(f"control group {folder}", Path(os.path.realpath(folder)))

    @property
    def folder(self) -> Path:
        """Its directory."""
        return self._folder

    @property
    def name(self) -> str:
        """What was configured."""
        return self._name

    def safeguards(self) -> Sequence[Safeguard]:
        """Return the writing of a 0."""
        return [Write(self._freeze, THAWED)]

    def trace(self) -> Trace | None:
        """Return where it is."""
        return {"kind": "cgroup", "path": str(self._folder), "name": self._name}

    def attend(self, guard: Guard) -> None:
        """There is nothing to be done yet."""
        self._guard = guard

    def begin(self, deadline: float) -> None:
        """Freeze it and wait until all its processes stand still."""
        if self._guard is None:
            return
        self._guard.arm(0)
        self._began = True
        try:
            os.pwrite(self._freeze, FROZEN.encode(), 0)
            frozen = cgroup.wait_frozen(self._events, deadline)
        except OSError as err:
            raise CgroupError(self._name, os.strerror(err.errno or 0)) from err
        if not frozen:
            raise CgroupError(
                self._name,
                "its processes do not stop in time",
                "one of them waits for a device or a server, or for a child that it made with vfork",
            )

    def end(self, deadline: float) -> None:  # noqa: ARG002 - it takes no time
        """Let them run; raises CgroupError when they ran before."""
        if self._guard is None or not self._began:
            return
        guard, self._guard = self._guard, None
        try:
            held = cgroup.is_asked_to_freeze(self._freeze)
            os.pwrite(self._freeze, THAWED.encode(), 0)
        except OSError as err:
            raise CgroupError(self._name, os.strerror(err.errno or 0)) from err
        guard.disarm(0)
        if not held:
            raise CgroupError(self._name, "somebody thawed it before the snapshots were taken")

    def close(self) -> None:
        """Close its files."""
        for fd in (self._freeze, self._events):
            if fd >= 0:
                os.close(fd)
        self._freeze = self._events = -1


def refuse_needed(name: str, folder: Path) -> None:
    """Make sure that a group holds nobody who is needed to take a snapshot; raises CgroupError."""
    own = {os.getpid(), os.getppid(), 1}
    for pid in cgroup.processes(folder):
        if pid in own:
            raise CgroupError(
                name, "blocksnap itself runs in it", "run it from another unit: blocksnap's timer does"
            )
        command = cgroup.command_of(pid)
        if command in NEEDED:
            raise CgroupError(name, f"{command} (process {pid}) runs in it, and snapshots need it")


def thaw_leftover(trace: Trace) -> bool:
    """Thaw a group that a dead run left frozen; False when there is nothing to do. Raises CgroupError."""
    path = Path(str(trace["path"]))
    with contextlib.ExitStack() as stack:
        try:
            fd = os.open(path / "cgroup.freeze", os.O_RDWR | os.O_CLOEXEC)
            stack.callback(os.close, fd)
            if not cgroup.is_asked_to_freeze(fd):
                return False
            os.pwrite(fd, THAWED.encode(), 0)
        except FileNotFoundError:
            return False
        except OSError as err:
            raise CgroupError(str(trace.get("name", path)), os.strerror(err.errno or 0)) from err
    return True
