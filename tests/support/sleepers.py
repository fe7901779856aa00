"""Programs that sleep until they are ended, and how one test's are told from those of the tests beside it."""

from __future__ import annotations

import itertools
import os
from pathlib import Path

_NUMBERS = itertools.count(1000)


def long_time() -> str:
    """Seconds to sleep, more than a test may take, that no other program on this machine sleeps."""
    return f"1{os.getpid():07}{next(_NUMBERS)}"


def processes_with(word: str) -> list[str]:
    """Where /proc has the arguments of the processes that have this word in them."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if word.encode() in path.read_bytes():
                found.append(str(path))
        except OSError:
            continue
    return found
