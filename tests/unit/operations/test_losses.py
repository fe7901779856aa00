"""What is known to be lost of a parent is read again by the next incremental backup."""

from __future__ import annotations

import io
import os
import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import cast

import pytest

from blocksnap.errors import DamageError
from blocksnap.extents.changes import Changes
from blocksnap.extents.model import ExtentList
from blocksnap.operations import heal, losses
from blocksnap.operations.backup import back_up
from blocksnap.operations.catalogue import map_root
from blocksnap.operations.losses import CurrentLosses, current_losses
from blocksnap.operations.repair import RepairOptions, plan_repair, repair
from blocksnap.operations.reporting import Quiet
from blocksnap.operations.restore import execute_restore, plan_restore
from blocksnap.operations.runs import is_gone, this_author
from blocksnap.operations.storing import BackupOptions, plan_backup, store_volume
from blocksnap.pipeline.flow import Geometry
from blocksnap.pipeline.selection import Ranges, subtract
from blocksnap.repository import losses as finding
from blocksnap.repository import repairing
from blocksnap.repository.blockmap import ZERO, MapReader
from blocksnap.repository.map_losses import NOTHING, Measure
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
    ((offset, length),) = current_losses(repository, made.backup).extents()
    assert (offset % CHUNK, length) == (0, CHUNK)
    read, reason = plan(repository, volume, made)
    assert read == [(offset // CHUNK, offset // CHUNK + 1)]
    assert reason == f"nothing; {CHUNK} bytes of the parent are lost, and read again"


@pytest.mark.parametrize("neighbours", [0, 1])
def test_what_was_lost_and_then_discarded_is_read_as_zeros(tmp_path: Path, neighbours: int) -> None:
    repository, volume, made = stored(tmp_path)
    harm_largest_pack(tmp_path / "r")
    repository = mended(tmp_path)
    ((offset, length),) = current_losses(repository, made.backup).extents()
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
    assert current_losses(repository, made.backup).total_bytes == CHUNK * 20 + 9
    assert back_up(repository, [volume], str(tmp_path / "state"), BackupOptions(), Quiet())
    repository = open_repository(tmp_path / "r")
    assert not current_losses(repository, made.backup).total_bytes
    assert plan(repository, volume, made) == ([], "nothing")


def harm_many(folder: Path) -> None:
    """Flip a bit every 40,000 bytes of the largest pack, which takes every second or third chunk."""
    pack = max((folder / "packs").rglob("*-*"), key=lambda path: path.stat().st_size)
    content = bytearray(pack.read_bytes())
    for position in range(20_000, len(content), 40_000):
        content[position] ^= 1
    pack.chmod(0o600)
    pack.write_bytes(content)


def test_more_losses_than_are_held_are_read_again_as_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    repository, volume, made = stored(tmp_path)
    harm_many(tmp_path / "r")
    monkeypatch.setattr(repairing, "_MOST_RANGES", 3)
    repository = mended(tmp_path)
    (record,) = repository.aside_records().values()
    assert len(record.ranges) == 3
    every = current_losses(repository, made.backup)
    extents = list(every.extents())
    assert (every.total.ranges, every.left_out) == (len(extents), "")
    assert every.total.ranges > 4
    assert list(every.covering()) == extents
    monkeypatch.setattr(losses, "_MOST", 2)
    few = current_losses(repository, made.backup)
    assert list(few.extents()) == extents[:2]
    assert (few.total, few.total_bytes) == (every.total, sum(length for _, length in extents))
    assert few.left_out == f"{len(extents) - 2} more ranges, {every.total_bytes} bytes in all"
    assert list(few.covering()) == [extents[0], (extents[1][0], sum(extents[-1]) - extents[1][0])]
    read, _ = plan(repository, volume, made)
    assert all(any(begin * CHUNK <= at < end * CHUNK for begin, end in read) for at, _ in extents)


def test_a_node_that_is_read_only_the_second_time_is_read_again_from_the_source(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, volume, made = stored(tmp_path)
    harm_largest_pack(tmp_path / "r")
    repository = mended(tmp_path)
    extents = list(current_losses(repository, made.backup).extents())
    assert back_up(repository, [volume], str(tmp_path / "state"), BackupOptions(full=True), Quiet())
    repository = open_repository(tmp_path / "r")
    assert plan(repository, volume, made) == ([], "nothing")
    load = repository.load_node
    seen: list[bytes] = []

    def load_node(id_: bytes) -> bytes:
        seen.append(id_)
        if len(seen) == 1:
            raise DamageError("it could not be read")
        return load(id_)

    monkeypatch.setattr(repository, "load_node", load_node)
    lost = current_losses(repository, made.backup)
    assert (lost.total.ranges, len(lost.first)) == (1, 0)
    seen.clear()
    read, _ = plan(repository, volume, made)
    assert read == [(offset // CHUNK, offset // CHUNK + 1) for offset, _ in extents]


@pytest.mark.parametrize(
    ("total", "first", "covered"),
    [
        (Measure(3, 1, 4, 7), [], [(4, 7)]),
        (Measure(3, 3, 4, 9), [(4, 5)], [(4, 9)]),
        (NOTHING, [(4, 5), (6, 7)], [(4, 5), (6, 7)]),
        (Measure(2, 1, 1, 3), [(4, 5), (6, 7)], [(4, 5), (6, 7)]),
    ],
)
def test_two_readings_that_differ_are_covered(
    total: Measure, first: list[tuple[int, int]], covered: list[tuple[int, int]]
) -> None:
    lost = CurrentLosses(Geometry(10 * CHUNK, CHUNK), total, Ranges(first))
    assert list(lost.covering()) == [(begin * CHUNK, (end - begin) * CHUNK) for begin, end in covered]
    assert bool(lost.left_out) == (total.ranges > len(first))


def test_more_losses_than_are_told_are_healed_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, volume, made = stored(tmp_path)
    harm_many(tmp_path / "r")
    for module, name in ((repairing, "_MOST_RANGES"), (finding, "MOST_LISTED"), (heal, "_MOST_RANGES")):
        monkeypatch.setattr(module, name, 2)
    repository = mended(tmp_path)
    plan = plan_repair(repository, frozenset())
    (harmed,) = plan.harmed
    assert harmed.ranges > len(harmed.first) == 2
    healed = heal.heal_from(repository, volume, frozenset(), str(tmp_path / "state"), Quiet())
    assert healed.chunks == harmed.size_bytes // CHUNK
    assert healed.left.is_whole
    repository = open_repository(tmp_path / "r")
    out = io.BytesIO()
    execute_restore(repository, plan_restore(made.backup, "-"), out, Quiet(), verify=False)
    assert out.getvalue() == (tmp_path / "volume").read_bytes()
