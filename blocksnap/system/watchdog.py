"""The process that ends a standstill when this one cannot: how it is started and talked to.

The other side is ``native/watchdog.c``, whose header describes arguments and messages; docs/design.md,
section 5.2, has the reasons. Everything is handed over at its start. From then on a message is one ``send``,
so nothing is forked or opened by this process while something stands still.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import struct
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from blocksnap.errors import QuiesceError
from blocksnap.system.children import inheritable

_ARM, _START, _DISARM, _KILL, _DISMISS, _ENDED, _EXPIRED, _ASK = range(1, 9)
_MESSAGE = struct.Struct("=IIi")
_PROGRAM = "blocksnap-watchdog"
_START_SECONDS = 10.0
HOOK_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


class WatchdogError(QuiesceError):
    """There is no watchdog, and without one nothing is made to stand still (exit code 15)."""

    def __init__(self, problem: str) -> None:
        self.problem = problem
        super().__init__(
            f"the watchdog {problem}", resolution="nothing stands still without one; install blocksnap again"
        )


@dataclass(frozen=True, slots=True)
class Thaw:
    """Thaw the filesystem on which a descriptor is open."""

    fd: int

    def words(self) -> list[str]:
        """Return the arguments that say so."""
        return ["thaw", str(self.fd)]

    def descriptors(self) -> list[int]:
        """Return what the watchdog inherits for it."""
        return [self.fd]


@dataclass(frozen=True, slots=True)
class Write:
    """Write a text to an open file."""

    fd: int
    text: str

    def words(self) -> list[str]:
        """Return the arguments that say so."""
        return ["write", str(self.fd), self.text]

    def descriptors(self) -> list[int]:
        """Return what the watchdog inherits for it."""
        return [self.fd]


@dataclass(frozen=True, slots=True)
class Command:
    """A command that is run ``before`` something stands still, or ``after``; it prints to ``output``.

    One that is run ``after`` may take as long as all of the standstill, and is done with however it ends.
    With ``limit_seconds`` it has that time, and when it fails it counts as not let go.
    """

    phase: Literal["before", "after"]
    argv: tuple[str, ...]
    output: int
    limit_seconds: float = 0.0

    def words(self) -> list[str]:
        """Return the arguments that say so."""
        limit = [str(round(self.limit_seconds * 1000))] if self.phase == "after" else []
        return [self.phase, *limit, str(self.output), str(len(self.argv)), *self.argv, ";"]

    def descriptors(self) -> list[int]:
        """Return what the watchdog inherits for it."""
        return [self.output]


@dataclass(frozen=True, slots=True)
class Session:
    """A command that is told to begin and to end on its standard input, and answers on its output.

    ``source`` and ``answer`` are its ends of two pipes, ``tell`` is ours of the first.
    """

    argv: tuple[str, ...]
    source: int
    answer: int
    tell: int
    output: int

    def words(self) -> list[str]:
        """Return the arguments that say so."""
        ends = [str(fd) for fd in (self.source, self.answer, self.tell, self.output)]
        return ["session", *ends, str(len(self.argv)), *self.argv, ";"]

    def descriptors(self) -> list[int]:
        """Return what the watchdog inherits for it."""
        return [self.source, self.answer, self.tell, self.output]


@dataclass(frozen=True, slots=True)
class Hangup:
    """Shut a connection down, so that its server ends the session, and with it what that had locked."""

    fd: int

    def words(self) -> list[str]:
        """Return the arguments that say so."""
        return ["hangup", str(self.fd)]

    def descriptors(self) -> list[int]:
        """Return what the watchdog inherits for it."""
        return [self.fd]


Safeguard = Thaw | Write | Command | Session | Hangup


class Watchdog:
    """A running watchdog and the items it was given, by number."""

    def __init__(
        self,
        items: Sequence[Safeguard],
        deadline_seconds: float,
        *,
        journal: int | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        """Start it and wait until it is ready; raises WatchdogError.

        ``journal`` is a descriptor to which it writes that it let go; it stays open as long as it lives.
        ``environment`` is what the commands get beside PATH, HOME and LC_ALL.
        """
        self._ended: dict[int, int] = {}
        self._asked = 0
        self._expired: float | None = None
        self._lost = False
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            descriptors = [theirs.fileno(), *(fd for item in items for fd in item.descriptors())]
            if journal is not None:
                descriptors.append(journal)
            argv = [
                *(_PROGRAM, str(theirs.fileno()), str(-1 if journal is None else journal)),
                str(max(1, round(deadline_seconds * 1000))),
                *(word for item in items for word in item.words()),
            ]
            try:
                self._pid = _spawn(argv, descriptors, environment or {})
            except BaseException:
                self._socket.close()
                raise
        try:
            self._await_ready()
        except BaseException:
            self.close(0.0)
            raise

    @property
    def pid(self) -> int:
        """Its process."""
        return self._pid

    @property
    def expired_after(self) -> float | None:
        """After how many seconds it let everything go because the time was up; None if it did not."""
        self._receive(0.0)
        return self._expired

    @property
    def is_lost(self) -> bool:
        """Whether it died: nobody keeps the deadline any more."""
        self._receive(0.0)
        return self._lost

    def arm(self, item: int) -> None:
        """Say that an item is about to be in force; the first one starts the clock. Raises WatchdogError."""
        self._send(_ARM, item)

    def disarm(self, item: int) -> None:
        """Say that it is not in force any more."""
        with contextlib.suppress(WatchdogError):
            self._send(_DISARM, item)

    def start(self, item: int) -> None:
        """Have a command started; one that was started already is not started twice. Raises WatchdogError."""
        self._send(_START, item)

    def kill(self, item: int) -> None:
        """Have a command ended, with all processes of its session."""
        with contextlib.suppress(WatchdogError):
            self._send(_KILL, item)

    def ended(self, item: int) -> int | None:
        """Return the exit code of a command that ended, -N when signal N ended it, else None."""
        self._receive(0.0)
        return self._ended.get(item)

    def ended_by_now(self, item: int, deadline: float) -> int | None:
        """Return what ``ended`` does, also of a command of whose end nobody has taken note yet.

        Waits for the watchdog's word until ``deadline`` (CLOCK_MONOTONIC).
        """
        self._asked += 1
        with contextlib.suppress(WatchdogError):
            self._send(_ASK, item)
        while self._asked and not self._lost and (left := deadline - time.monotonic()) > 0:
            self._receive(left)
        return self.ended(item)

    def wait_ended(self, item: int, deadline: float) -> int | None:
        """Wait for a command until ``deadline`` (CLOCK_MONOTONIC); None when it still runs then."""
        while item not in self._ended and not self._lost:
            left = deadline - time.monotonic()
            if left <= 0:
                self._receive(0.0)
                break
            self._receive(left)
        return self._ended.get(item)

    def wait(self, fd: int, deadline: float) -> None:
        """Wait until ``fd`` can be read, the watchdog has something to say, or ``deadline``."""
        watched = [fd] if self._lost else [fd, self._socket.fileno()]
        _await_readable(watched, max(0.0, deadline - time.monotonic()))
        self._receive(0.0)

    def close(self, wait_seconds: float) -> bool:
        """Say that nothing is left to be done, and wait for its end; False when it goes on beyond that.

        It lets go of whatever is still in force.
        """
        with contextlib.suppress(WatchdogError):
            self._send(_DISMISS, 0)
        self._socket.close()
        self._lost = True
        if self._pid <= 0:
            return True
        until = time.monotonic() + wait_seconds
        pause = 0.0005
        while True:
            try:
                pid, _ = os.waitpid(self._pid, os.WNOHANG)
            except ChildProcessError:
                pid = self._pid
            if pid:
                self._pid = 0
                return True
            if time.monotonic() > until:
                return False
            time.sleep(pause)
            pause = min(pause * 2, 0.02)

    def _await_ready(self) -> None:
        ready = _await_readable([self._socket.fileno()], _START_SECONDS)
        if not ready or not self._socket.recv(_MESSAGE.size):
            raise WatchdogError("does not start")

    def _send(self, word: int, item: int) -> None:
        try:
            self._socket.send(_MESSAGE.pack(word, item, 0), socket.MSG_NOSIGNAL)
        except OSError as err:
            self._lost = True
            raise WatchdogError("is gone") from err

    def _receive(self, seconds: float) -> None:
        """Take in what it says, waiting for the first word only."""
        while not self._lost:
            try:
                if not _await_readable([self._socket.fileno()], seconds):
                    return
                message = self._socket.recv(_MESSAGE.size)
            except ConnectionResetError:
                message = b""
            if len(message) != _MESSAGE.size:
                self._lost = True
                return
            word, item, value = _MESSAGE.unpack(message)
            if word == _ENDED:
                self._ended[item] = value
            elif word == _ASK:
                self._asked -= 1
            elif word == _EXPIRED and self._expired is None:
                self._expired = value / 1000
            seconds = 0.0


def _await_readable(fds: Sequence[int], seconds: float) -> bool:
    # select would refuse descriptors beyond 1023.
    polled = select.poll()
    for fd in fds:
        polled.register(fd, select.POLLIN)
    return bool(polled.poll(seconds * 1000))


def hook_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """Return all that a command of the administrator finds in its environment."""
    return {"PATH": HOOK_PATH, "HOME": "/root" if os.geteuid() == 0 else "/", "LC_ALL": "C", **environment}


def _spawn(argv: list[str], descriptors: list[int], environment: Mapping[str, str]) -> int:
    from blocksnap import _native

    path = Path(_native.__file__).parent / _PROGRAM
    inherited = set(descriptors)
    actions: list[tuple[int, int, str, int, int] | tuple[int, int, int] | tuple[int, int]] = [
        (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
        (os.POSIX_SPAWN_OPEN, 1, os.devnull, os.O_WRONLY, 0),
        # Onto itself: that leaves the number and takes the mark away that it is to be closed.
        *((os.POSIX_SPAWN_DUP2, fd, fd) for fd in sorted(inherited)),
        *((os.POSIX_SPAWN_CLOSE, fd) for fd in inheritable() if fd not in inherited),
    ]
    try:
        return os.posix_spawn(
            path,
            argv,
            hook_environment(environment),
            file_actions=actions,
            setsid=True,
            setsigmask=(),
            setsigdef=(signal.SIGPIPE,),
        )
    except OSError as err:
        raise WatchdogError(f"({path}) cannot be started: {os.strerror(err.errno or 0)}") from err
