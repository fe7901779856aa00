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
    (tree / ".hidden").mkdir()
    assert [path.name for path in sysfs.find(tree, "*")] == ["a", "b", "c"]
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
    def read_bytes(path: Path) -> bytes:
        raise OSError(errno.ENODEV, os.strerror(errno.ENODEV), str(path))

    monkeypatch.setattr(Path, "read_bytes", read_bytes)
    assert sysfs.text_of(tree / "a/devices/dev") is None
    assert sysfs.numbers_of([tree / "a/devices/dev"]) == []


@pytest.mark.parametrize("code", [errno.EMFILE, errno.ENFILE, errno.ENOMEM])
def test_what_cannot_be_looked_at_is_not_gone(tree: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    """A filesystem above a volume that is overlooked so does not stand still."""

    def fail(path: object) -> bytes:
        raise OSError(code, os.strerror(code), str(path))

    monkeypatch.setattr(os, "scandir", fail)
    monkeypatch.setattr(Path, "read_bytes", fail)
    for look in (sysfs.text_of, sysfs.number_of, lambda path: sysfs.find(path, "*")):
        with pytest.raises(OSError, match=os.strerror(code)):
            look(tree / "a/devices/dev")


def test_names_have_any_bytes(tmp_path: Path) -> None:
    name = b" caf\xe9\r\xc2\x85 "
    (tmp_path / "attribute").write_bytes(name + b"\n")
    assert os.fsencode(sysfs.exact_text(tmp_path / "attribute")) == name + b"\n"
