"""Write back what was written while the rest still arrives, so that the flush at the end is short."""

from __future__ import annotations

import os
import threading

_STEP_BYTES = 128 << 20


class Flusher:
    """One thread that flushes a descriptor whenever another ``_STEP_BYTES`` have been written to it.

    A write-back error is kept and raised by ``finish``.
    """

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._due = threading.Event()
        self._ended = False
        self._written = 0
        self._error: OSError | None = None
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

    def finish(self) -> None:
        """Flush the rest; raises OSError, also for what failed earlier."""
        self.stop()
        if self._error is not None:
            raise self._error
        os.fsync(self._fd)

    def _run(self) -> None:
        while True:
            self._due.wait()
            self._due.clear()
            if self._ended:
                return
            try:
                os.fdatasync(self._fd)
            except OSError as err:
                # The kernel tells of a lost write once; it must not be forgotten here.
                self._error = err
                return
