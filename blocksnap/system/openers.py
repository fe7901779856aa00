"""Which processes have a block device open, as far as /proc tells: proc(5), ``fd`` and ``fdinfo``."""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Collection, Iterator
from pathlib import Path

_PROCESSES = Path("/proc")


def may_write(process: str | Path, fd: str) -> bool:
    """Tell whether a process, by its folder in /proc, can write through a descriptor; raises OSError."""
    with open(f"{process}/fdinfo/{fd}", encoding="ascii") as info:
        for line in info:
            if line.startswith("flags:"):
                return int(line.split()[1], 8) & os.O_ACCMODE != os.O_RDONLY
    return False


def device_writers(numbers: Collection[int]) -> list[str]:
    """Name the other processes that have one of some block devices open for writing.

    Virtual machines have their disks open so, and nothing keeps others from them: neither O_EXCL nor what
    sysfs knows of users. Of processes that our rights do not let us look at nothing is said.
    """
    found = []
    for folder in _PROCESSES.glob("[0-9]*"):
        if folder.name == str(os.getpid()):
            continue
        try:
            if any(may_write(folder, fd) for fd in _open_devices(folder, numbers)):
                name = (folder / "comm").read_text(errors="replace").strip()
                found.append(f"open for writing by process {folder.name} ({name})")
        except OSError:
            # It has ended meanwhile, or is none of ours to look at.
            continue
    return sorted(found)


def _open_devices(process: Path, numbers: Collection[int]) -> Iterator[str]:
    for fd in os.listdir(process / "fd"):
        path = process / "fd" / fd
        # One that is closed meanwhile does not matter.
        with contextlib.suppress(FileNotFoundError):
            # Only of devices: to ask for the status of a file may wait for a file server that is gone.
            if os.readlink(path).startswith("/dev/"):
                status = os.stat(path)
                if stat.S_ISBLK(status.st_mode) and status.st_rdev in numbers:
                    yield fd
