"""A directory in which somebody else has been, or that lies on a storage that repeats what it was asked."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from blocksnap.backends import local
from blocksnap.backends.errors import ObjectExistsError, ObjectMissingError
from blocksnap.backends.local import LocalBackend
from blocksnap.repository.errors import DamagedObjectError
from blocksnap.repository.pack import read_object


@pytest.fixture
def backend(tmp_path: Path) -> LocalBackend:
    return LocalBackend(str(tmp_path))


def refuse_unnamed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the kernel refuse unnamed files, as it does on NFS, by a flag that it does not take."""
    monkeypatch.setattr(local.os, "O_TMPFILE", os.O_TMPFILE & ~os.O_DIRECTORY | os.O_DIRECTORY | os.O_CREAT)


@pytest.mark.parametrize("is_named", [False, True])
def test_a_creation_that_is_repeated_meets_itself(
    backend: LocalBackend, monkeypatch: pytest.MonkeyPatch, is_named: bool
) -> None:
    if is_named:
        refuse_unnamed(monkeypatch)
    link = os.link

    def twice(*arguments: object, **options: object) -> None:
        link(*arguments, **options)  # type: ignore[arg-type]
        link(*arguments, **options)  # type: ignore[arg-type]

    backend.put("folder/first", b"first")
    assert (Path(backend.place) / "tmp").exists() == is_named
    monkeypatch.setattr(local.os, "link", twice)
    backend.put("folder/second", b"second")
    assert backend.read("folder/second") == b"second"
    with pytest.raises(ObjectExistsError):
        backend.put("folder/first", b"other")
    assert backend.read("folder/first") == b"first"


def test_what_is_no_file_is_no_object(backend: LocalBackend) -> None:
    os.mkfifo(Path(backend.place) / "config")
    assert list(backend.list("")) == []
    with pytest.raises(ObjectMissingError):
        backend.read("config")
    with pytest.raises(ObjectMissingError):
        backend.read_range_into("config", 0, memoryview(bytearray(1)))


def test_what_is_far_too_large_is_damage(backend: LocalBackend) -> None:
    backend.put("manifests/large", b"")
    os.chmod(Path(backend.place) / "manifests/large", 0o600)
    os.truncate(Path(backend.place) / "manifests/large", 1 << 40)
    with pytest.raises(DamagedObjectError, match="too large"):
        read_object(backend, "manifests/large")


@pytest.mark.parametrize("time", [-1, 1 << 38])
def test_a_time_that_no_clock_says_is_not_told(backend: LocalBackend, time: int) -> None:
    backend.put("object", b"")
    os.utime(Path(backend.place) / "object", (time, time))
    found = os.stat(Path(backend.place) / "object").st_mtime
    (info,) = backend.list("")
    assert (info.received is None) == (not 0 <= found < 1 << 37)
