"""Which host this is: a stable id that gives nothing away, and the name people use."""

from __future__ import annotations

import os
from collections.abc import Collection
from functools import cache
from hashlib import blake2b
from pathlib import Path

from blocksnap.system import sysfs

_SOURCES = (Path("/etc/machine-id"), Path("/var/lib/dbus/machine-id"))
_PROC = Path("/proc")
_PURPOSE = b"blocksnap host id"
_ENDED = frozenset("ZX")


@cache
def host_id() -> str:
    """Return 32 hexadecimal digits that stay the same for this installation.

    machine-id(5) asks that the raw id never leaves the machine, so a keyed hash of it is used. A
    host without one is known by its name.
    """
    secret = next(filter(None, map(_read, _SOURCES)), None) or "name:" + host_name()
    return blake2b(secret.encode(), key=_PURPOSE, digest_size=16).hexdigest()


def host_name() -> str:
    """Return the host's name."""
    return os.uname().nodename


def boot_id() -> str:
    """Return the id of this boot of the kernel."""
    return sysfs.exact_text(_PROC / "sys/kernel/random/boot_id").strip()


def boot_time() -> float:
    """Return when the kernel was started, in seconds of CLOCK_REALTIME."""
    for line in sysfs.exact_text(_PROC / "stat").splitlines():
        if line.startswith("btime "):
            return float(line.split()[1])
    return 0.0


def process_start(pid: int) -> int | None:
    """Return the start time of a process in ticks since boot, which tells it from a later one with its pid.

    None when there is no such process, or only its remains.
    """
    try:
        fields = _state_and_on(sysfs.exact_text(_PROC / str(pid) / "stat"))
    except (FileNotFoundError, ProcessLookupError):
        return None
    state, start = fields[0], fields[19]
    return None if state in "ZXx" else int(start)


def processes(names: Collection[str]) -> list[int]:
    """Return the processes that run a program of one of these names; one that has ended does so no more.

    Raises OSError where that cannot be told.
    """
    found = []
    for folder in sysfs.find(_PROC, "[0-9]*"):
        if sysfs.text_of(folder / "comm") in names:
            # Whoever started it may never ask what became of it.
            status = sysfs.text_of(folder / "stat")
            if status and _state_and_on(status)[0] not in _ENDED:
                found.append(int(folder.name))
    return found


def _state_and_on(status: str) -> list[str]:
    """Return the fields after the name of the program, which may have anything in it (proc_pid_stat(5))."""
    return status.rpartition(")")[2].split()


def _read(path: Path) -> str | None:
    text = sysfs.text_of(path)
    # systemd writes "uninitialized" on first boot.
    return text if text is not None and len(text) == 32 else None
