"""What is known to be lost of a parent is read again by the next incremental backup."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import cast

import pytest

from blocksnap.extents.changes import Changes
from blocksnap.extents.model import ExtentList
from blocksnap.operations.backup import back_up
from blocksnap.operations.catalogue import map_root
from blocksnap.operations.losses import current_losses
from blocksnap.operations.repair import RepairOptions, repair
from blocksnap.operations.reporting import Quiet
from blocksnap.operations.runs import is_gone, this_author
from blocksnap.operations.storing import BackupOptions, plan_backup, store_volume
from blocksnap.pipeline.selection import subtract
from blocksnap.repository.blockmap import ZERO, MapReader
from blocksnap.repository.repository import Repository
from blocksnap.repository.stored import StoredBackup
from blocksnap.repository.writer import RepositoryWriter, Stored
from blocksnap.volumes.base import Snapshot, Volume
from blocksnap.volumes.resolve import resolve_volume
from support.repositories import CHUNK, harm_largest_pack, make_repository, open_repository


class Unchanged:
    """A snapshot of a source that knows that nothing has changed, but for what was discarded."""

    def __init__(self, size: int, discarded: ExtentList | None = None, path: Path | None = None) -> None:
        self.size, self.discarded, self.path = size, discarded or ExtentList(), path

    def find_changes(self, parent: object) -> Changes:
        nothing = ExtentList()
        left = ExtentList.of(
            (begin, end - begin)
            for begin, end in subtract([(0, self.size)], ((each.offset, each.end) for each in self.discarded))
        )
        return Changes("thin-time", "nothing", parent is not None, left, nothing, self.discarded)

    @contextmanager
    def open_reader(self) -> Iterator[int]:
        assert self.path is not None
        fd = os.open(self.path, os.O_RDONLY)
        yield fd
        os.close(fd)


def stored(tmp_path: Path) -> tuple[Repository, Volume, StoredBackup]:
    make_repository(tmp_path / "r", encrypted=False)
    path = tmp_path / "volume"
    path.write_bytes(random.Random(1).randbytes(CHUNK * 20 + 9))
    volume = resolve_volume(str(path))
    repository = open_repository(tmp_path / "r")
    (made,) = back_up(repository, [volume], str(tmp_path / "state"), BackupOptions(), Quiet())
    return repository, volume, made


def mended(tmp_path: Path) -> Repository:
    repository = open_repository(tmp_path / "r")
    suspects = frozenset(info.name for info in repository.backend.list("packs/"))
    repair(repository, suspects, RepairOptions(), Quiet())
    return open_repository(tmp_path / "r")


def plan(repository: Repository, volume: Volume, parent: StoredBackup) -> tuple[list[tuple[int, int]], str]:
    snapshot = cast("Snapshot", Unchanged(parent.backup.size))
    made = plan_backup(repository, volume, snapshot, parent.backup, lambda *_: True, full=False)
    return list(made.selection.read), made.changes.reason


def test_lost_chunks_are_read_again(tmp_path: Path) -> None:
    repository, volume, made = stored(tmp_path)
    assert plan(repository, volume, made) == ([], "nothing")
    harm_largest_pack(tmp_path / "r")
    repository = mended(tmp_path)
    ((offset, length),) = current_losses(repository, made.backup)
    assert (offset % CHUNK, length) == (0, CHUNK)
    read, reason = plan(repository, volume, made)
    assert read == [(offset // CHUNK, offset // CHUNK + 1)]
    assert reason == f"nothing; {CHUNK} bytes of the parent are lost, and read again"


@pytest.mark.parametrize("neighbours", [0, 1])
def test_what_was_lost_and_then_discarded_is_read_as_zeros(tmp_path: Path, neighbours: int) -> None:
    repository, volume, made = stored(tmp_path)
    harm_largest_pack(tmp_path / "r")
    repository = mended(tmp_path)
    ((offset, length),) = current_losses(repository, made.backup)
    begin, end = offset - neighbours * CHUNK, offset + length + neighbours * CHUNK
    with (tmp_path / "volume").open("r+b") as file:
        file.seek(begin)
        file.write(bytes(end - begin))
    discarded = ExtentList.of([(begin, end - begin)])
    snapshot = cast("Snapshot", Unchanged(made.backup.size, discarded, tmp_path / "volume"))
    planned = plan_backup(repository, volume, snapshot, made.backup, lambda *_: True, full=False)
    assert list(planned.selection.read) == [(offset // CHUNK, offset // CHUNK + 1)]
    with RepositoryWriter(repository, this_author(), is_gone) as writer:
        draft = store_volume(repository, writer, planned, Stored(), BackupOptions(), Quiet())
        writer.flush()
    runs = MapReader(open_repository(tmp_path / "r").load_node).runs(map_root(draft.map), 0, 20)
    found = {number + at: entry for number, count, entry in runs for at in range(count)}
    assert [n for n, entry in found.items() if len(entry) != 32] == list(range(begin // CHUNK, end // CHUNK))
    assert found[offset // CHUNK] == ZERO


def test_what_has_come_back_is_not_lost_any_more(tmp_path: Path) -> None:
    repository, volume, made = stored(tmp_path)
    data = max((p for p in (tmp_path / "r" / "packs").rglob("*-*")), key=lambda path: path.stat().st_size)
    data.unlink()
    repository = mended(tmp_path)
    assert sum(length for _, length in current_losses(repository, made.backup)) == CHUNK * 20 + 9
    assert back_up(repository, [volume], str(tmp_path / "state"), BackupOptions(), Quiet())
    repository = open_repository(tmp_path / "r")
    assert current_losses(repository, made.backup) == []
    assert plan(repository, volume, made) == ([], "nothing")
