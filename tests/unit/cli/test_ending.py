"""A signal ends the run once, wherever it arrives."""

from __future__ import annotations

import os
import signal
import sys
import time

import pytest

from blocksnap.cli.ending import Ended, ended_by_signals
from blocksnap.system import command


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
    at_fork = _AtFork()
    at_fork.armed = True
    begun = time.monotonic()
    try:
        with pytest.raises(Ended), ended_by_signals():
            command.run("sleep", "0.5")
    finally:
        at_fork.armed = False
    assert time.monotonic() - begun >= 0.5
