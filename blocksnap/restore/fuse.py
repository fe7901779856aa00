"""Run a FUSE filesystem, here or in a thread of its own, and keep what libfuse has to say to itself."""

from __future__ import annotations

import ctypes
import os
import threading
from collections import deque
from collections.abc import Callable

from blocksnap.restore.inside import NoFuseError

# mfusepy prefers libfuse 2 where both are installed. That takes /dev/fd/N, the name of a connection that is
# mounted already, for the place to mount on, which is /dev/fuse.
os.environ["FUSE_LIBRARY_NAME"] = "fuse3"
import mfusepy
from mfusepy import Operations as Operations  # noqa: PLC0414

ENDED = "its FUSE connection has ended"
"""It was unmounted, or the connection aborted (/sys/fs/fuse/connections): libfuse does not tell one from the
other. Who looks whether it is still mounted does."""
_TEXT_BYTES = 1000
_LIBFUSE_MAJOR = 3
_LOG_FUNCTION = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)


def serve(
    operations: mfusepy.Operations,
    folder: str,
    *,
    direct_io: bool = False,
    writable: bool = False,
    kept_seconds: int = 0,
) -> str:
    """Mount and serve until the connection ends; return ``ENDED``, or what libfuse said when it failed.

    With ``kept_seconds`` nothing changes, so the kernel may keep names, attributes and content for so long,
    and inode numbers are those of ``operations``.
    Not in the main thread, whose handler for SIGINT mfusepy would take away.
    """
    # The last is the reason; before it there may be remarks.
    said: deque[str] = deque(maxlen=1)

    def log(_: int, text: bytes, values: int) -> None:
        buffer = ctypes.create_string_buffer(_TEXT_BYTES)
        # A va_list is passed on by reference on every platform that FUSE and CPython share.
        ctypes.CDLL(None).vsnprintf(buffer, ctypes.c_size_t(_TEXT_BYTES), text, ctypes.c_void_p(values))
        said.append(buffer.value.decode(errors="replace").strip().removeprefix("fuse: "))

    function = _LOG_FUNCTION(log)
    set_function = getattr(mfusepy._libfuse, "fuse_set_log_func", None)  # noqa: SLF001 - it has no other way
    if set_function is not None:
        set_function(function)
    kept: dict[str, object] = {}
    if kept_seconds:
        kept = {"use_ino": True, "kernel_cache": True, "attr_timeout": kept_seconds}
        kept |= {"entry_timeout": kept_seconds, "negative_timeout": kept_seconds}
    try:
        mfusepy.FUSE(
            operations,
            folder,
            foreground=True,
            ro=not writable,
            fsname="blocksnap",
            subtype="blocksnap",
            direct_io=direct_io,
            **kept,
        )
    except RuntimeError as err:
        return "".join(said) or f"libfuse failed with {err}"
    finally:
        if set_function is not None:
            set_function(None)
    return ENDED


def require_libfuse() -> None:
    """Raise NoFuseError unless what was loaded is libfuse 3."""
    if mfusepy.fuse_version_major != _LIBFUSE_MAJOR:
        raise NoFuseError(f"libfuse {mfusepy.fuse_version_major} was loaded, and libfuse 3 is needed")


class FuseThread:
    """A thread that serves a filesystem: ``run`` calls ``serve``, and ``ready`` is set by its ``init``.

    ``when_ended`` is called by the thread with what ``serve`` returned.
    """

    def __init__(
        self,
        run: Callable[[], str],
        ready: threading.Event,
        when_ended: Callable[[str], None] = lambda _: None,
    ) -> None:
        self._run = run
        self._ready = ready
        self._when_ended = when_ended
        self._failure = "what serves it has a fault"
        self._thread = threading.Thread(target=self._serve, name="blocksnap-fuse", daemon=True)

    def start(self) -> None:
        """Return when the kernel has answered; raises NoFuseError."""
        self._thread.start()
        while not self._ready.wait(0.05):
            if not self._thread.is_alive():
                raise NoFuseError(self._failure)

    def join(self, seconds: float) -> None:
        """Wait a little for the end of what was unmounted: who still has a file open is not waited for."""
        self._thread.join(seconds)

    def _serve(self) -> None:
        try:
            self._failure = self._run()
        finally:
            self._when_ended(self._failure)
