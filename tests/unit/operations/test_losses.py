"""What is known to be lost of a parent is read again by the next incremental backup."""

from __future__ import annotations

import random
from contextlib import AbstractContextManager
from pathlib import Path
from typing import cast

from blocksnap.extents.changes import Changes
from blocksnap.extents.model import ExtentList
from blocksnap.operations.backup import back_up
from blocksnap.operations.losses import current_losses
from blocksnap.operations.repair import RepairOptions, repair
from blocksnap.operations.reporting import Quiet
from blocksnap.operations.storing import BackupOptions, plan_backup
from blocksnap.repository.repository import Repository, StoredBackup
from blocksnap.volumes.base import Snapshot, Volume
from blocksnap.volumes.resolve import resolve_volume
from support.repositories import CHUNK, make_repository, open_repository


class Unchanged:
    """A snapshot of a source that knows that nothing has changed."""

    def __init__(self, size: int) -> None:
        self.size = size

    def find_changes(self, parent: object) -> Changes:
        nothing, everything = ExtentList(), ExtentList.whole(self.size)
        return Changes("thin-time", "nothing", parent is not None, everything, nothing, nothing)

    def open_reader(self) -> AbstractContextManager[int]:
        raise NotImplementedError


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
    data = max((p for p in (tmp_path / "r" / "packs").rglob("*-*")), key=lambda path: path.stat().st_size)
    harmed = bytearray(data.read_bytes())
    harmed[5 * CHUNK] ^= 1
    data.write_bytes(harmed)
    repository = mended(tmp_path)
    ((offset, length),) = current_losses(repository, made.backup)
    assert (offset % CHUNK, length) == (0, CHUNK)
    read, reason = plan(repository, volume, made)
    assert read == [(offset // CHUNK, offset // CHUNK + 1)]
    assert reason == f"nothing; {CHUNK} bytes of the parent are lost, and read again"


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
