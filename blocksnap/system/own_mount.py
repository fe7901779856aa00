"""A mount of ours where others see it, told from any other by its source: only it is ever unmounted.

By its name somebody else's could be: ours was unmounted, and another one is there now, or was put over it; or
a directory above it was renamed, and it is elsewhere. Numbers do not tell either, since the kernel gives
those of mounts and their devices out again at once.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import threading
from pathlib import Path

from blocksnap.system import namespace, sysfs
from blocksnap.system.mounts import unescape

_THREAD = Path("/proc/thread-self")
"""Not /proc/self: a thread can have mounts of its own."""
_ATTEMPTS = 3


def new_source() -> str:
    """Return what no other mount has as its source (the first field of /proc/mounts)."""
    return f"blocksnap-{secrets.token_hex(8)}"


def is_there(source: str) -> bool:
    """Tell whether it is mounted anywhere that this thread sees."""
    return bool(_mounted(source))


def unmount(source: str) -> None:
    """Take it away from wherever it is by now, at once for whoever looks.

    The kernel says where that is, under new names of directories above too. What is unmounted is what was
    looked at: gone meanwhile, it is not mistaken for what came after it. What lies under another mount stays.
    """
    for _ in range(_ATTEMPTS):
        mounted = _mounted(source)
        if not mounted:
            return
        for number, point in mounted.items():
            _unmount_at(point, number)


def unmount_in(namespace_fd: int, source: str) -> None:
    """The same in another mount namespace, by a thread that enters it and ends there."""

    def work() -> None:
        with contextlib.suppress(OSError):
            namespace.enter_mounts(namespace_fd)
            unmount(source)

    thread = threading.Thread(target=work, name="blocksnap-unmount")
    thread.start()
    thread.join()


def _unmount_at(point: str, number: int) -> None:
    # Renamed after the look, it is found by the next one.
    with contextlib.suppress(OSError):
        fd = os.open(point, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            if _number_of(fd) == number:
                namespace.unmount(f"/proc/self/fd/{fd}")
        finally:
            os.close(fd)


def _number_of(fd: int) -> int | None:
    """Return the number of the mount that a descriptor was opened on (proc_pid_fdinfo(5))."""
    for line in sysfs.exact_text(_THREAD / "fdinfo" / str(fd)).splitlines():
        name, _, value = line.partition(":")
        if name == "mnt_id":
            return int(value)
    return None


def _mounted(source: str) -> dict[int, str]:
    """Return where mounts with a source are, by their numbers; it has nothing in it that would be escaped."""
    found = {}
    for line in sysfs.exact_text(_THREAD / "mountinfo").strip("\n").split("\n"):
        # Not splitlines(): names may have what that takes for the end of a line.
        left, _, right = line.partition(" - ")
        if right.split(" ")[1:2] == [source]:
            fields = left.split(" ")
            found[int(fields[0])] = unescape(fields[4])
    return found
