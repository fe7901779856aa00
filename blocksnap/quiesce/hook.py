"""Commands of the administrator around the snapshot.

A *session* is a command that is held open across the snapshot, for locks that end with the connection they
were taken on. It is started early and reads its standard input: at the line ``begin`` it makes the
application stand still and prints the line ``ready``, or ``refuse`` and a reason; at the line ``end``, or at
the end of the file, it lets it go and exits with 0.

A pair is two commands: ``before`` has to exit with 0; ``after`` runs whatever became of it.

They are children of the watchdog, so that it can end them, and run ``after``, when the controller is gone.
As root only such are run as nobody but root could have changed.
"""

from __future__ import annotations

import errno
import os
import stat
import time
from collections.abc import Iterator, Mapping, Sequence

from blocksnap.quiesce.base import Guard, Strength, Trace
from blocksnap.quiesce.errors import HookError, HookReleaseError, UnsafeHookError
from blocksnap.quiesce.settings import HookSettings
from blocksnap.system.watchdog import Command, Safeguard, Session, Watchdog, WatchdogError

_ANSWER_LIMIT = 4096
_PIPE_BYTES = 65536
_MOST_LINKS = 40


def check_command(command: str) -> None:
    """Make sure that nobody but its user could have changed a command; raises UnsafeHookError, HookError.

    That goes for the file itself and for every directory and link on the way to it.
    """
    owners = {0, os.geteuid()}
    try:
        for place in _way_to(command):
            status = os.lstat(place)
            if status.st_uid not in owners:
                raise UnsafeHookError(command, place, f"belongs to user {status.st_uid}")
            if not stat.S_ISLNK(status.st_mode) and status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
                raise UnsafeHookError(command, place, "is writable by others")
        target = os.stat(command)
    except OSError as err:
        raise HookError(command, f"cannot be run: {os.strerror(err.errno or 0)}") from err
    if not stat.S_ISREG(target.st_mode) or not os.access(command, os.X_OK):
        raise HookError(command, "cannot be run: it is no executable file")


def _way_to(path: str) -> Iterator[str]:
    """Yield what the kernel looks at to find a file: a link somewhere in the middle decides as much."""
    here, links = "/", 0
    words = path.split("/")
    yield here
    while words:
        word = words.pop(0)
        if word in ("", "."):
            continue
        if word == "..":
            here = os.path.dirname(here)
            continue
        place = os.path.join(here, word)
        yield place
        if not os.path.islink(place):
            here = place
            continue
        links += 1
        if links > _MOST_LINKS:
            raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), path)
        target = os.readlink(place)
        here = "/" if target.startswith("/") else here
        words = [*target.split("/"), *words]


class SessionHook:
    """A command that stands still until it is told to end."""

    strength: Strength = "application"

    def __init__(self, argv: tuple[str, ...]) -> None:
        check_command(argv[0])
        self._argv = argv
        self._output = os.memfd_create("blocksnap hook")
        self._source, self._tell = os.pipe2(os.O_CLOEXEC)
        self._listen, self._answer = os.pipe2(os.O_CLOEXEC)
        # A hook that does not read must not stop who tells it.
        os.set_blocking(self._tell, False)
        os.set_blocking(self._listen, False)
        self._guard: Guard | None = None
        self._began = False

    @property
    def name(self) -> str:
        """``hook PATH``."""
        return f"hook {self._argv[0]}"

    def safeguards(self) -> Sequence[Safeguard]:
        """Return its session."""
        return [Session(self._argv, self._source, self._answer, self._tell, self._output)]

    def trace(self) -> Trace | None:
        """Nothing outlives it: when the pipe is closed it ends."""
        return None

    def attend(self, guard: Guard) -> None:
        """Start it; it may take its time to connect."""
        guard.start(0)
        self._guard = guard
        # The watchdog has them; while they are open here, nobody sees the end of the file.
        os.close(self._source)
        os.close(self._answer)
        self._source = self._answer = -1

    def begin(self, deadline: float) -> None:
        """Tell it to begin, and wait for its answer."""
        guard = self._attended()
        guard.arm(0)
        self._began = True
        self._say("begin")
        answer = self._hear(deadline)
        if answer != "ready":
            said = answer.removeprefix("refuse").strip() if answer.startswith("refuse") else ""
            problem = (
                f"refused: {said or 'no reason given'}"
                if answer.startswith("refuse")
                else f"answered {answer!r}"
            )
            raise HookError(self._argv[0], problem, self._said())

    def end(self, deadline: float) -> None:
        """Tell it to end, and wait until it has."""
        if self._guard is None:
            return
        guard, self._guard = self._guard, None
        early = guard.ended_by_now(0, deadline)
        if early is None:
            self._finish(guard, deadline)
            return
        guard.disarm(0)
        if self._began:
            raise HookError(self._argv[0], f"ended too early, with {_status(early)}", self._said())

    def close(self) -> None:
        """Close the pipes and forget what it printed."""
        for fd in (self._source, self._answer, self._tell, self._listen, self._output):
            if fd >= 0:
                os.close(fd)
        self._source = self._answer = self._tell = self._listen = self._output = -1

    def _finish(self, guard: Guard, deadline: float) -> None:
        if self._began:
            self._say("end")
        os.close(self._tell)
        self._tell = -1
        status = self._await_end(guard, deadline)
        if status is None:
            guard.kill(0)
            guard.wait_ended(0, time.monotonic() + 2.0)
        guard.disarm(0)
        if guard.watchdog.is_lost:
            raise HookError(self._argv[0], "was lost: the watchdog, which started it, is gone")
        if status is None:
            raise HookError(self._argv[0], "did not end when it was told to, and was killed", self._said())
        if status and self._began:
            raise HookError(self._argv[0], f"failed at the end, with {_status(status)}", self._said())

    def _await_end(self, guard: Guard, deadline: float) -> int | None:
        """Wait for its end, and throw away what it prints: with the pipe full it would not get there."""
        while guard.ended(0) is None and not guard.watchdog.is_lost and time.monotonic() < deadline:
            try:
                got = os.read(self._listen, _PIPE_BYTES)
            except BlockingIOError:
                guard.watchdog.wait(self._listen, deadline)
                continue
            if not got:
                return guard.wait_ended(0, deadline)
        return guard.ended(0)

    def _attended(self) -> Guard:
        if self._guard is None:
            raise HookError(self._argv[0], "was not started")
        return self._guard

    def _say(self, word: str) -> None:
        try:
            os.write(self._tell, word.encode() + b"\n")
        except (BrokenPipeError, BlockingIOError):
            # Its end or its silence is noticed right after this.
            return

    def _hear(self, deadline: float) -> str:
        """Return the next line of its answer."""
        guard = self._attended()
        heard = b""
        while b"\n" not in heard and len(heard) < _ANSWER_LIMIT:
            # Looked at before reading, so that what it said before it ended counts.
            status = guard.ended(0)
            try:
                got = os.read(self._listen, _ANSWER_LIMIT)
            except BlockingIOError:
                got = None
            if got:
                heard += got
                continue
            if status is not None or guard.watchdog.is_lost:
                how = _status(status) if status is not None else "its watchdog"
                raise HookError(self._argv[0], f"ended with {how} and did not get ready", self._said())
            if time.monotonic() >= deadline or guard.watchdog.expired_after is not None:
                raise HookError(self._argv[0], "did not get ready in time", self._said())
            if got == b"":
                # It closed its output but still runs: there is nothing to wait for but its end.
                guard.wait_ended(0, min(deadline, time.monotonic() + 0.05))
            else:
                guard.watchdog.wait(self._listen, deadline)
        return heard.partition(b"\n")[0].decode(errors="replace").strip()

    def _said(self) -> str:
        return _read_output(self._output)


class PairHook:
    """A command before, and one that runs after it whatever happened."""

    strength: Strength = "application"

    def __init__(
        self,
        before: tuple[str, ...] | None,
        after: tuple[str, ...] | None,
        *,
        after_seconds: float = 0.0,
    ) -> None:
        """``after_seconds`` is the time of an ``after`` that has to succeed, by the next run if need be."""
        for argv in (before, after):
            if argv:
                check_command(argv[0])
        self._before, self._after, self._after_seconds = before, after, after_seconds
        self._output = os.memfd_create("blocksnap hook")
        self._guard: Guard | None = None
        self._began = False
        self._before_runs = False

    @property
    def name(self) -> str:
        """``hook PATH``."""
        return f"hook {(self._before or self._after or ('',))[0]}"

    def safeguards(self) -> Sequence[Safeguard]:
        """Return the commands; the watchdog starts no ``after`` while the ``before`` in front of it runs."""
        commands = []
        if self._before:
            commands.append(Command("before", self._before, self._output))
        if self._after:
            commands.append(Command("after", self._after, self._output, self._after_seconds))
        return commands

    def trace(self) -> Trace | None:
        """Return the command that has to be run after a crash."""
        return {"kind": "after", "argv": list(self._after)} if self._after else None

    def attend(self, guard: Guard) -> None:
        """There is nothing to be done yet."""
        self._guard = guard

    def begin(self, deadline: float) -> None:
        """Run ``before`` to its end."""
        guard = self._guard
        if guard is None:
            return
        self._began = True
        if self._after:
            guard.arm(self._number_after)
        if not self._before:
            return
        guard.arm(0)
        # Before the call: an interrupt may arrive right behind it.
        self._before_runs = True
        guard.start(0)
        status = guard.wait_ended(0, deadline)
        self._end_before(guard)
        if status is None:
            raise HookError(self._before[0], "has not finished in time, and was killed", self._said())
        if status:
            raise HookError(self._before[0], f"failed, with {_status(status)}", self._said())

    def end(self, deadline: float) -> None:
        """Run ``after`` to its end; it has as much time as all of the standstill.

        A ``before`` that an interrupt left at work is killed first: what it would still do, nothing undoes.
        """
        if self._guard is None or not self._began:
            return
        guard, self._guard = self._guard, None
        self._end_before(guard)
        if not self._after:
            return
        number = self._number_after
        try:
            guard.start(number)
            # The watchdog ends it when it takes too long.
            status = guard.wait_ended(number, max(deadline, time.monotonic()) + 600.0)
        except WatchdogError:
            status = None
        if status is None:
            # It stays in force: the journal says so, and the next run sees to it.
            reason = "the watchdog is gone" if guard.watchdog.is_lost else "its before cannot be killed"
            raise HookReleaseError(self._after[0], f"may not have been run, since {reason}", was_run=False)
        guard.disarm(number)
        if status:
            raise HookReleaseError(self._after[0], f"failed, with {_status(status)}", self._said())

    def close(self) -> None:
        """Forget what they printed."""
        if self._output >= 0:
            os.close(self._output)
        self._output = -1

    def _end_before(self, guard: Guard) -> None:
        """See to it that ``before`` is over, by killing it if it is not."""
        if not self._before_runs:
            return
        if guard.ended(0) is None:
            guard.kill(0)
            guard.wait_ended(0, time.monotonic() + 2.0)
        guard.disarm(0)
        self._before_runs = False

    @property
    def _number_after(self) -> int:
        return 1 if self._before else 0

    def _said(self) -> str:
        return _read_output(self._output)


def hook_of(settings: HookSettings) -> SessionHook | PairHook:
    """Return the hook that was configured; raises UnsafeHookError, HookError."""
    if settings.session:
        return SessionHook(settings.session)
    return PairHook(settings.before, settings.after)


def run_after(argv: tuple[str, ...], environment: Mapping[str, str], limit_seconds: float = 60.0) -> None:
    """Run the ``after`` of a dead run; raises UnsafeHookError, HookReleaseError, WatchdogError."""
    check_command(argv[0])
    hook = PairHook(None, argv)
    watchdog = Watchdog(hook.safeguards(), limit_seconds, environment=environment)
    try:
        hook.attend(Guard(watchdog, 0))
        hook.begin(time.monotonic() + limit_seconds)
        hook.end(time.monotonic() + limit_seconds)
    finally:
        watchdog.close(1.0)
        hook.close()


def _read_output(fd: int) -> str:
    """Return the end of what a hook printed."""
    size = os.fstat(fd).st_size
    return os.pread(fd, _ANSWER_LIMIT, max(0, size - _ANSWER_LIMIT)).decode(errors="replace")


def _status(status: int) -> str:
    return f"exit status {status}" if status >= 0 else f"signal {-status}"
