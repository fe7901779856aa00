"""How a signal ends a run: as an exception, so that whatever was begun is undone on the way out."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Never

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_AGAIN_SECONDS = 0.01


class Ended(BaseException):
    """A signal arrived; unwinds like Ctrl-C does, so that snapshots are removed."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.exit_code = 128 + number
        words = {signal.SIGINT: "interrupted", signal.SIGTERM: "terminated"}
        self.word = words.get(signal.Signals(number), "hung up")


def end_before(err: BaseException) -> Ended | None:
    """Return the signal that had begun to end the run when something else failed, if one had."""
    at: BaseException | None = err
    while at is not None and not isinstance(at, Ended):
        at = at.__context__
    return at


@contextmanager
def ended_by_signals() -> Iterator[None]:
    """Raise Ended in this block, once, when one of SIGNALS arrives; further ones are ignored.

    One that was ignored before stays so, as nohup(1) and shells want it for what they start.
    Python runs a handler between any two instructions, also in a finalizer or around a fork, and there
    no exception gets out: it is printed, and the run goes on, deaf. Such a one is raised again soon.
    """
    heeded = [number for number in SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
    handlers = {number: signal.signal(number, _end) for number in heeded}
    alarm = signal.getsignal(signal.SIGALRM)
    unraisable = sys.unraisablehook

    def raise_again(lost: sys.UnraisableHookArgs) -> None:
        if not isinstance(lost.exc_value, Ended):
            unraisable(lost)
            return
        number = lost.exc_value.exit_code - 128
        signal.signal(signal.SIGALRM, lambda _number, frame: _end(number, frame))
        signal.setitimer(signal.ITIMER_REAL, _AGAIN_SECONDS)

    sys.unraisablehook = raise_again
    try:
        yield
    finally:
        sys.unraisablehook = unraisable
        for number, handler in (handlers | {signal.SIGALRM: alarm}).items():
            signal.signal(number, handler)


def _end(number: int, frame: FrameType | None) -> Never:  # noqa: ARG001
    # A second signal while cleaning up must not stop the cleaning.
    for each in SIGNALS:
        signal.signal(each, signal.SIG_IGN)
    raise Ended(number)
