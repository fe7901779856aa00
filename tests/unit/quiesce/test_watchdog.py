"""The watchdog against hooks: whatever becomes of its controller, they are let go."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from blocksnap.errors import QuiesceError
from blocksnap.quiesce.assemble import assemble
from blocksnap.quiesce.base import Guard, Record, Strength, Trace
from blocksnap.quiesce.errors import DeadlineError
from blocksnap.quiesce.settings import QuiesceSettings
from blocksnap.quiesce.standstill import Stages, Standstill
from blocksnap.system.watchdog import Hangup, Safeguard, Watchdog, WatchdogError, Write
from support.standing import is_gone, read_log, wait_until, write_hook

CONTROLLER = """
import json, os, sys, time
from blocksnap.quiesce.assemble import assemble
from blocksnap.quiesce.settings import QuiesceSettings
settings, journal = sys.argv[1:]
standstill = assemble(QuiesceSettings.model_validate_json(settings), [], [])
fd = os.open(journal, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC)
standstill.attend(fd, {"BLOCKSNAP_RUN": "run1"})
standstill.begin()
print("standing", standstill._watchdog.pid, flush=True)
time.sleep(1000)
"""


def start_controller(tmp_path: Path, settings: dict[str, object]) -> tuple[subprocess.Popen[str], int]:
    """Start one and wait until everything stands still; return it and the number of its watchdog."""
    argv = [sys.executable, "-c", CONTROLLER, json.dumps(settings), str(tmp_path / "journal")]
    process = subprocess.Popen(argv, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    said = process.stdout.readline().split()
    if said[:1] != ["standing"]:
        finish(process)
        raise AssertionError(said)
    return process, int(said[1])


def finish(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.wait()
    assert process.stdout is not None
    process.stdout.close()


def pair_and_session(hooks: Path) -> list[dict[str, object]]:
    both = write_hook(hooks, "both", 'log "$BLOCKSNAP_PHASE by ${BLOCKSNAP_RELEASED_BY:-nobody}"')
    lock = write_hook(hooks, "lock", "read a; log $a; echo ready; read a; log $a")
    return [{"session": [lock]}, {"before": [both], "after": [both]}]


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGSTOP, signal.SIGTERM])
def test_whatever_becomes_of_the_controller_everything_is_let_go(
    tmp_path: Path, hooks: Path, end: signal.Signals
) -> None:
    # Only who is stopped is waited for so long.
    deadline = 5.0 if end == signal.SIGSTOP else 100.0
    settings = {"deadline_seconds": deadline, "hooks": pair_and_session(hooks)}
    process, watchdog = start_controller(tmp_path, settings)
    try:
        assert read_log(hooks) == ["begin", "before by controller"]
        process.send_signal(end)
        assert wait_until(lambda: len(read_log(hooks)) == 4)
        assert sorted(read_log(hooks)[2:]) == ["after by watchdog", "end"]
    finally:
        finish(process)
    # It stays with a controller that might go on, and then leaves what it did in the journal.
    assert wait_until(lambda: is_gone(watchdog))
    (line,) = (tmp_path / "journal").read_text().split("\n")[1:-1]
    said = json.loads(line)
    why = "the time was up" if end == signal.SIGSTOP else "the controller is gone"
    assert (said["step"], said["by"], said["why"], said["failed"]) == ("released", "watchdog", why, 0)
    assert len(read_log(hooks)) == 4


def test_a_controller_that_was_stopped_learns_that_it_was_too_late(tmp_path: Path, hooks: Path) -> None:
    standstill = assemble(
        QuiesceSettings.model_validate({"deadline_seconds": 5, "hooks": pair_and_session(hooks)}), [], []
    )
    journal = os.open(tmp_path / "journal", os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC)
    try:
        standstill.attend(journal, {})
        standstill.begin()
        assert wait_until(lambda: len(read_log(hooks)) == 4)
        standstill.end()
        with pytest.raises(QuiesceError, match=r"it took longer than 5 s: the watchdog"):
            standstill.conclude()
        # `after` was run by it, and is not run again.
        assert sorted(read_log(hooks)[2:]) == ["after by watchdog", "end"]
    finally:
        standstill.close()
        os.close(journal)


def test_a_watchdog_that_is_killed_spoils_the_standstill_and_nothing_else(
    tmp_path: Path, hooks: Path
) -> None:
    standstill: Standstill = assemble(
        QuiesceSettings.model_validate({"hooks": pair_and_session(hooks)}), [], []
    )
    journal = os.open(tmp_path / "journal", os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC)
    try:
        standstill.attend(journal, {})
        standstill.begin()
        assert standstill._watchdog is not None
        watchdog = standstill._watchdog.pid
        os.kill(watchdog, signal.SIGKILL)
        assert wait_until(lambda: is_gone(watchdog))
        standstill.end()
        with pytest.raises(QuiesceError, match="the watchdog was killed"):
            standstill.conclude()
        # The session ends by itself; who runs `after` now is the next run, by the journal.
        assert standstill.left
        assert wait_until(lambda: "end" in read_log(hooks))
    finally:
        standstill.close()
        os.close(journal)


def test_nothing_in_force_leaves_nothing_to_do(tmp_path: Path) -> None:
    fd = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC)
    try:
        watchdog = Watchdog([Write(fd, "let go")], 10.0)
        watchdog.arm(0)
        watchdog.disarm(0)
        assert watchdog.expired_after is None
        assert watchdog.close(10.0)
        assert os.pread(fd, 10, 0) == b""
        watchdog = Watchdog([Write(fd, "let go")], 10.0)
        watchdog.arm(0)
        assert watchdog.close(10.0)
        assert os.pread(fd, 10, 0) == b"let go"
    finally:
        os.close(fd)


def test_the_watchdog_ignores_who_asks_it_to_end(tmp_path: Path) -> None:
    watchdog = Watchdog([], 10.0)
    try:
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGPIPE, signal.SIGQUIT):
            os.kill(watchdog.pid, number)
        time.sleep(0.1)
        assert not watchdog.is_lost
        locked = Path(f"/proc/{watchdog.pid}/status").read_text().split("VmLck:")[1].split()[0]
        if os.geteuid() == 0:
            assert int(locked) > 0
        assert Path(f"/proc/{watchdog.pid}/cwd").resolve() == Path("/")
    finally:
        assert watchdog.close(10.0)


def test_who_says_something_to_a_dead_watchdog_is_told() -> None:
    watchdog = Watchdog([], 10.0)
    os.kill(watchdog.pid, signal.SIGKILL)
    assert wait_until(lambda: watchdog.is_lost)
    with pytest.raises(WatchdogError, match="is gone"):
        watchdog.arm(0)
    assert watchdog.close(10.0)


def test_a_connection_is_shut_down_though_others_have_it_open() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.settimeout(30)
        watchdog = Watchdog([Hangup(ours.fileno())], 0.05)
        watchdog.arm(0)
        assert theirs.recv(1) == b""
        assert wait_until(lambda: watchdog.expired_after is not None)
        with pytest.raises(BrokenPipeError):
            ours.send(b"SELECT")
        assert watchdog.close(5.0)

    ours, theirs = socket.socketpair()
    with ours, theirs:
        watchdog = Watchdog([Hangup(ours.fileno())], 30.0)
        watchdog.arm(0)
        watchdog.disarm(0)
        assert watchdog.close(5.0)
        ours.send(b"x")
        assert theirs.recv(1) == b"x"


def test_what_is_armed_when_the_time_was_up_is_let_go_as_it_is_begun(tmp_path: Path) -> None:
    fds = [os.open(tmp_path / name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC) for name in ("a", "b")]
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.settimeout(30)
        watchdog = Watchdog([*(Write(fd, "0") for fd in fds), Hangup(ours.fileno())], 0.05)
        try:
            for fd in fds:
                os.pwrite(fd, b"0", 0)
            watchdog.arm(0)
            assert wait_until(lambda: watchdog.expired_after is not None)
            watchdog.arm(2)
            assert theirs.recv(1) == b""
            watchdog.arm(1)
            time.sleep(0.1)
            for fd in fds:
                # The first was in force when the time was up, and is begun only now.
                os.pwrite(fd, b"1", 0)
            assert wait_until(lambda: [os.pread(fd, 1, 0) for fd in fds] == [b"0", b"0"])
            watchdog.disarm(0)
            watchdog.disarm(1)
            watchdog.disarm(2)

            def is_left_alone() -> bool:
                os.pwrite(fds[0], b"1", 0)
                time.sleep(0.1)
                return os.pread(fds[0], 1, 0) == b"1"

            # It may be about to let go once more of what was in force until now.
            assert wait_until(is_left_alone)
        finally:
            assert watchdog.close(10.0)
        # What is not in force is nobody's.
        assert os.pread(fds[0], 1, 0) == b"1"
    for fd in fds:
        os.close(fd)


class Standing:
    """Something that stands still when a file says 1; a slow one begins when the deadline is past."""

    strength: Strength = "frozen"
    early = late = last = frozenset[str]()

    def __init__(self, path: Path, log: list[str], *, slow: bool = False) -> None:
        self.name = path.name
        self._log = log
        self._slow = slow
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC)
        os.pwrite(self._fd, b"0", 0)
        self._guard: Guard | None = None

    def safeguards(self) -> Sequence[Safeguard]:
        return [Write(self._fd, "0")]

    def trace(self) -> Trace | None:
        return None

    def attend(self, guard: Guard) -> None:
        self._guard = guard

    def begin(self, deadline: float) -> None:
        assert self._guard is not None
        self._log.append(f"begin {self.name}")
        self._guard.arm(0)
        if self._slow:
            time.sleep(max(deadline - time.monotonic(), 0.0))
            assert wait_until(self._expired)
        os.pwrite(self._fd, b"1", 0)

    def _expired(self) -> bool:
        return self._guard is not None and self._guard.watchdog.expired_after is not None

    def advance(self, deadline: float) -> None:
        self._log.append(f"advance {self.name}")

    def record(self) -> Record | None:
        return None

    def end(self, deadline: float) -> None:
        self._log.append(f"end {self.name}")

    def close(self) -> None:
        os.close(self._fd)


def stand_still(standstill: Standstill) -> None:
    standstill.begin()
    standstill.advance()


@pytest.mark.parametrize("slow", ["a", "b", "c"])
def test_nothing_is_begun_when_the_time_was_up(tmp_path: Path, slow: str) -> None:
    """Nor is a snapshot taken then: of the last one, which was too slow, that is noticed too."""
    log: list[str] = []
    a, b, c = (Standing(tmp_path / name, log, slow=name == slow) for name in "abc")
    settings = QuiesceSettings(deadline_seconds=3)
    standstill = Standstill([a, b, c], settings, stages=Stages(agents=(a,), only_late=(c,)))
    with Path(os.devnull).open("wb") as journal:
        standstill.attend(journal.fileno(), {})
    try:
        with pytest.raises(DeadlineError, match=r"it took longer than 3 s"):
            stand_still(standstill)
        steps = ["begin a", "begin b", "advance a", "begin c"]
        done = {"a": 1, "b": 2, "c": 4}[slow]
        assert log == [*steps[:done], "end c", "end b", "end a"]
        assert wait_until(lambda: all((tmp_path / name).read_text() == "0" for name in "abc"))
    finally:
        standstill.close()
