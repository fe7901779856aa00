"""A file gets its name when it is complete, and never in the place of another."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets

_AT_FDCWD = -100
_RENAME_NOREPLACE = 1
_NAME_BYTES = 255
# link(2) on FAT and exFAT, on SMB, and on FUSE: there are no hard links.
_NO_LINKS = frozenset({errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK})
_NO_FLAGS = frozenset({errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP})


def printable(path: bytes) -> str:
    """Return a path as people can read it: bytes that are no text are escaped."""
    return path.decode(errors="backslashreplace") or "."


def hidden_name(path: str, token: str | None = None) -> str:
    """Return a name beside ``path`` for what is not complete, no longer than a name may be.

    With the same ``token`` it is the same again; without one no other restore has it.
    """
    folder, name = os.path.split(path)
    end = f".{token or secrets.token_hex(4)}.partial"
    while len(os.fsencode(name)) > _NAME_BYTES - len(end) - 1:
        name = name[:-1]
    return os.path.join(folder, f".{name}{end}")


def give_name(hidden: str, path: str) -> None:
    """Rename a file without ever replacing another; raises FileExistsError, OSError."""
    try:
        os.link(hidden, path)
    except OSError as err:
        if err.errno not in _NO_LINKS:
            raise
    else:
        # The file has its name; a second, hidden one is no reason to call the restore failed.
        with contextlib.suppress(OSError):
            os.unlink(hidden)
        return
    try:
        _rename_new(hidden, path)
    except OSError as err:
        if err.errno not in _NO_FLAGS:
            raise
    else:
        return
    # Neither of the calls that look and rename in one step is there, so a file that comes in between is lost.
    if os.path.lexists(path):
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), path)
    os.rename(hidden, path)


def _rename_new(old: str, new: str) -> None:
    """Call renameat2(2) with RENAME_NOREPLACE, which Python does not have."""
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    if not hasattr(libc, "renameat2"):
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
    if libc.renameat2(_AT_FDCWD, os.fsencode(old), _AT_FDCWD, os.fsencode(new), _RENAME_NOREPLACE):
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), new)


def flush_open_folder(folder: int) -> None:
    """Make the names in a directory durable; raises OSError."""
    try:
        os.fsync(folder)
    except OSError as err:
        # SMB and FUSE may have no fsync for a directory.
        if err.errno not in _NO_FLAGS:
            raise
