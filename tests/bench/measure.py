"""Run one program and say what it cost.

A measurement is complete or absent: a program that fails or outlives its deadline raises, is gone with its
whole process group, and leaves no number behind. All numbers come from the kernel (wait4, /proc/stat); the
program is started directly, without a shell, and nothing else is done while it runs.
"""

import os
import resource
import shlex
import signal
import subprocess
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from stat import S_ISDIR

CLOCK_TICKS = os.sysconf("SC_CLK_TCK")
READ_BYTES = 1 << 20
STDERR_LINES = 5


class BenchError(Exception):
    """The benchmark cannot go on; the text says what happened and what to do about it."""


class CommandFailedError(BenchError):
    """A program ended with another status than 0."""

    def __init__(self, command: "Command", status: int, stderr: str) -> None:
        last = "\n".join(stderr.strip().splitlines()[-STDERR_LINES:])
        super().__init__(
            f"{shlex.join(command.argv)} ended with {status}: {last or 'nothing on standard error'}"
        )


class DeadlineError(BenchError):
    """A program was killed because it ran for too long."""

    def __init__(self, command: "Command", deadline_seconds: float) -> None:
        super().__init__(f"{shlex.join(command.argv)} was killed after {deadline_seconds:.0f} s (--deadline)")


@dataclass(frozen=True, slots=True)
class Command:
    """A program to run: its words, where it runs, and its complete environment (None: inherit ours)."""

    argv: tuple[str, ...]
    cwd: Path
    environment: Mapping[str, str] | None = None


@dataclass(frozen=True, slots=True)
class Cost:
    """What a program used, with all the children it waited for.

    `max_rss_bytes` is only meaningful above `rss_floor_bytes`: the kernel carries the peak of the process
    that called exec over into the new program, so nothing smaller than this harness can be seen.
    """

    wall_s: float
    user_s: float
    system_s: float
    max_rss_bytes: int
    rss_floor_bytes: int
    minor_faults: int
    major_faults: int
    other_cpu_s: float

    @property
    def cpu_s(self) -> float:
        return self.user_s + self.system_s


@dataclass(frozen=True, slots=True)
class Output:
    """Where a measured program's standard output and standard error went."""

    stdout: Path
    stderr: Path


def measure(command: Command, output: Output, *, deadline_seconds: float) -> Cost:
    """Run the command once and return its cost; raise if it fails or passes the deadline."""
    floor = _rss_floor(command.cwd)
    busy_before = _machine_busy_seconds()
    with output.stdout.open("wb") as stdout, output.stderr.open("wb") as stderr:
        status, wall_s, usage = _spawn_and_wait(
            command, stdout=stdout.fileno(), stderr=stderr.fileno(), deadline_seconds=deadline_seconds
        )
    busy = _machine_busy_seconds() - busy_before
    if wall_s >= deadline_seconds:
        raise DeadlineError(command, deadline_seconds)
    if status != 0:
        raise CommandFailedError(command, status, output.stderr.read_text(errors="replace"))
    return Cost(
        wall_s=wall_s,
        user_s=usage.ru_utime,
        system_s=usage.ru_stime,
        max_rss_bytes=usage.ru_maxrss * 1024,
        rss_floor_bytes=floor,
        minor_faults=usage.ru_minflt,
        major_faults=usage.ru_majflt,
        other_cpu_s=max(0.0, busy - usage.ru_utime - usage.ru_stime),
    )


def run(*argv: str, cwd: Path | None = None, environment: Mapping[str, str] | None = None) -> str:
    """Run a program that is not measured and return its standard output; raise if it fails."""
    command = Command(argv, cwd or Path.cwd(), environment)
    done = subprocess.run(  # noqa: PLW1510  # the status is turned into our own error below
        argv,
        cwd=command.cwd,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=3600,
    )
    if done.returncode != 0:
        raise CommandFailedError(command, done.returncode, done.stderr)
    return done.stdout


def sync_seconds(directory: Path) -> float:
    """Write everything that is dirty on the directory's filesystem; return how long it took."""
    begin = time.perf_counter()
    run("sync", "--file-system", str(directory))
    return time.perf_counter() - begin


def drop_page_cache() -> None:
    """Empty the machine's page cache (clean pages only: call sync_seconds first)."""
    Path("/proc/sys/vm/drop_caches").write_text("1\n", encoding="ascii")


def read_through(path: Path) -> None:
    """Read a file, or every file below a directory, so that it is in the page cache."""
    buffer = memoryview(bytearray(READ_BYTES))
    for file in _files(path):
        with file.open("rb", buffering=0) as stream:
            while stream.readinto(buffer):
                pass


def allocated_bytes(path: Path) -> int:
    """Return the space that a path with all below it takes on disk; a hard link counts once."""
    linked: set[int] = set()
    total = path.lstat().st_blocks * 512
    for directory, names, files in os.walk(path):
        for name in (*names, *files):
            status = Path(directory, name).lstat()
            if status.st_ino not in linked:
                total += status.st_blocks * 512
            if status.st_nlink > 1 and not S_ISDIR(status.st_mode):
                linked.add(status.st_ino)
    return total


def _files(path: Path) -> Iterator[Path]:
    if path.is_file():
        yield path
        return
    for directory, _, files in os.walk(path):
        yield from (Path(directory, name) for name in files)


def _rss_floor(cwd: Path) -> int:
    """Return the peak memory that even a program doing nothing is charged with when started from here."""
    # Forget our own peak first ("5", proc(5)): what we once needed is not the program's.
    Path("/proc/self/clear_refs").write_text("5\n", encoding="ascii")
    null = os.open(os.devnull, os.O_WRONLY)
    try:
        _, _, usage = _spawn_and_wait(Command(("true",), cwd), stdout=null, stderr=null, deadline_seconds=60)
    finally:
        os.close(null)
    return usage.ru_maxrss * 1024


def _spawn_and_wait(
    command: Command, *, stdout: int, stderr: int, deadline_seconds: float
) -> tuple[int, float, "resource.struct_rusage"]:
    begin = time.perf_counter()
    process = subprocess.Popen(
        command.argv,
        cwd=command.cwd,
        env=command.environment,
        stdin=subprocess.DEVNULL,
        stdout=stdout,
        stderr=stderr,
        start_new_session=True,
    )
    # Its own session, so that the deadline and Ctrl-C end the program's children too.
    timer = threading.Timer(deadline_seconds, _kill_group, (process.pid,))
    timer.daemon = True
    timer.start()
    try:
        _, wait_status, usage = os.wait4(process.pid, 0)
        wall_s = time.perf_counter() - begin
    except BaseException:
        _kill_group(process.pid)
        process.wait()
        raise
    finally:
        timer.cancel()
    # wait4 has reaped it behind subprocess's back; without this its destructor would complain.
    process.returncode = os.waitstatus_to_exitcode(wait_status)
    return process.returncode, wall_s, usage


def _kill_group(pid: int) -> None:
    try:
        os.killpg(pid, signal.SIGKILL)
    except ProcessLookupError:
        return


def _machine_busy_seconds() -> float:
    """Return the CPU seconds that all processors together have been busy or stolen since boot."""
    fields = Path("/proc/stat").read_text(encoding="ascii").split("\n", 1)[0].split()[1:]
    user, nice, system, _idle, _iowait, irq, softirq, steal = (int(field) for field in fields[:8])
    return (user + nice + system + irq + softirq + steal) / CLOCK_TICKS
