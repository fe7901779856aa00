# SPDX-License-Identifier: Apache-2.0
"""What tests of standing still share: safe places for hooks, and an application that times its own stalls."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from blocksnap.quiesce.errors import UnsafeHookError
from blocksnap.quiesce.hook import check_command
from blocksnap.system import cgroup, freeze
from support.loops import call

PROJECT = Path(__file__).resolve().parents[2]

_APPLICATION = """
import json, os, signal, sys, time
path, fsync = sys.argv[1], sys.argv[2] == "fsync"
going = True
def stop(*_):
    global going
    going = False
signal.signal(signal.SIGTERM, stop)
fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
longest, count, last = 0.0, 0, time.monotonic()
print("running", flush=True)
while going:
    os.pwrite(fd, count.to_bytes(8, "little"), 0)
    if fsync:
        os.fsync(fd)
    count += 1
    now = time.monotonic()
    longest, last = max(longest, now - last), now
    time.sleep(0.002)
print(json.dumps({"longest": longest, "count": count}), flush=True)
"""


@contextmanager
def control_group() -> Iterator[Path]:
    """A control group of the test's own, thawed and removed at the end."""
    top = cgroup.root()
    assert top is not None, "there is no hierarchy of version 2"
    folder = top / f"blocksnap-test-{uuid.uuid4().hex[:8]}"
    folder.mkdir()
    try:
        yield folder
    finally:
        (folder / "cgroup.freeze").write_text("0")
        assert wait_until(lambda: not list(cgroup.processes(folder)))
        folder.rmdir()


def safe_base() -> Path | None:
    """A directory in which a hook may lie, with all that is above it; None where there is none."""
    for base in (Path("/root"), Path("/var/lib"), Path.home()):
        if not os.access(base, os.W_OK):
            continue
        probe = Path(tempfile.mkdtemp(prefix="blocksnap-test-", dir=base))
        try:
            (probe / "probe").write_text("#!/bin/sh\n")
            (probe / "probe").chmod(0o700)
            check_command(str(probe / "probe"))
        except UnsafeHookError:
            continue
        else:
            return base
        finally:
            shutil.rmtree(probe)
    return None


@contextmanager
def hook_folder() -> Iterator[Path]:
    """A folder for hooks, removed at the end."""
    base = safe_base()
    assert base is not None
    folder = Path(tempfile.mkdtemp(prefix="blocksnap-test-", dir=base))
    try:
        yield folder
    finally:
        shutil.rmtree(folder)


def write_hook(folder: Path, name: str, body: str) -> str:
    """Make a shell script that logs to ``log`` beside it, and return its path."""
    path = folder / name
    path.write_text(f"#!/bin/sh\nlog() {{ echo \"$*\" >> '{folder}/log'; }}\n{body}\n")
    path.chmod(0o700)
    return str(path)


def read_log(folder: Path) -> list[str]:
    """What the hooks logged, line by line."""
    try:
        return (folder / "log").read_text().splitlines()
    except FileNotFoundError:
        return []


class Application:
    """A process that writes all the time and measures its own longest stall."""

    def __init__(self, path: Path, *, fsync: bool = False, cgroup: Path | None = None) -> None:
        argv = [sys.executable, "-I", "-S", "-c", _APPLICATION, str(path), "fsync" if fsync else "plain"]
        self._process = subprocess.Popen(argv, stdout=subprocess.PIPE, text=True)
        if cgroup is not None:
            (cgroup / "cgroup.procs").write_text(str(self._process.pid))
        assert self._process.stdout is not None
        assert self._process.stdout.readline() == "running\n"

    def longest_stall(self) -> float:
        """Stop it and return what it measured, in seconds."""
        self._process.terminate()
        said, _ = self._process.communicate(timeout=60)
        longest: float = json.loads(said)["longest"]
        return longest

    def kill(self) -> None:
        """End it whatever it does."""
        self._process.kill()
        self._process.communicate()


def wait_until(happens: object, seconds: float = 300.0) -> bool:
    """Wait until a callable returns something true."""
    assert callable(happens)
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if happens():
            return True
        time.sleep(0.01)
    return False


def is_gone(pid: int) -> bool:
    """Whether a process has ended; a zombie has."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


@contextmanager
def holding(device: str, folder: Path) -> Iterator[Path]:
    """Mount a filesystem that will hold the image of another one, or is frozen at times.

    It is thawed before it goes, whatever the test came to. Who has copied the mount namespace meanwhile may
    keep the inner one for longer, so it is not waited for.
    """
    folder.mkdir()
    call("mount", device, folder)
    try:
        yield folder
    finally:
        thaw(folder)
        call("umount", "--lazy", folder)


def thaw(folder: Path) -> bool:
    """Thaw the filesystem on a folder; whether it was frozen."""
    fd = os.open(folder, os.O_RDONLY)
    try:
        return freeze.thaw(fd)
    finally:
        os.close(fd)
