"""Writing over a file only what differs from a backup, also where the file is shorter than that."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from blocksnap.errors import DamageError
from blocksnap.operations.backup import back_up
from blocksnap.operations.in_place import InPlaceResult, restore_in_place
from blocksnap.operations.reporting import Quiet
from blocksnap.operations.storing import BackupOptions
from blocksnap.repository.documents import Backup
from blocksnap.restore.pool_watch import RestoreLimits
from blocksnap.volumes.resolve import resolve_volume
from support.repositories import CHUNK, make_repository, open_repository

FIRST, LAST = random.Random(1).randbytes(CHUNK * 70), random.Random(2).randbytes(CHUNK * 2 + 9)
CONTENT = FIRST + bytes(CHUNK * 60) + LAST


@pytest.fixture
def backup(tmp_path: Path) -> Backup:
    make_repository(tmp_path / "r", encrypted=False)
    (tmp_path / "source").write_bytes(CONTENT)
    volume = resolve_volume(str(tmp_path / "source"))
    state = str(tmp_path / "state")
    (made,) = back_up(open_repository(tmp_path / "r"), [volume], state, BackupOptions(), Quiet())
    return made.backup


def restore(tmp_path: Path, backup: Backup) -> InPlaceResult:
    return restore_in_place(
        open_repository(tmp_path / "r"),
        backup,
        str(tmp_path / "target"),
        str(tmp_path / "state"),
        Quiet(),
        is_device=False,
        limits=RestoreLimits(),
        verify=True,
    )


@pytest.mark.parametrize("held", [0, 7, 3 * CHUNK, 69 * CHUNK + 1, 100 * CHUNK + 5, 132 * CHUNK])
def test_a_file_that_is_shorter(tmp_path: Path, backup: Backup, held: int) -> None:
    (tmp_path / "target").write_bytes(CONTENT[:held])
    written = restore(tmp_path, backup).written_bytes
    assert (tmp_path / "target").read_bytes() == CONTENT
    chunks = (CONTENT[at : at + CHUNK] for at in range(held // CHUNK * CHUNK, len(CONTENT), CHUNK))
    # What it lacks, where there is anything, and the chunk in which it ended.
    lacking = [
        len(chunk) for number, chunk in enumerate(chunks) if any(chunk) or (not number and held % CHUNK)
    ]
    assert written == sum(lacking)


def test_a_file_that_is_shorter_stays_so_when_nothing_is_written(tmp_path: Path, backup: Backup) -> None:
    (tmp_path / "target").write_bytes(CONTENT[: CHUNK * 3])
    nodes = min((p for p in (tmp_path / "r" / "packs").rglob("*-*")), key=lambda path: path.stat().st_size)
    nodes.unlink()
    with pytest.raises(DamageError):
        restore(tmp_path, backup)
    assert (tmp_path / "target").read_bytes() == CONTENT[: CHUNK * 3]
