"""A directory in which somebody else has been, or that lies on a storage that repeats what it was asked."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from blocksnap.backends import local
from blocksnap.backends.errors import ObjectExistsError
from blocksnap.backends.local import LocalBackend


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
