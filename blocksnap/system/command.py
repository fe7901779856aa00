"""Run programs: the one way to do it, and the only importer of ``sh``.

Arguments are separate words and no shell is involved; the child gets no terminal, no descriptors
of ours, the C locale, and a session of its own, so that Ctrl-C reaches us and not a half-done
``lvcreate``. A program is not killed: a storage command that dies between suspend and resume
leaves a device that hangs everybody. When the time is up that is reported and the program left alone.
Only one that is said to be ``killable`` is killed by an interrupt, and when we are killed.

``run`` is for the control plane, before threads start and never between freeze and thaw.
``run_observed`` watches something while a program runs, to measure how long it stands still.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from blocksnap.errors import BlocksnapError
from blocksnap.system.children import inheritable

if TYPE_CHECKING:
    import sh

DEFAULT_TIMEOUT_SECONDS = 120.0
_SYSTEM_FOLDERS = ("/usr/sbin", "/usr/bin", "/sbin", "/bin")
_SHOWN_LINES = 4
_INTERRUPTS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGALRM)
# How long an interrupt waits for a program that is in the middle of something.
_GRACE_SECONDS = 30.0
_PACKAGES = {
    "blkid": "util-linux",
    "btrfs": "btrfs-progs",
    "dmsetup": "dmsetup",
    "e2fsck": "e2fsprogs",
    "lvchange": "lvm2",
    "lvcreate": "lvm2",
    "lvmconfig": "lvm2",
    "lvremove": "lvm2",
    "lvs": "lvm2",
    "mkfs.btrfs": "btrfs-progs",
    "nbdkit": "nbdkit",
    "partx": "util-linux",
    "pvs": "lvm2",
    "thin_check": "thin-provisioning-tools",
    "udevadm": "udev",
    "vgs": "lvm2",
    "virsh": "libvirt-clients",
    "xfs_repair": "xfsprogs",
}


class CommandError(BlocksnapError):
    """A program ended with a failure (exit code 1)."""

    def __init__(self, program: str, status: int, message: str) -> None:
        self.program = program
        self.status = status
        self.message = message
        lines = [line.strip() for line in message.splitlines() if line.strip()]
        ended = f"exit status {status}" if status >= 0 else f"signal {-status}"
        brief = f"{program} failed ({ended})"
        super().__init__(
            f"{brief}: {lines[-1]}" if lines else brief, details="\n".join(lines[-_SHOWN_LINES:]) or None
        )


class MissingProgramError(BlocksnapError):
    """A program that is needed is not installed (exit code 1)."""

    def __init__(self, program: str) -> None:
        self.program = program
        package = _PACKAGES.get(program)
        super().__init__(
            f"{program} is not installed",
            resolution=f"install it: apt install {package}"
            if package
            else f"install the package that has {program}",
        )


class CommandTimeoutError(BlocksnapError):
    """A program did not come to an end; it was left running (exit code 1)."""

    def __init__(self, program: str, pid: int, seconds: float) -> None:
        self.program = program
        self.pid = pid
        self.seconds = seconds
        super().__init__(
            f"{program} has not finished after {seconds:g} s; process {pid} was left running",
            details="killing a storage command halfway can leave a suspended device behind",
            resolution=f"see what it waits for (/proc/{pid}/stack, dmsetup info), then run it again",
        )


def has_program(program: str) -> bool:
    """Tell whether a program is installed."""
    return _find(program) is not None


def path_of(program: str) -> str:
    """Return where a program lies; raises MissingProgramError."""
    return _locate(program)


def package_of(program: str) -> str | None:
    """Return the Debian package that has a program that we run; None when it is not known."""
    return _PACKAGES.get(program)


def run(
    program: str,
    *arguments: str,
    timeout_seconds: float = DEFAULT_TIMEOUT_SECONDS,
    killable: bool = False,
) -> str:
    """Run a program to its end and return its standard output.

    A ``killable`` one changes nothing but a file that is thrown away when it is interrupted, and may be long.
    It does not outlive us.
    Raises CommandError when it fails, MissingProgramError, CommandTimeoutError.
    """
    if threading.active_count() > 1 or not _is_text(arguments):
        # sh forks, and a fork copies locks that other threads hold at that moment. Nor can it pass on names
        # that are no UTF-8, as those of files may be.
        argv = (program, *arguments)
        return run_observed(
            argv, _ignore, interval_seconds=0.01, timeout_seconds=timeout_seconds, killable=killable
        )
    # Importing sh costs more than a small backup may take, so those who need no program do not pay.
    import sh

    path, words = _start_of(program, arguments, killable=killable)
    command = sh.Command(path)
    running: sh.RunningCommand | None = None
    try:
        # What a signal handler raises around a fork is swallowed by Python; between the start and the wait it
        # would leave a program running that nobody knows of.
        with interrupts_deferred():
            running = command(
                *words,
                _bg=True,
                _bg_exc=False,
                _tty_out=False,
                _new_session=True,
                _close_fds=True,
                _env=_environment(),
                _decode_errors="surrogateescape",
            )
        _await(program, running, timeout_seconds)
        return str(running)
    except sh.ErrorReturnCode as err:
        # The text of the exception itself is cut at 750 bytes.
        raise CommandError(program, err.exit_code, err.stderr.decode(errors="replace")) from err
    except OSError as err:
        raise CommandError(program, 127, f"cannot be started: {err.strerror}") from err
    except CommandTimeoutError:
        raise
    except BaseException:
        if running is not None:
            if killable:
                with contextlib.suppress(ProcessLookupError):
                    running.kill()
            _let_finish(running.is_alive)
        raise


def _is_text(words: Sequence[str]) -> bool:
    try:
        "".join(words).encode()
    except UnicodeEncodeError:
        return False
    return True


def run_observed(
    argv: Sequence[str],
    observe: Callable[[], None],
    *,
    interval_seconds: float = 0.001,
    timeout_seconds: float = DEFAULT_TIMEOUT_SECONDS,
    killable: bool = False,
) -> str:
    """Run a program and call ``observe`` again and again until it has ended.

    Without ``sh`` and its threads: what is observed here is how long writers stand still.
    Raises as ``run`` does.
    """
    import tempfile

    program = argv[0]
    path, words = _start_of(program, argv[1:], killable=killable)
    # Files rather than pipes: nobody reads while the program runs, and a full pipe would stop it. In memory,
    # because a file system may be frozen in this very moment.
    with (
        tempfile.TemporaryFile(dir=_memory_folder()) as out,
        tempfile.TemporaryFile(dir=_memory_folder()) as err,
    ):
        child: _Child | None = None
        try:
            # An interrupt between the start and the wait would leave a program running that nobody knows of.
            with interrupts_deferred():
                child = _Child.start(path, words, out.fileno(), err.fileno())
            _watch(child, observe, program, interval_seconds, timeout_seconds)
        except CommandTimeoutError:
            raise
        except BaseException:
            if child is not None:
                if killable and child.is_alive():
                    os.kill(child.pid, signal.SIGKILL)
                _let_finish(child.is_alive)
            raise
        out.seek(0)
        err.seek(0)
        if child.status:
            raise CommandError(program, child.status, err.read().decode(errors="replace"))
        return out.read().decode(errors="surrogateescape")


@contextmanager
def interrupts_deferred() -> Iterator[None]:
    """Keep signals from raising anything until the end of the block, and raise it then.

    Blocking them would not do: where other threads run, the kernel gives the signal to one of those, and
    Python calls the handler in this one.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    arrived: list[int] = []
    before = {
        number: signal.signal(number, lambda number, _frame: arrived.append(number)) for number in _INTERRUPTS
    }
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        for late in arrived:
            signal.raise_signal(late)


class _Child:
    """A running program."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.status: int | None = None

    @classmethod
    def start(cls, path: str, words: Sequence[str], out: int, err: int) -> _Child:
        """Start it in a session of its own, with no signal blocked and no descriptor but the three."""
        actions: list[tuple[int, int, str, int, int] | tuple[int, int, int] | tuple[int, int]] = [
            (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
            (os.POSIX_SPAWN_DUP2, out, 1),
            (os.POSIX_SPAWN_DUP2, err, 2),
            *((os.POSIX_SPAWN_CLOSE, fd) for fd in inheritable()),
        ]
        try:
            pid = os.posix_spawn(
                path,
                [os.path.basename(path), *words],
                _environment(),
                file_actions=actions,
                setsid=True,
                setsigmask=(),
                setsigdef=(signal.SIGPIPE,),
            )
        except OSError as error:
            raise CommandError(os.path.basename(path), 127, f"cannot be started: {error.strerror}") from error
        return cls(pid)

    def is_alive(self) -> bool:
        """Tell whether it still runs."""
        if self.status is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.status = os.waitstatus_to_exitcode(status)
        return self.status is None


def _watch(
    child: _Child, observe: Callable[[], None], program: str, interval_seconds: float, timeout_seconds: float
) -> None:
    deadline = time.monotonic() + timeout_seconds
    while child.is_alive():
        observe()
        if time.monotonic() > deadline:
            raise CommandTimeoutError(program, child.pid, timeout_seconds)
        time.sleep(interval_seconds)
    observe()


def _ignore() -> None:
    """Observe nothing."""


def _await(program: str, running: sh.RunningCommand, timeout_seconds: float) -> None:
    """Wait in ever longer steps; ``wait(timeout=...)`` of sh would look only ten times a second."""
    deadline = time.monotonic() + timeout_seconds
    pause = 0.001
    while running.is_alive():
        if time.monotonic() > deadline:
            raise CommandTimeoutError(program, running.pid, timeout_seconds)
        time.sleep(pause)
        pause = min(pause * 1.5, 0.02)
    running.wait()


def _let_finish(is_alive: Callable[[], bool]) -> None:
    """Wait for a program before an interrupt goes on, so that cleaning up sees what it did."""
    deadline = time.monotonic() + _GRACE_SECONDS
    while is_alive() and time.monotonic() < deadline:
        time.sleep(0.02)


def _environment() -> dict[str, str]:
    # The passphrase is nobody's business but ours.
    kept_back = ("LC_", "BLOCKSNAP_PASSPHRASE", "BLOCKSNAP_NEW_PASSPHRASE")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(kept_back)}
    environment |= {"LC_ALL": "C", "PATH": _search_path(), "LVM_SUPPRESS_FD_WARNINGS": "1"}
    return environment


def _search_path() -> str:
    """Return PATH with the system's folders, which cron and sudo leave out."""
    folders = [folder for folder in os.environ.get("PATH", "").split(":") if folder]
    return ":".join([*folders, *(folder for folder in _SYSTEM_FOLDERS if folder not in folders)])


def _find(program: str) -> str | None:
    return shutil.which(program, path=_search_path())


def _locate(program: str) -> str:
    path = _find(program)
    if path is None:
        raise MissingProgramError(program)
    return path


def _start_of(program: str, arguments: Sequence[str], *, killable: bool) -> tuple[str, list[str]]:
    """Return what to start and its arguments: what is killable is killed with us, by setpriv(1)."""
    path = _locate(program)
    if killable:
        return _locate("setpriv"), ["--pdeathsig", "KILL", path, *arguments]
    return path, list(arguments)


def _memory_folder() -> str | None:
    return "/dev/shm" if os.access("/dev/shm", os.W_OK) else None  # noqa: S108 - wanted: it is memory
