"""A loop device that is free is anybody's."""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from blocksnap.system import namespace
from blocksnap.system.namespace import NotMountedError, attach_image


class Loops:
    """Loop devices that others are faster at: what opening each of them in turn, or configuring it, gives."""

    def __init__(self, folder: Path, opened: list[int], configured: list[int]) -> None:
        self._folder = folder
        self._opened: Iterator[int] = iter(opened)
        self._configured: Iterator[int] = iter(configured)
        self._open = os.open
        self.descriptors: set[int] = set()

    def open(self, path: str, flags: int) -> int:
        if path.startswith("/dev/loop"):
            if path != "/dev/loop-control" and (code := next(self._opened)):
                raise OSError(code, os.strerror(code), path)
            path = str(self._folder / "device")
        fd = self._open(path, flags)
        self.descriptors.add(fd)
        return fd

    def ioctl(self, _fd: int, request: int, *_: object) -> int:
        if request == namespace._LOOP_CONFIGURE and (code := next(self._configured)):
            raise OSError(code, os.strerror(code))
        return 7

    def left_open(self) -> set[int]:
        found = set()
        for fd in self.descriptors:
            try:
                os.fstat(fd)
            except OSError:
                continue
            found.add(fd)
        return found


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "device").touch()
    (tmp_path / "image").touch()
    return tmp_path


def pretend(patched: pytest.MonkeyPatch, loops: Loops) -> None:
    patched.setattr(os, "open", loops.open)
    patched.setattr(fcntl, "ioctl", loops.ioctl)


@pytest.mark.parametrize(
    "code", [errno.EBUSY, errno.ENXIO, errno.ENOENT], ids=["mounted", "let go", "removed"]
)
def test_who_was_given_the_same_loop_device_and_was_faster_ends_nothing(
    folder: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    loops = Loops(folder, [code, 0, 0], [errno.EBUSY, 0])
    with monkeypatch.context() as patched:
        pretend(patched, loops)
        loop = attach_image(str(folder / "image"))
    assert loops.left_open() == {loop}
    os.close(loop)


@pytest.mark.parametrize(
    ("opened", "configured", "said"),
    [
        ([errno.ENOENT] * 100, [], "No such file or directory"),
        ([errno.EACCES], [], "Permission denied"),
        ([0] * 100, [errno.EBUSY] * 100, "Device or resource busy"),
        ([0], [errno.EINVAL], "Invalid argument"),
    ],
)
def test_what_no_other_loop_device_mends_is_told(
    folder: Path, monkeypatch: pytest.MonkeyPatch, opened: list[int], configured: list[int], said: str
) -> None:
    """Where /dev has no node for one it never will."""
    loops = Loops(folder, opened, configured)
    with monkeypatch.context() as patched:
        pretend(patched, loops)
        with pytest.raises(NotMountedError, match=said):
            attach_image(str(folder / "image"))
    assert loops.left_open() == set()
