"""What volumes lie on is recorded while devices of others go."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from blocksnap.operations import recording
from blocksnap.operations.recording import with_luks_headers
from blocksnap.operations.reporting import Quiet
from blocksnap.system import blockdev
from blocksnap.volumes.luks_header import HeaderUnreadableError

FIRST, SECOND = os.makedev(7, 1), os.makedev(7, 2)


def device(name: str) -> Any:
    return SimpleNamespace(kind="device", key=f"host:{name}", name=name)


def test_a_device_that_goes_while_all_are_looked_at_takes_none_of_the_others_along(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    there = {"/dev/first": FIRST, "/dev/second": SECOND}
    real = os.stat

    def stat(path: str | Path, **options: Any) -> Any:
        if not str(path).startswith("/dev/"):
            return real(path, **options)
        if path in there:
            return SimpleNamespace(st_rdev=there[str(path)], st_mode=0o60600)
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)

    monkeypatch.setattr(os, "stat", stat)
    # As when it went between two looks.
    monkeypatch.setattr(os.path, "exists", lambda _path: True)
    devices = [device(name) for name in ("/dev/first", "/dev/gone", "/dev/second")]
    assert recording._devices(devices, {}) == [FIRST, SECOND]


def test_a_header_that_cannot_be_read_takes_none_of_the_others_along(monkeypatch: pytest.MonkeyPatch) -> None:
    header = SimpleNamespace(key="luks:1")
    below = {FIRST: [], SECOND: [header]}
    unreadable = HeaderUnreadableError("/dev/sda", "Input/output error")
    monkeypatch.setattr(recording, "_devices", lambda *_: [FIRST, SECOND, FIRST])
    monkeypatch.setattr(
        recording, "headers_below", lambda number: (below[number], [unreadable] if number == FIRST else [])
    )
    report = Quiet()
    volume = device("/dev/first")
    assert with_luks_headers([volume], report) == [header, volume]
    assert report.warnings == ["the LUKS header of /dev/sda cannot be read: Input/output error"]


def test_what_cannot_be_looked_at_at_all_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> list[int]:
        raise blockdev.NoDeviceError("7:1", "it is not there")

    monkeypatch.setattr(recording, "_devices", fail)
    report = Quiet()
    volume = device("/dev/first")
    assert with_luks_headers([volume], report) == [volume]
    assert report.warnings == ["LUKS headers were not found: no block device 7:1: it is not there"]
