"""The conformance suite on what this host's kernel has: files, images, subvolumes, devices."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.conformance import SIZE, Conformance, Kind
from support.file_ioctls import set_immutable
from support.kinds import DeviceKind, FileKind, ImageKind, SubvolumeKind, fill
from support.loops import loop_device


@pytest.fixture
def place(request: pytest.FixtureRequest) -> Iterator[Path]:
    """A folder of its own on the filesystem that a class names, emptied afterwards."""
    folder: Path = request.getfixturevalue(request.cls.filesystem) / "images"
    folder.mkdir()
    yield folder
    for clone in folder.glob(".blocksnap/clone-*"):
        set_immutable(clone, immutable=False)
    shutil.rmtree(folder)


class TestFile(Conformance):
    filesystem = "on_ext4"

    @pytest.fixture
    def kind(self, place: Path) -> Kind:
        made = FileKind(place / "disk.img")
        fill(made)
        return made


class TestDevice(Conformance):
    @pytest.fixture
    def kind(self, tmp_path: Path) -> Iterator[Kind]:
        with loop_device(tmp_path / "disk.img", size=SIZE) as device:
            made = DeviceKind(device, tmp_path / "disk.img")
            fill(made)
            yield made


class TestSubvolume(Conformance):
    @pytest.fixture
    def kind(self, on_btrfs: Path, state: Path) -> Iterator[Kind]:
        made = SubvolumeKind(on_btrfs / "live", state)
        fill(made)
        try:
            yield made
        finally:
            made.close()


class TestImageOnXfs(Conformance):
    filesystem = "on_xfs"

    @pytest.fixture
    def kind(self, place: Path) -> Kind:
        made = ImageKind(place / "disk.img", "fiemap")
        fill(made)
        return made


class TestImageOnBtrfs(Conformance):
    filesystem = "on_btrfs"

    @pytest.fixture
    def kind(self, place: Path) -> Kind:
        made = ImageKind(place / "disk.img", "btrfs-tree")
        fill(made)
        return made
