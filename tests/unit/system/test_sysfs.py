"""Looking through a tree in which things vanish."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from blocksnap.system import sysfs


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    for name, number in (("b", "7:2\n"), ("a", "7:1\n"), ("c", "")):
        (tmp_path / name / "devices").mkdir(parents=True)
        (tmp_path / name / "devices" / "dev").write_text(number)
    return tmp_path


def test_names_come_sorted(tree: Path) -> None:
    assert sysfs.find(tree, "*/devices/*") == [tree / name / "devices/dev" for name in "abc"]
    assert sysfs.find(tree, "a/dev*") == [tree / "a/devices"]
    assert sysfs.find(tree, "x*") == sysfs.find(tree / "missing", "*") == []


def test_numbers_without_those_that_are_none(tree: Path) -> None:
    files = [*sysfs.find(tree, "*/devices/dev"), tree / "gone"]
    assert sysfs.numbers_of(files) == [os.makedev(7, 1), os.makedev(7, 2)]
    assert sysfs.number_of(tree / "c/devices/dev") is None
    assert sysfs.text_of(tree / "gone") is None


@pytest.mark.parametrize("code", [errno.ENOENT, errno.ENODEV, errno.ENOTDIR])
def test_a_directory_that_goes_when_it_is_looked_into(
    tree: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    real: Callable[..., object] = os.scandir

    def scandir(path: str | int | Path = ".") -> object:
        if str(path).endswith("b/devices"):
            raise OSError(code, os.strerror(code), str(path))
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    assert sysfs.find(tree, "*/devices/*") == [tree / name / "devices/dev" for name in "ac"]


def test_an_attribute_of_a_device_that_goes_while_it_is_read(
    tree: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read_text(path: Path, encoding: str | None = None, errors: str | None = None) -> str:
        raise OSError(errno.ENODEV, os.strerror(errno.ENODEV), str(path))

    monkeypatch.setattr(Path, "read_text", read_text)
    assert sysfs.text_of(tree / "a/devices/dev") is None
    assert sysfs.numbers_of([tree / "a/devices/dev"]) == []
