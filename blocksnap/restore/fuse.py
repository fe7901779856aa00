"""Run a FUSE filesystem in this thread, and keep what libfuse has to say to itself."""

from __future__ import annotations

import ctypes
from collections import deque

import mfusepy

UNMOUNTED = "it was unmounted"
_TEXT_BYTES = 1000
_LOG_FUNCTION = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)


def serve(
    operations: mfusepy.Operations,
    folder: str,
    *,
    direct_io: bool = False,
    writable: bool = False,
    kept_seconds: int = 0,
) -> str:
    """Mount and serve until it is unmounted; return what libfuse said if it could not.

    With ``kept_seconds`` nothing changes, so the kernel may keep names, attributes and content for so long,
    and inode numbers are those of ``operations``.
    Not in the main thread, whose handler for SIGINT mfusepy would take away.
    """
    said: deque[str] = deque(maxlen=3)

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
        return "; ".join(said) or f"libfuse failed with {err}"
    finally:
        if set_function is not None:
            set_function(None)
    return UNMOUNTED
