"""Look through sysfs and proc while devices, filesystems and processes come and go.

What is listed may be gone before it is opened, a whole directory with it: whoever looks for one thing must
not end because another one went. Nor may it take for gone what could not be looked at.
"""

from __future__ import annotations

import errno
import fnmatch
import glob
import os
from collections.abc import Iterable
from pathlib import Path

_LACKS = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOMEM})


def find(folder: Path, pattern: str) -> list[Path]:
    """Return what below a folder has names of a pattern, sorted; what vanishes meanwhile may be missing.

    ``Path.glob`` would raise where a directory is gone by the time it looks into it, and ``glob.glob`` takes
    for gone whatever it is too short of files to look into: then OSError is raised.
    """
    found = [folder]
    for word in pattern.split("/"):
        found = [below / name for below in found for name in _names_in(below, word)]
    return sorted(found)


def exact_text(path: Path) -> str:
    """Return the text of a file with all bytes that names in it may have; raises OSError.

    Names of files, programs and groups need not be UTF-8, and text mode would take a CR for an end of line.
    """
    return os.fsdecode(path.read_bytes())


def text_of(path: Path) -> str | None:
    """Return the text of an attribute without white space around it; None where it is gone, or has none.

    Raises OSError where that cannot be told.
    """
    try:
        return exact_text(path).strip()
    except OSError as err:
        raise_lack(err)
        return None


def number_of(path: Path) -> int | None:
    """Return the device number in a file such as ``dev``; None where it is gone."""
    major, colon, minor = (text_of(path) or "").partition(":")
    return os.makedev(int(major), int(minor)) if colon else None


def numbers_of(paths: Iterable[Path]) -> list[int]:
    """Return the device numbers in some files, without those that are gone."""
    return [number for path in paths if (number := number_of(path)) is not None]


def raise_lack(err: OSError) -> None:
    """Raise an error that says nothing of what was looked at: files or memory have run out."""
    if err.errno in _LACKS:
        raise err


def _names_in(folder: Path, pattern: str) -> list[str]:
    try:
        if not glob.has_magic(pattern):
            os.lstat(folder / pattern)
            return [pattern]
        with os.scandir(folder) as entries:
            return fnmatch.filter([entry.name for entry in entries if entry.name[0] != "."], pattern)
    except OSError as err:
        raise_lack(err)
        return []
