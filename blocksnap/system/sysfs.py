"""Look through sysfs and proc while devices, filesystems and processes come and go.

What is listed may be gone before it is opened, a whole directory with it: whoever looks for one thing must
not end because another one went.
"""

from __future__ import annotations

import glob
import os
from collections.abc import Iterable
from pathlib import Path


def find(folder: Path, pattern: str) -> list[Path]:
    """Return what below a folder has names of a pattern, sorted; what vanishes meanwhile may be missing.

    ``Path.glob`` would raise where a directory is gone by the time it looks into it.
    """
    return sorted(folder / name for name in glob.iglob(pattern, root_dir=folder))


def text_of(path: Path) -> str | None:
    """Return the text of an attribute without white space around it; None where it is gone, or has none."""
    try:
        return path.read_text(errors="surrogateescape").strip()
    except OSError:
        return None


def number_of(path: Path) -> int | None:
    """Return the device number in a file such as ``dev``; None where it is gone."""
    major, colon, minor = (text_of(path) or "").partition(":")
    return os.makedev(int(major), int(minor)) if colon else None


def numbers_of(paths: Iterable[Path]) -> list[int]:
    """Return the device numbers in some files, without those that are gone."""
    return [number for path in paths if (number := number_of(path)) is not None]
