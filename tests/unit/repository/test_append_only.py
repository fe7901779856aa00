"""Everything but garbage collection works where nothing may be deleted or overwritten."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest

import blocksnap.backends
from blocksnap.backends.base import Backend, ObjectWriter
from blocksnap.backends.errors import ObjectExistsError
from blocksnap.backends.local import LocalBackend
from support.append_only import AppendOnly, Asked, RefusedError
from support.in_process import InProcess

KIB = 1 << 10


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Asked:
    """Put the storage between every command and its repository."""
    found = Asked()

    def open_backend(url: str) -> Backend:
        return AppendOnly(LocalBackend(url), found)

    monkeypatch.setattr(blocksnap.backends, "open_backend", open_backend)
    return found


@pytest.fixture
def run_command(
    asked: Asked, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsysbinary: pytest.CaptureFixture[bytes]
) -> InProcess:
    # Durability is proven elsewhere; here it would only take time.
    monkeypatch.setattr(os, "fsync", lambda _: None)
    return InProcess(tmp_path, monkeypatch, capsysbinary)


def test_all_commands_work(run_command: InProcess, asked: Asked) -> None:
    run, dice = run_command, random.Random(1)
    volumes = [run.folder / f"volume-{number}" for number in range(2)]
    for volume in volumes:
        volume.write_bytes(dice.randbytes(300 * KIB))
    run.done("init", "--chunk-size", "16K")
    run.done("backup", *volumes)
    with volumes[0].open("r+b") as file:
        file.write(b"changed")
    run.done("backup", volumes[0])
    run.done("backup", volumes[0], "--full", "--tag", "a=b")
    run.done("list")
    run.done("show", "latest")
    for volume in volumes:
        assert run.done("restore", f"{volume}@latest", "-") == volume.read_bytes()
    run.done("restore", "latest", run.folder / "out", "--verify")
    run.done("verify", "latest")
    run.done("verify", "latest", volumes[0])
    run.done("check", "--read-data")
    assert asked.actions == {"make the place", "list", "get", "put if absent"}
    assert asked.deleted == []
    # init tries out that nothing is ever replaced.
    assert asked.overwritten == ["config"]
    assert len(set(asked.created)) == len(asked.created)


def test_runs_that_fail_delete_nothing_either(
    run_command: InProcess, asked: Asked, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = run_command
    volume = run.folder / "volume"
    volume.write_bytes(random.Random(2).randbytes(300 * KIB))
    run.done("init", "--chunk-size", "16K")
    create = LocalBackend.open_writer
    codes = []
    while not codes or codes[-1]:
        left = [len(codes)]

        def open_writer(self: LocalBackend, left: list[int] = left) -> ObjectWriter:
            left[0] -= 1
            if left[0] < 0:
                raise RefusedError("put", "an object")
            return create(self)

        monkeypatch.setattr(LocalBackend, "open_writer", open_writer)
        codes.append(run("backup", volume)[0])
    # The writer's record, a data pack, a pack of nodes, an index segment and the manifest.
    assert codes == [1] * 5 + [0]
    run.done("backup", volume)
    assert run.done("restore", "latest", "-") == volume.read_bytes()
    run.done("check", "--read-data")
    assert asked.deleted == []
    assert asked.overwritten == ["config"]


def test_the_storage_refuses_what_it_says(tmp_path: Path) -> None:
    asked = Asked()
    storage = AppendOnly(LocalBackend(str(tmp_path)), asked)
    storage.put("a", b"1")
    with pytest.raises(ObjectExistsError):
        storage.put("a", b"2")
    with pytest.raises(RefusedError):
        storage.delete("a")
    assert storage.read("a") == b"1"
    assert (asked.created, asked.overwritten, asked.deleted) == (["a"], ["a"], ["a"])
