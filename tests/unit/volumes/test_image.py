"""The folder beside an image, where others may have been, or be at work."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from blocksnap.system import clones
from blocksnap.system.clones import CloneError, CloneFolderError
from blocksnap.volumes.image import FOLDER, ImageVolume, bases_of, settle_base

NO_LEDGER: Any = None


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / FOLDER
    folder.mkdir(0o700)
    return folder


def mark(folder: Path, name: str) -> None:
    text = json.dumps({"owner": "me", "path": str(folder.parent / "disk"), "run": "run1"})
    (folder / f"{name}.base").write_text(text)


@pytest.mark.timeout(300)
def test_marks_that_are_no_files_or_make_no_sense_are_passed_over(folder: Path) -> None:
    mark(folder, "clone-1")
    os.mkfifo(folder / "clone-pipe.base")
    (folder / "clone-link.base").symlink_to("/dev/zero")
    (folder / "clone-link-2.base").symlink_to(folder / "clone-1.base")
    (folder / "clone-folder.base").mkdir()
    (folder / "clone-deep.base").write_text("[" * 50_000)
    (folder / "clone-bytes.base").write_bytes(b"\xff\xfe\xfd")
    (folder / "clone-long.base").write_text(" " * 65536 + (folder / "clone-1.base").read_text())
    (folder / "clone-other.base").write_text('{"path": "/another"}')
    found = bases_of(str(folder.parent / "disk"))
    assert [Path(each).name for each in found] == ["clone-1"]


def test_a_folder_that_others_can_write_to_has_no_bases(folder: Path) -> None:
    mark(folder, "clone-1")
    folder.chmod(0o777)
    assert bases_of(str(folder.parent / "disk")) == ()
    folder.chmod(0o700)
    assert len(bases_of(str(folder.parent / "disk"))) == 1


def test_a_base_whose_folder_is_not_there_any_more_is_a_failure_of_its_volume(folder: Path) -> None:
    (folder / "clone-1").touch()
    path = str(folder.parent / "disk")
    folder.rename(folder.with_name("renamed"))
    with pytest.raises(CloneError, match="No such file or directory"):
        settle_base(path, "clone-1", "run1", "me", stays=True)


def test_a_folder_that_another_run_removes_before_it_is_opened_is_made_again(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = []
    real = os.open

    def open_late(path: str, flags: int) -> int:
        opened.append(path)
        if len(opened) <= removals:
            folder.rmdir()
        return real(path, flags)

    monkeypatch.setattr(os, "open", open_late)
    removals = 2
    os.close(clones.open_folder(str(folder), create=True))
    assert len(opened) == 3
    removals = 100
    with pytest.raises(CloneFolderError, match="No such file or directory"):
        clones.open_folder(str(folder), create=True)


def test_a_folder_that_another_run_removes_before_the_clone_is_made_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "disk").write_bytes(b"1")
    tried = []

    def make_late(_: int, folder: int, name: str) -> int:
        tried.append(name)
        if len(tried) <= removals:
            (tmp_path / FOLDER).rmdir()
        return os.open(name, os.O_RDWR | os.O_CREAT, 0o600, dir_fd=folder)

    monkeypatch.setattr(clones, "make_clone", make_late)
    volume = ImageVolume(str(tmp_path / "disk"), "xfs-clone")
    removals = 2
    volume.take_snapshot("run1", NO_LEDGER)
    assert len(tried) == 3
    (tmp_path / FOLDER / tried[0]).unlink()
    removals = 100
    with pytest.raises(CloneError, match="No such file or directory"):
        volume.take_snapshot("run2", NO_LEDGER)
