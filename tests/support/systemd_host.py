"""A real systemd as process 1, in namespaces of its own, for tests of units, timers and credentials.

It sees the machine's files under an overlay, so that what is installed is installed there, and nothing is
changed for the machine: a network, processes, control groups, mounts and host name of its own, the kernel's
settings read-only, and none of the machine's units.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from blocksnap.system import cgroup
from support.require import require
from support.standing import wait_until

SYSTEMD = Path("/lib/systemd/systemd")
BOOT = Path(__file__).with_name("boot-systemd.sh")
# All that is needed to start a service and a timer with its default dependencies.
UNITS = (
    "basic.target",
    "sysinit.target",
    "local-fs.target",
    "network-online.target",
    "paths.target",
    "sockets.target",
    "slices.target",
    "timers.target",
    "time-set.target",
    "time-sync.target",
    "shutdown.target",
    "umount.target",
    "dbus.service",
    "dbus.socket",
    "systemd-journald.service",
    "systemd-journald.socket",
    "systemd-journald-dev-log.socket",
)
NAMESPACES = ("--mount", "--pid", "--cgroup", "--net", "--ipc", "--uts")


def require_systemd() -> None:
    """Skip where it cannot be started."""
    top = cgroup.root()
    require("systemd", SYSTEMD.exists(), "systemd is not installed")
    require("systemd", os.geteuid() == 0, "its namespaces need root")
    require("systemd", top is not None and os.access(top, os.W_OK), "no hierarchy of version 2 to write to")
    require("systemd", "\toverlay\n" in Path("/proc/filesystems").read_text(), "no overlay filesystem")


class SystemdHost:
    """It, as long as it runs; ``shared`` is the folder that is the same on both sides."""

    def __init__(self, shared: Path, group: Path) -> None:
        self.shared, self.group = shared, group
        units = shared / "units"
        (units / "sysinit.target.wants").mkdir(parents=True)
        for name in UNITS:
            (units / name).symlink_to(f"/lib/systemd/system/{name}")
        for name in UNITS[-4:]:
            (units / "sysinit.target.wants" / name).symlink_to(f"../{name}")
        script = 'echo $$ > "$0/cgroup.procs" && exec unshare "$@"'
        words = [*NAMESPACES, "--fork", "--kill-child=SIGKILL", BOOT, shared, units]
        self._process = subprocess.Popen(
            ["setpriv", "--pdeathsig", "KILL", "bash", "-c", script, group, *words],
            stdin=subprocess.DEVNULL,
        )
        children = Path(f"/proc/{self._process.pid}/task/{self._process.pid}/children")

        def is_up() -> bool:
            assert self._process.poll() is None, "systemd has ended"
            self._init = int((children.read_text().split() or ["0"])[0])
            return bool(self._init) and self("systemctl", "is-active", "basic.target") == "active\n"

        assert wait_until(is_up), (shared / "console").read_text()

    def start(self, *argv: str | Path, stdin: str | None = None) -> subprocess.CompletedProcess[str]:
        """Run a command beside it, as its administrator does."""
        words = ["nsenter", f"--target={self._init}", *NAMESPACES, "--", *argv]
        return subprocess.run(
            words, check=False, capture_output=True, text=True, input=stdin or "", timeout=120
        )

    def __call__(self, *argv: str | Path) -> str:
        """Run a command; what it says, whatever it ended with."""
        return self.start(*argv).stdout

    def done(self, *argv: str | Path) -> str:
        """Run a command that has to succeed."""
        done = self.start(*argv)
        assert done.returncode == 0, (argv, done.stdout, done.stderr)
        return done.stdout

    def write(self, path: str, text: str) -> None:
        """Make a file on its side."""
        done = self.start("sh", "-c", 'mkdir -p "${0%/*}" && cat > "$0"', path, stdin=text)
        assert done.returncode == 0, done.stderr

    def show(self, unit: str, name: str) -> str:
        """A property of a unit."""
        return self.done("systemctl", "show", "--property", name, "--value", unit).strip()

    def log(self, unit: str) -> str:
        """What a unit has said, and what was said of it."""
        self.done("journalctl", "--sync")
        return self("journalctl", "--no-pager", "--quiet", "--output=cat", "--unit", unit)

    def group_of(self, unit: str) -> Path:
        """The control group of a unit, as the machine has it."""
        return self.group / self.show(unit, "ControlGroup").lstrip("/")

    def stop(self) -> None:
        """End it with all that it started."""
        self._process.kill()
        self._process.wait()


@contextmanager
def systemd_host(shared: Path) -> Iterator[SystemdHost]:
    """Boot one and end it."""
    top = cgroup.root()
    assert top is not None
    group = top / f"blocksnap-test-{uuid.uuid4().hex[:8]}"
    group.mkdir()
    host = None
    try:
        host = SystemdHost(shared, group)
        yield host
    finally:
        if host is not None:
            host.stop()
        assert wait_until(lambda: not list(cgroup.processes(group)))
        for name, _, _ in os.walk(group, topdown=False):
            os.rmdir(name)
        with suppress(FileNotFoundError):
            shutil.rmtree(shared / "units")


def blocksnap_program() -> Path:
    """The command as it is installed."""
    return Path(sys.executable).with_name("blocksnap")
