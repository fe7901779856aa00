from __future__ import annotations

import os
from pathlib import Path

import pytest

from blocksnap.extents.changes import Parent
from blocksnap.extents.model import ExtentList
from blocksnap.system.host import host_id
from blocksnap.volumes.device import FileVolume
from blocksnap.volumes.errors import NoSuchVolumeError, VolumeChangedError
from blocksnap.volumes.resolve import resolve_volume


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    with path.open("wb") as file:
        file.write(b"x" * 65536)
        file.truncate(4 << 20)
        file.seek(2 << 20)
        file.write(b"y" * 65536)
    return path


def test_file_is_a_volume_known_by_host_and_path(image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(image.parent)
    link = image.parent / "link"
    link.symlink_to(image)
    for text in (str(image), "disk.img", "./disk.img", str(link)):
        volume = resolve_volume(text)
        assert (volume.name, volume.kind, volume.size) == (str(image), "file", 4 << 20)
        assert volume.key == f"{host_id()}:{image}"
        assert volume.trace("r") is None


def test_only_data_is_read_and_compared(image: Path) -> None:
    snapshot = FileVolume(str(image)).take_snapshot("r")
    parent = Parent(4 << 20, {}, known_here=True, load_mapped=lambda: None)
    for changes in (snapshot.find_changes(None), snapshot.find_changes(parent)):
        assert (changes.method, changes.inherits, changes.discarded) == ("compare", False, ExtentList())
        assert changes.allocated == changes.changed == ExtentList.of([(0, 65536), (2 << 20, 65536)])
    assert snapshot.find_changes(None).reason == "first backup of this volume"
    assert snapshot.find_changes(parent).reason == "a file does not tell what changed"
    with snapshot.open_reader() as fd:
        assert os.pread(fd, 4, 2 << 20) == b"yyyy"
    snapshot.check()
    assert snapshot.binding["size"] == 4 << 20
    snapshot.remove()
    snapshot.remove()


def test_a_file_that_is_written_to_meanwhile_is_noticed(image: Path) -> None:
    snapshot = FileVolume(str(image)).take_snapshot("r")
    with image.open("r+b") as file:
        file.write(b"z")
    with pytest.raises(VolumeChangedError, match="its content"):
        snapshot.check()
    snapshot.remove()


def test_growing_and_chmod_are_noticed(image: Path) -> None:
    first, second = (FileVolume(str(image)).take_snapshot("r") for _ in range(2))
    image.chmod(0o600)
    with pytest.raises(VolumeChangedError, match="mode"):
        first.check()
    os.truncate(image, 5 << 20)
    with pytest.raises(VolumeChangedError, match="its size"):
        second.check()
    first.remove()
    second.remove()


def test_replacing_the_file_leaves_the_open_one_as_it_was(image: Path) -> None:
    snapshot = FileVolume(str(image)).take_snapshot("r")
    copy = image.with_suffix(".new")
    copy.write_bytes(b"other")
    copy.rename(image)
    with snapshot.open_reader() as fd:
        assert os.pread(fd, 1, 0) == b"x"
    snapshot.remove()


def test_empty_file(tmp_path: Path) -> None:
    path = tmp_path / "empty"
    path.touch()
    snapshot = FileVolume(str(path)).take_snapshot("r")
    assert snapshot.find_changes(None).allocated == ExtentList()
    snapshot.check()
    snapshot.remove()


def test_a_file_that_vanished(image: Path) -> None:
    volume = FileVolume(str(image))
    image.unlink()
    with pytest.raises(NoSuchVolumeError):
        volume.take_snapshot("r")
