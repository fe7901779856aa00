"""`blocksnap mount` as a process of its own, and what is to be seen of it."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from support.commands import CommandLine
from support.loops import RELEASE_SECONDS, call, unmount


@contextmanager
def shown(blocksnap: CommandLine, what: str, folder: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Run `blocksnap mount` until the block ends, and see that umount ends it."""
    with mounting(blocksnap, what, folder) as process:
        yield process
        unmount(folder)
        # Until then what was begun beside it may keep a copy of the mount.
        assert process.wait(timeout=RELEASE_SECONDS) in (0, 3)


@contextmanager
def mounting(blocksnap: CommandLine, what: str, folder: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Run `blocksnap mount`, which the block brings to its end in one way or another."""
    folder.mkdir(exist_ok=True)
    process = blocksnap.start("mount", what, folder)
    try:
        wait_for(process, folder)
        yield process
    finally:
        subprocess.run(["umount", "-l", folder], check=False, capture_output=True)
        process.kill()
        # What descends from it may keep its output open, where something has failed.
        with suppress(subprocess.TimeoutExpired):
            process.communicate(timeout=60)


def wait_for(process: subprocess.Popen[bytes], folder: Path) -> None:
    deadline = time.monotonic() + 60
    while not os.path.ismount(folder):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, "it was not mounted"
        time.sleep(0.05)


def is_mounted(folder: Path) -> bool:
    """Tell it from the kernel's list: a tree whose process has died cannot be asked."""
    return f" {folder} " in Path("/proc/mounts").read_text()


def children_of(pid: int) -> list[int]:
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def abort(pid: int, point: str, folder: Path) -> None:
    """Abort the FUSE connection of what a process has mounted on a point (fuse.rst); ``folder`` is for us."""
    lines = Path(f"/proc/{pid}/mountinfo").read_text().splitlines()
    (device,) = [line.split()[2] for line in lines if line.split()[4] == point and "fuse.blocksnap" in line]
    folder.mkdir()
    call("mount", "-t", "fusectl", "none", folder)
    try:
        (folder / device.partition(":")[2] / "abort").write_text("1")
    finally:
        unmount(folder)
        folder.rmdir()
