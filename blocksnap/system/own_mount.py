"""A mount of ours where others see it, told from any other by its source: only it is ever unmounted.

By its name alone somebody else's could be: ours was unmounted, and another one is there now, or was put over
it. Numbers do not tell either, since the kernel gives those of mounts and their devices out again at once.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import threading
from pathlib import Path

from blocksnap.system import namespace

_THREAD = Path("/proc/thread-self")
"""Not /proc/self: a thread can have mounts of its own."""


def new_source() -> str:
    """Return what no other mount has as its source (the first field of /proc/mounts)."""
    return f"blocksnap-{secrets.token_hex(8)}"


def is_there(source: str) -> bool:
    """Tell whether it is mounted anywhere that this thread sees."""
    return bool(_numbers(source))


def unmount(folder: str, source: str) -> None:
    """Take it away from a folder, at once for whoever looks; where it is not what is seen there, do nothing.

    What is unmounted is what was looked at: gone meanwhile, it is not mistaken for what came after it.
    """
    with contextlib.suppress(OSError):
        fd = os.open(folder, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            if _number_of(fd) in _numbers(source):
                namespace.unmount(f"/proc/self/fd/{fd}")
        finally:
            os.close(fd)


def unmount_in(namespace_fd: int, folder: str, source: str) -> None:
    """The same in another mount namespace, by a thread that enters it and ends there."""

    def work() -> None:
        with contextlib.suppress(OSError):
            namespace.enter_mounts(namespace_fd)
            unmount(folder, source)

    thread = threading.Thread(target=work, name="blocksnap-unmount")
    thread.start()
    thread.join()


def _number_of(fd: int) -> int | None:
    """Return the number of the mount that a descriptor was opened on (proc_pid_fdinfo(5))."""
    for line in (_THREAD / "fdinfo" / str(fd)).read_text().splitlines():
        name, _, value = line.partition(":")
        if name == "mnt_id":
            return int(value)
    return None


def _numbers(source: str) -> set[int]:
    """Return the numbers of all mounts with a source, which has nothing in it that would be escaped."""
    found = set()
    for line in (_THREAD / "mountinfo").read_text(errors="surrogateescape").strip("\n").split("\n"):
        # Not splitlines(): names may have what that takes for the end of a line.
        left, _, right = line.partition(" - ")
        if right.split(" ")[1:2] == [source]:
            found.add(int(left.split(" ", 1)[0]))
    return found
