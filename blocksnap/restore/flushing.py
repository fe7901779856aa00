"""Write back what was written while the rest still arrives, so that the flush at the end is short."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable

_STEP_BYTES = 128 << 20


class Flusher:
    """One thread that flushes a descriptor whenever another ``_STEP_BYTES`` have been written to it.

    The kernel tells of a write that it lost once, to whoever flushes first. So all flushing of the descriptor
    is done here, and an error is kept and raised each time.
    """

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._due = threading.Event()
        self._ended = False
        self._written = 0
        self._error: OSError | None = None
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._run, name="blocksnap-flush", daemon=True)
        self._thread.start()

    def wrote(self, count: int) -> None:
        """Count bytes; called by several threads, and being a little off does no harm."""
        self._written += count
        if self._written >= _STEP_BYTES:
            self._written = 0
            self._due.set()

    def stop(self) -> None:
        """End the thread; a second call does nothing."""
        self._ended = True
        self._due.set()
        self._thread.join()

    def sync(self) -> None:
        """Flush now; raises OSError, also for what failed earlier."""
        self._flush(os.fdatasync)
        if self._error is not None:
            raise self._error

    def finish(self) -> None:
        """Flush the rest; raises OSError, also for what failed earlier."""
        self.stop()
        self._flush(os.fsync)
        if self._error is not None:
            raise self._error

    def _run(self) -> None:
        while True:
            self._due.wait()
            self._due.clear()
            if self._ended:
                return
            self._flush(os.fdatasync)

    def _flush(self, flush: Callable[[int], None]) -> None:
        with self._lock:
            try:
                flush(self._fd)
            except OSError as err:
                self._error = self._error or err
