"""A run that is shut out, or meets a damaged parent, in the middle: what it then commits is whole."""

from __future__ import annotations

import io
import os
import random
import threading
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path

import pytest

from blocksnap.backends.local import LocalBackend
from blocksnap.controller.lock import VolumeLocks
from blocksnap.controller.session import locks_of
from blocksnap.errors import BusyError, UsageError
from blocksnap.operations import backup
from blocksnap.operations.backup import back_up, plan_backups
from blocksnap.operations.reporting import Quiet
from blocksnap.operations.restore import execute_restore, plan_restore
from blocksnap.operations.storing import BackupOptions
from blocksnap.operations.verify import verify_repository
from blocksnap.quiesce.settings import QuiesceSettings
from blocksnap.repository.errors import FencedError
from blocksnap.repository.fencing import fence, read_runs, settled_runs
from blocksnap.repository.repository import Repository
from blocksnap.repository.stored import StoredBackup
from blocksnap.volumes.base import Volume
from blocksnap.volumes.resolve import resolve_volume
from support.repositories import CHUNK, make_repository, open_repository

SIZE = 3 << 20


class Interrupted(Quiet):
    """Does something when the volume has been read, the first ``times`` times."""

    def __init__(self, act: Callable[[], None], times: int) -> None:
        super().__init__()
        self.act, self.times = act, times

    def end(self) -> None:
        if self.times:
            self.times -= 1
            self.act()


@pytest.fixture
def place(tmp_path: Path) -> Path:
    path = tmp_path / "repository"
    Repository.create(LocalBackend(str(path)), chunk_size=64 << 10, passphrase=None)
    return path


def opened(place: Path) -> Repository:
    return Repository.open(LocalBackend(str(place)), lambda: None)


def shut_out_everybody(place: Path) -> None:
    repository = opened(place)
    for writer in read_runs(repository).keys() - settled_runs(repository):
        assert fence(repository, writer, datetime.now(UTC))


def test_it_goes_on_as_another_run(place: Path, tmp_path: Path) -> None:
    image = tmp_path / "volume.img"
    image.write_bytes(os.urandom(SIZE))
    report = Interrupted(lambda: shut_out_everybody(place), 1)
    (stored,) = back_up(
        opened(place), [resolve_volume(str(image))], str(tmp_path / "state"), BackupOptions(), report
    )
    assert ["shut out" in warning for warning in report.warnings] == [True]
    packed = sum(path.stat().st_size for path in (place / "packs").rglob("*") if path.is_file())
    assert SIZE <= packed < SIZE + (64 << 10)
    # Also what the run that was shut out had stored.
    assert stored.backup.statistics.new_bytes == SIZE
    repository = opened(place)
    assert [each.backup.id for each in repository.backups()] == [stored.backup.id]
    plan = plan_restore(stored.backup, str(tmp_path / "out"))
    execute_restore(repository, plan, io.BytesIO(), Quiet(), verify=False)
    assert (tmp_path / "out").read_bytes() == image.read_bytes()


def test_twice_is_too_often(place: Path, tmp_path: Path) -> None:
    image = tmp_path / "volume.img"
    image.write_bytes(os.urandom(SIZE))
    report = Interrupted(lambda: shut_out_everybody(place), 2)
    with pytest.raises(FencedError):
        back_up(opened(place), [resolve_volume(str(image))], str(tmp_path / "state"), BackupOptions(), report)
    assert opened(place).backups() == []
    assert not list((tmp_path / "state").glob("journal/*"))


def test_a_dry_run_waits_for_the_volume_as_a_backup_does(place: Path, tmp_path: Path) -> None:
    image = tmp_path / "volume.img"
    image.write_bytes(os.urandom(SIZE))
    volume, state = resolve_volume(str(image)), str(tmp_path / "state")
    with VolumeLocks(state, [(volume.key, volume.name)]) as held:
        with pytest.raises(BusyError):
            plan_backups(opened(place), [volume], state, BackupOptions(), Quiet())
        done = threading.Timer(0.3, held.release)
        done.start()
        options = BackupOptions(wait_seconds=60.0)
        (plan,) = plan_backups(opened(place), [volume], state, options, Quiet())
        done.join()
    assert plan["read_bytes"] == SIZE


def test_the_parent_is_what_the_run_that_was_waited_for_stored(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And whoever waits has not announced itself: collectors would wait for it."""
    image, state = tmp_path / "volume.img", str(tmp_path / "state")
    image.write_bytes(os.urandom(SIZE))
    volume = resolve_volume(str(image))
    waited_for: list[StoredBackup] = []

    def after_another(volumes: Sequence[Volume], folder: str, *, wait_seconds: float = 0.0) -> VolumeLocks:
        repository = opened(place)
        assert read_runs(repository).keys() <= settled_runs(repository)
        monkeypatch.undo()
        waited_for.extend(back_up(opened(place), volumes, folder, BackupOptions(), Quiet()))
        return locks_of(volumes, folder, wait_seconds=wait_seconds)

    for _ in range(2):
        monkeypatch.setattr(backup, "locks_of", after_another)
        (stored,) = back_up(opened(place), [volume], state, BackupOptions(), Quiet())
        assert (stored.backup.kind, stored.backup.parent) == ("incremental", waited_for[-1].backup.id)
        assert stored.backup.statistics.changed_bytes == 0
    assert list(verify_repository(opened(place), stored.backup, Quiet())) == []
    fresh = tmp_path / "fresh.img"
    fresh.write_bytes(os.urandom(SIZE))
    monkeypatch.setattr(backup, "locks_of", after_another)
    (plan,) = plan_backups(opened(place), [resolve_volume(str(fresh))], state, BackupOptions(), Quiet())
    assert plan["kind"] == "incremental"


def test_a_dry_run_refuses_what_a_backup_does(place: Path, tmp_path: Path) -> None:
    image = tmp_path / "volume.img"
    image.write_bytes(os.urandom(SIZE))
    options = BackupOptions(quiesce=QuiesceSettings.model_validate({"postgresql": [{}]}))
    with pytest.raises(UsageError, match="databases and guests stand still only for one"):
        plan_backups(opened(place), [resolve_volume(str(image))], str(tmp_path), options, Quiet())


@pytest.mark.parametrize("harmed", ["a few nodes", "all nodes"])
def test_a_parent_whose_damage_shows_late_leaves_nothing_out(tmp_path: Path, harmed: str) -> None:
    """Chunks are read and claimed ahead of the map; and where one node is damaged, others may be too."""
    make_repository(tmp_path / "r", encrypted=False)
    image, state = tmp_path / "volume.img", str(tmp_path / "state")
    image.write_bytes(random.Random(1).randbytes(CHUNK * 200))
    volume = resolve_volume(str(image))
    back_up(open_repository(tmp_path / "r"), [volume], state, BackupOptions(), Quiet())
    nodes = min((p for p in (tmp_path / "r" / "packs").rglob("*-*")), key=lambda path: path.stat().st_size)
    content = bytearray(nodes.read_bytes())
    # The leaves come first, the root last.
    for at in range(100, {"a few nodes": 5000, "all nodes": len(content) - 300}[harmed], 64):
        content[at] ^= 1
    nodes.write_bytes(content)
    with image.open("r+b") as file:
        file.write(random.Random(2).randbytes(CHUNK * 20))
    (second,) = back_up(open_repository(tmp_path / "r"), [volume], state, BackupOptions(), Quiet())
    assert (second.backup.kind, second.backup.reason) == ("full", "the parent backup is damaged")
    assert second.backup.statistics.new_chunks == 20
    assert list(verify_repository(open_repository(tmp_path / "r"), second.backup, Quiet())) == []
