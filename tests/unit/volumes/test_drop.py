"""A snapshot that the guard takes away in the very moment in which something else is done with it."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from blocksnap.system import blockdev
from blocksnap.volumes import image
from blocksnap.volumes.base import SnapshotTiming
from blocksnap.volumes.image import FOLDER, ImageSnapshot
from blocksnap.volumes.lvm_snapshot import Readers


def test_who_opens_it_meanwhile_is_cut_off_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "device").write_bytes(b"what would be held open")
    readers = Readers()

    def open_late(_: int) -> int:
        fd = os.open(tmp_path / "device", os.O_RDONLY)
        readers.cut_off()
        return fd

    monkeypatch.setattr(blockdev, "open_by_number", open_late)
    with readers.reading(7) as fd:
        assert os.read(fd, 100) == b""
        assert os.readlink(f"/proc/self/fd/{fd}") == os.devnull


def image_snapshot(tmp_path: Path) -> ImageSnapshot:
    (tmp_path / "clone").write_bytes(b"1")
    fd = os.open(tmp_path / "clone", os.O_RDONLY)
    trace = {
        "folder": str(tmp_path / FOLDER), "name": "clone-1", "path": str(tmp_path / "disk"), "run": "run",
    }  # fmt: skip
    return ImageSnapshot(str(tmp_path / "disk"), "xfs-clone", fd, trace, SnapshotTiming(0.0, 0.0))


def test_a_clone_that_cannot_be_written_out_stays_no_base(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(image, "BASE_FREE_PERCENT", 0.0)
    snapshot = image_snapshot(tmp_path)
    assert snapshot.decide_base("keep").stays
    monkeypatch.setattr(os, "fsync", fail)
    decision = snapshot.decide_base("keep")
    assert (decision.stays, decision.reason) == (
        False,
        "the clone cannot be written out: Input/output error",
    )
    snapshot.remove()


def test_a_clone_that_is_gone_stays_no_base(tmp_path: Path) -> None:
    """It was read and found to be whole, so the backup is committed without one."""
    snapshot = image_snapshot(tmp_path)
    snapshot.drop()
    decision = snapshot.decide_base("keep")
    assert not decision.stays
    assert "removed" in decision.reason
    snapshot.remove()
