"""A cache directory that is full, read-only or gone: commands do without it, and say nothing."""

from __future__ import annotations

import gc
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from blocksnap.backends.local import LocalBackend
from blocksnap.repository.keys import MINIMUM_COST
from blocksnap.repository.repository import Repository
from support.commands import CommandLine
from support.loops import call, unmount
from support.repositories import PASSPHRASE, open_writer


@contextmanager
def tmpfs(folder: Path, options: str) -> Iterator[Path]:
    folder.mkdir()
    call("mount", "-t", "tmpfs", "-o", options, "blocksnap-test", str(folder))
    try:
        yield folder
    finally:
        # Repositories that nobody needs any more still have it open.
        gc.collect()
        unmount(folder)


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """Return a repository with an index of 30 KiB."""
    path = tmp_path / "many"
    Repository.create(LocalBackend(str(path)), chunk_size=16 << 10, passphrase=PASSPHRASE, cost=MINIMUM_COST)
    store(path, range(600))
    return path


def store(path: Path, contents: range, cache: Path | None = None) -> int:
    """Store small chunks as a run does, and return how many were new."""
    backend = LocalBackend(str(path))
    repository = Repository.open(backend, lambda: PASSPHRASE, cache=str(cache) if cache else None)
    with open_writer(repository) as writer:
        for number in contents:
            writer.store_node(number.to_bytes(4, "big"))
        writer.flush()
        packs = writer._data.open, writer._meta.open
        assert packs == (None, None)
        new = sum(len(pack.rows) for pack in writer._durable)
    rows = sum(table.rows for table in repository.index.tables)
    assert new == 0
    return rows


@pytest.mark.parametrize("room", ["full at once", "full on the way"])
def test_a_full_directory(tmp_path: Path, place: Path, room: str) -> None:
    with tmpfs(tmp_path / "cache", "size=64k,mode=0700") as cache:
        (cache / "filler").write_bytes(bytes((60 if room == "full at once" else 48) << 10))
        assert store(place, range(700), cache) == 700
        assert store(place, range(700), cache) == 700
        assert not list(cache.rglob("index-*"))
        assert not list(cache.rglob("new-*"))


def test_a_directory_that_cannot_be_written(tmp_path: Path, place: Path) -> None:
    with tmpfs(tmp_path / "cache", "mode=0700") as cache:
        assert store(place, range(600), cache) == 600
        held = sorted(cache.rglob("*"))
        gc.collect()
        call("mount", "-o", "remount,ro", str(cache))
        # What is in it still counts.
        assert store(place, range(700), cache) == 700
        assert sorted(cache.rglob("*")) == held


def test_commands_with_it_without_it_and_after_it_is_gone(blocksnap: CommandLine, tmp_path: Path) -> None:
    volume = tmp_path / "volume.img"
    volume.write_bytes(b"first" * 100_000)
    blocksnap.done("backup", volume)
    tables = list((tmp_path / "cache").rglob("index-*"))
    assert tables
    shutil.rmtree(tmp_path / "cache")
    assert blocksnap.done("backup", "--json", volume).backups[0]["new_bytes"] == 0
    assert blocksnap.done("restore", "latest", "-").stdout == volume.read_bytes()
    shutil.rmtree(tmp_path / "cache")
    assert blocksnap.done("backup", "--json", "--no-cache", volume).backups[0]["new_bytes"] == 0
    assert not (tmp_path / "cache").exists()
    blocksnap.done("restore", "latest", "-", "--cache-dir", tmp_path / "other")
    assert list((tmp_path / "other").rglob("index-*"))


def test_killed_while_it_is_made(blocksnap: CommandLine, tmp_path: Path) -> None:
    volume = tmp_path / "volume.img"
    volume.write_bytes(b"".join(number.to_bytes(8, "big") * (16 << 10) for number in range(200)))
    blocksnap.done("backup", volume)
    for milliseconds in range(150, 650, 100):
        shutil.rmtree(tmp_path / "cache", ignore_errors=True)
        process = blocksnap.start("restore", "latest", "-")
        time.sleep(milliseconds / 1000)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert blocksnap.done("restore", "latest", "-").stdout == volume.read_bytes()
    assert not list((tmp_path / "cache").rglob("new-*"))


def test_many_commands_at_once(blocksnap: CommandLine, tmp_path: Path) -> None:
    volumes = [tmp_path / f"volume{number}.img" for number in range(4)]
    for number, volume in enumerate(volumes):
        volume.write_bytes(bytes([number + 1]) * (1 << 20))
    for _ in range(2):
        processes: list[subprocess.Popen[bytes]] = [blocksnap.start("backup", volume) for volume in volumes]
        for process in processes:
            _, said = process.communicate()
            assert process.returncode == 0, said
    for volume in volumes:
        assert blocksnap.done("restore", f"{volume}@latest", "-").stdout == volume.read_bytes()
    assert not blocksnap.done("check", "--read-data", "--json").document["damaged"]
