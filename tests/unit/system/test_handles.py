"""Directories by the handles of their filesystem."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from blocksnap.system.handles import handle_of, open_directory
from support.require import require
from support.standing import wait_until


def test_a_directory_is_found_after_it_was_renamed(tmp_path: Path) -> None:
    folder = tmp_path / "before"
    folder.mkdir()
    handle = handle_of(str(folder))
    require(
        "root", os.geteuid() == 0 and handle is not None, "handles need root, and a filesystem that has them"
    )
    assert handle is not None
    folder.rename(tmp_path / "after")
    mount = os.open(tmp_path, os.O_RDONLY)
    try:
        fd = open_directory(mount, handle)
        assert os.fstat(fd).st_ino == (tmp_path / "after").stat().st_ino
        os.close(fd)
        (tmp_path / "after").rmdir()
        # A look at all open files by somebody else can keep what was removed for an instant.
        assert wait_until(lambda: is_stale(mount, handle), 60)
    finally:
        os.close(mount)
    assert handle_of(str(folder)) is None


def is_stale(mount: int, handle: str) -> bool:
    try:
        os.close(open_directory(mount, handle))
    except OSError as err:
        assert err.errno == errno.ESTALE
        return True
    return False


@pytest.mark.parametrize(
    "handle", ["", "zz", "00", "ff" * 8, "ffffffff01000000" + "00" * 20, "08" + "00" * 300]
)
def test_what_is_no_handle_leads_nowhere(tmp_path: Path, handle: str) -> None:
    mount = os.open(tmp_path, os.O_RDONLY)
    try:
        with pytest.raises(OSError, match=r"Stale|Invalid|permitted"):
            os.close(open_directory(mount, handle))
    finally:
        os.close(mount)
