"""A signal ends the run once, wherever it arrives."""

from __future__ import annotations

import errno
import json
import os
import signal
import sys
import threading
import time

import pytest

from blocksnap.cli import main
from blocksnap.cli.ending import Ended, ended_by_signals
from blocksnap.errors import TargetError
from blocksnap.system import command
from support.standing import wait_until


class _Finalized:
    def __del__(self) -> None:
        os.kill(os.getpid(), signal.SIGTERM)


def _drop_one_that_signals() -> None:
    finalized = _Finalized()
    del finalized
    time.sleep(5)


def test_a_signal_in_a_finalizer_is_not_lost() -> None:
    """Python swallows what is raised there; the run ends all the same, a moment later."""
    with pytest.raises(Ended) as caught, ended_by_signals():
        _drop_one_that_signals()
    assert (caught.value.exit_code, caught.value.word) == (143, "terminated")


def test_a_signal_that_was_ignored_before_stays_so() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with ended_by_signals():
            os.kill(os.getpid(), signal.SIGHUP)
            time.sleep(0.05)
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_second_signal_does_not_stop_the_cleaning() -> None:
    cleaned = []

    def end_twice() -> None:
        try:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(5)
        finally:
            os.kill(os.getpid(), signal.SIGTERM)
            cleaned.append(True)

    with pytest.raises(Ended), ended_by_signals():
        end_twice()
    assert cleaned


@pytest.mark.parametrize(
    "err", [TargetError("the target fails too"), OSError(errno.EIO, "the target fails too"), None]
)
def test_what_fails_on_the_way_out_does_not_hide_the_signal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], err: Exception | None
) -> None:
    """Such as a target that cannot be flushed any more: the exit code is the documented one all the same."""

    def end(**_: object) -> None:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(5)
        except Ended:
            if err is None:
                raise
            try:
                raise OSError(errno.EIO, "the device fails")
            except OSError as first:
                raise err from first

    monkeypatch.setattr(main.cli, "main", end)
    assert main.run(["restore", "--json"]) == 143
    out, said = capsys.readouterr()
    words = [line.partition(":")[0] for line in said.splitlines()]
    assert [word for word in words if word != "fix"] == [*(["error"] if err else []), "terminated"]
    event = json.loads(out)
    assert event["exit_code"] == 143
    assert ("the target fails too" in event["message"]) == (err is not None)


def test_everything_is_as_before_afterwards() -> None:
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGALRM)
    before = [signal.getsignal(number) for number in numbers], sys.unraisablehook
    with ended_by_signals():
        pass
    assert ([signal.getsignal(number) for number in numbers], sys.unraisablehook) == before


class _AtFork:
    """Sends a signal right after each fork while it is armed; a fork hook cannot be taken away."""

    def __init__(self) -> None:
        self.armed = False
        os.register_at_fork(after_in_parent=self._send)

    def _send(self) -> None:
        if self.armed:
            os.kill(os.getpid(), signal.SIGTERM)


def test_a_signal_around_a_fork_waits_for_the_program_it_started() -> None:
    # With other threads beside it no program is forked; some may have ended and not be gone yet.
    assert wait_until(lambda: threading.active_count() == 1)
    at_fork = _AtFork()
    at_fork.armed = True
    begun = time.monotonic()
    try:
        with pytest.raises(Ended), ended_by_signals():
            command.run("sleep", "0.5")
    finally:
        at_fork.armed = False
    assert time.monotonic() - begun >= 0.5
