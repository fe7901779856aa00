"""Who has a file or a device open for writing, while descriptors are closed beside it."""

from __future__ import annotations

import errno
import mmap
import os
from collections.abc import Collection, Iterator
from pathlib import Path

import pytest

from blocksnap.system import openers


def test_a_descriptor_that_is_closed_meanwhile_hides_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    own = os.getpid()
    codes = [errno.ENOENT]

    def open_devices(pid: str, numbers: Collection[int]) -> list[str]:
        return ["3", "4"] if int(pid) == own else []

    def facts(pid: int | str, fd: str) -> dict[str, str]:
        if fd == "3":
            raise OSError(codes[0], os.strerror(codes[0]))
        return {"flags": "0100002"}

    monkeypatch.setattr(openers, "_open_devices", open_devices)
    monkeypatch.setattr(openers, "_facts", facts)
    # This process is the one that is looked at.
    monkeypatch.setattr(os, "getpid", lambda: 0)
    found = openers.device_writers({5})
    assert list(found) == [own]
    assert found[own].startswith(f"open for writing by process {own} (")
    codes[0] = errno.EMFILE
    with pytest.raises(OSError, match="open files"):
        openers.device_writers({5})


def test_a_name_with_a_cr_is_mapped(tmp_path: Path) -> None:
    """The kernel does not escape it in /proc/PID/maps."""
    file, other = tmp_path / "a\rb", tmp_path / "other"
    file.write_bytes(b"x")
    other.write_bytes(b"x")
    fd = os.open(file, os.O_RDONLY)
    with mmap.mmap(fd, 1, prot=mmap.PROT_READ):
        os.close(fd)
        assert os.getpid() in writers_of(file)
        assert os.getpid() not in writers_of(other)


def writers_of(file: Path) -> set[int]:
    fd = os.open(file, os.O_RDONLY)
    try:
        return set(openers.file_writers(fd))
    finally:
        os.close(fd)


@pytest.mark.parametrize(
    ("ours", "theirs", "is_it"),
    [("08:01", "08:01", True), ("08:01", "00:2a", False), (None, "00:2a", True)],
)
def test_a_mapping_of_that_number_on_another_filesystem(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ours: str | None, theirs: str, *, is_it: bool
) -> None:
    """Where it is not found out what a mapping calls the filesystem the number alone counts."""
    file = tmp_path / "file"
    file.write_bytes(b"x")
    number = file.stat().st_ino

    def shared_maps(pid: int | str) -> Iterator[tuple[str, int]]:
        found = {"self": ours, os.getpid(): theirs}.get(pid)
        yield from [(found, number)] if found else []

    monkeypatch.setattr(openers, "_shared_maps", shared_maps)
    assert (os.getpid() in writers_of(file)) is is_it


def test_an_empty_file_is_mapped_by_nobody(tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    assert os.getpid() not in writers_of(tmp_path / "empty")
