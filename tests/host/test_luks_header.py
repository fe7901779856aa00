"""The header of a container is read while anybody may change it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from blocksnap.volumes import luks_header
from blocksnap.volumes.errors import NoSuchVolumeError
from blocksnap.volumes.luks_header import HeaderChangingError, LuksHeaderVolume, header_on
from support.loops import loop_device

MIB = 1 << 20
UUID = b"b9ad0cfd-3a2b-4d4c-9b3c-0123456789ab"


def header(uuid: bytes = UUID) -> bytes:
    """What LUKS1 begins with, a payload at 2 MiB, and random key slots."""
    first = b"LUKS\xba\xbe\0\1" + bytes(96) + (4096).to_bytes(4, "big") + bytes(60) + uuid
    return first.ljust(4096, b"\0") + os.urandom(2 * MIB - 4096)


@pytest.fixture
def device(tmp_path: Path) -> Iterator[str]:
    with loop_device(tmp_path / "disk", size=4 * MIB) as made:
        yield made


def write(device: str, content: bytes, offset: int = 0) -> None:
    with open(device, "r+b") as file:
        file.seek(offset)
        file.write(content)
        os.fsync(file.fileno())


def volume_on(device: str) -> LuksHeaderVolume:
    number = os.stat(device).st_rdev
    found = header_on(number)
    assert found is not None
    return LuksHeaderVolume(number, found, "vault")


def test_what_is_read_is_the_header_and_nothing_behind_it(device: str) -> None:
    assert header_on(os.stat(device).st_rdev) is None
    content = header()
    write(device, content + os.urandom(MIB))
    volume = volume_on(device)
    snapshot = volume.take_snapshot("run")
    assert snapshot.size == volume.size == 2 * MIB
    with snapshot.open_reader() as fd:
        assert os.pread(fd, 4 * MIB, 0) == content
    # What was read stays what it was.
    write(device, header())
    with snapshot.open_reader() as fd:
        assert os.pread(fd, 4 * MIB, 0) == content
    snapshot.remove()
    snapshot.remove()


def test_another_header_is_another_volume(device: str) -> None:
    write(device, header())
    volume = volume_on(device)
    write(device, header(UUID.replace(b"b9", b"00")))
    with pytest.raises(NoSuchVolumeError, match="another header"):
        volume.prepare()
    with pytest.raises(NoSuchVolumeError, match="another header"):
        volume.read()


def test_a_header_that_does_not_hold_still_is_refused(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(luks_header, "_PAUSE_SECONDS", 0.0)
    write(device, header())
    volume = volume_on(device)
    read_once = LuksHeaderVolume._read_once

    def changing(volume: LuksHeaderVolume, fd: int) -> bytes:
        content = read_once(volume, fd)
        write(device, os.urandom(16), MIB)
        return content

    with monkeypatch.context() as patched:
        patched.setattr(LuksHeaderVolume, "_read_once", changing)
        with pytest.raises(HeaderChangingError, match="is being changed"):
            volume.read()
    assert len(volume.read()) == volume.size
