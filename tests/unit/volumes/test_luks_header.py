"""Which headers lie below a device, and which of them cannot be read."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from blocksnap.system import blockdev, devmapper
from blocksnap.volumes import luks_header
from blocksnap.volumes.luks_header import headers_below

UUID = "b9ad0cfd-3a2b-4d4c-9b3c-0123456789ab"
VOLUME, CRYPT, INTEGRITY, DISK, BARE = (os.makedev(254, minor) for minor in range(5))
NAMES = {VOLUME: "vg-x", CRYPT: "vault", INTEGRITY: "vault_dif"}
UUIDS = {CRYPT: "CRYPT-LUKS2-b9ad0cfd3a2b4d4c9b3c0123456789ab-vault", INTEGRITY: "CRYPT-INTEGRITY-vault_dif"}


class Stack:
    """A volume on a container and a bare disk."""

    def __init__(self, folder: Path, patched: pytest.MonkeyPatch) -> None:
        self._folder = folder
        self.below = {VOLUME: [CRYPT, BARE], CRYPT: [DISK]}
        self.failing: dict[int, OSError | blockdev.DeviceError] = {}
        patched.setattr(blockdev, "slaves", lambda number: self.below.get(number, []))
        patched.setattr(blockdev, "node_of", lambda number: f"/dev/{os.minor(number)}")
        patched.setattr(blockdev, "open_by_number", self._open)
        patched.setattr(devmapper, "dm_name", NAMES.get)
        patched.setattr(devmapper, "dm_uuid", UUIDS.get)

    def write_header(self, number: int) -> None:
        first = b"LUKS\xba\xbe\0\1" + bytes(96) + (4096).to_bytes(4, "big") + bytes(60) + UUID.encode()
        (self._folder / str(number)).write_bytes(first.ljust(8192, b"\0"))

    def _open(self, number: int, *, direct: bool, wait_seconds: float) -> int:
        assert not direct
        assert not wait_seconds
        if number in self.failing:
            raise self.failing[number]
        path = self._folder / str(number)
        path.touch()
        return os.open(path, os.O_RDONLY)

    def look(self) -> tuple[list[tuple[str, str]], list[str]]:
        found, unreadable = headers_below(VOLUME)
        return [(header.path, header.mapping) for header in found], [err.brief for err in unreadable]


@pytest.fixture
def stack(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Stack:
    return Stack(tmp_path, monkeypatch)


IO_ERROR = OSError(errno.EIO, os.strerror(errno.EIO))


def test_a_header_that_cannot_be_read_is_told(stack: Stack) -> None:
    stack.write_header(DISK)
    assert stack.look() == ([("/dev/3", "vault")], [])
    for err in (IO_ERROR, blockdev.NoDeviceError("/dev/3", "Too many open files")):
        stack.failing[DISK] = err
        assert stack.look() == ([], [f"the LUKS header of /dev/3 cannot be read: {err}"])


def test_a_header_that_lies_elsewhere_is_no_failure(stack: Stack) -> None:
    assert stack.look() == ([], [])


def test_what_is_on_a_device_that_nobody_has_opened_as_a_container_is_not_asked(stack: Stack) -> None:
    stack.write_header(DISK)
    stack.failing[BARE] = IO_ERROR
    assert stack.look() == ([("/dev/3", "vault")], [])


def test_a_header_below_integrity_is_looked_for_there(stack: Stack) -> None:
    """What was never written reads as an error there."""
    stack.below = {VOLUME: [CRYPT], CRYPT: [INTEGRITY], INTEGRITY: [DISK]}
    stack.write_header(DISK)
    stack.failing[INTEGRITY] = IO_ERROR
    assert stack.look() == ([("/dev/3", "vault")], [])
    stack.failing[DISK] = IO_ERROR
    assert stack.look() == ([], [f"the LUKS header of /dev/3 cannot be read: {IO_ERROR}"])


def test_a_container_in_another_one_hides_none(stack: Stack, monkeypatch: pytest.MonkeyPatch) -> None:
    stack.below = {VOLUME: [CRYPT], CRYPT: [INTEGRITY], INTEGRITY: [DISK]}
    monkeypatch.setattr(devmapper, "dm_uuid", lambda number: "CRYPT-LUKS1-x" if number in UUIDS else None)
    stack.write_header(DISK)
    stack.failing[INTEGRITY] = IO_ERROR
    assert stack.look() == (
        [("/dev/3", "vault_dif")],
        [f"the LUKS header of /dev/mapper/vault_dif cannot be read: {IO_ERROR}"],
    )
    assert luks_header.header_on(DISK) is not None
