"""Manifests that are gone though nobody deleted them: nothing may be collected, and a check says so."""

from __future__ import annotations

import errno
import os
import shutil
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from blocksnap.backends.errors import BackendFailedError
from blocksnap.backends.local import LocalBackend
from blocksnap.operations.catalogue import map_root
from blocksnap.operations.repair import RepairOptions, plan_repair, repair
from blocksnap.operations.reporting import Quiet
from blocksnap.repository.check import Checker
from blocksnap.repository.frame import FrameType
from blocksnap.repository.missing import MissingManifestsError
from blocksnap.repository.writer import RepositoryWriter
from support.repositories import make_repository, open_repository

from .test_collector import HOST, back_up, chunk, everybody, forget, prune, size_of


@pytest.fixture
def path(tmp_path: Path) -> Path:
    make_repository(tmp_path / "r", encrypted=False)
    return tmp_path / "r"


def lose_manifests(path: Path) -> None:
    shutil.move(path / "manifests", path.parent / "lost+found")


def find_damage(path: Path) -> list[str]:
    checker = Checker(open_repository(path), map_root, lambda _: None, level=2)
    checker.check_structure()
    return [finding.object for finding in checker.result.findings if finding.severity == "damage"]


def age(path: Path, days: int) -> None:
    """Make the storage say that all arrived so long ago."""
    for file in path.rglob("*"):
        moment = file.stat().st_mtime - days * 86400
        os.utime(file, (moment, moment))


def require_refused(path: Path) -> None:
    before = size_of(path)
    for _ in range(2):
        # Refused once more, though the first attempt has left its own traces.
        with pytest.raises(MissingManifestsError):
            prune(path, everybody)
    assert size_of(path) == before
    assert find_damage(path)


def test_a_lost_folder_is_damage_and_nothing_is_deleted(path: Path) -> None:
    for number in range(3):
        back_up(path, {number: number})
    # With which the records of these runs go.
    assert prune(path).state == "nothing"
    lose_manifests(path)
    gone = {name.removeprefix("manifests/") for name in find_damage(path)}
    # Beside theirs there is the fence of the prune, which has no packs.
    assert len(gone) == 3
    assert gone < {file.name for file in (path.parent / "lost+found").iterdir()}
    require_refused(path)
    # Put back, everything is as it was.
    (path / "manifests").mkdir()
    for file in (path.parent / "lost+found").iterdir():
        shutil.copy2(file, path / "manifests" / file.name)
    assert find_damage(path) == []
    assert prune(path).state == "nothing"
    assert len(open_repository(path).backups()) == 3


def test_a_backup_taken_after_the_loss_does_not_hide_it(path: Path) -> None:
    back_up(path, {0: 0})
    prune(path)
    lose_manifests(path)
    back_up(path, {1: 1})
    require_refused(path)


def test_an_old_repository_has_the_last_epoch_to_tell(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given_up = back_up(path, {0: 0})
    back_up(path, {1: 1})
    forget(path, given_up)
    assert prune(path).state == "done"
    make_old(path, monkeypatch)
    assert find_damage(path) == []
    lose_manifests(path)
    back_up(path, {2: 2})
    require_refused(path)


def test_an_old_repository_without_any_manifest(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    back_up(path, {0: 0})
    prune(path)
    make_old(path, monkeypatch)
    lose_manifests(path)
    require_refused(path)


def make_old(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make two years pass: for the storage, and in what the repository says of its creation."""
    age(path, 800)
    created = datetime.now(UTC) - timedelta(days=800)
    opened = open_repository(path).config.model_copy(update={"created": created})
    monkeypatch.setattr("blocksnap.repository.repository.decode_public", lambda *_: opened)


def test_what_is_lost_for_good_can_be_given_up(path: Path) -> None:
    back_up(path, {0: 0})
    back_up(path, {1: 1})
    prune(path)
    lose_manifests(path)
    last = back_up(path, {2: 2})
    repository = open_repository(path)
    assert len(plan_repair(repository, frozenset()).gone) == 2
    assert not plan_repair(repository, frozenset()).is_whole
    assert repair(repository, frozenset(), RepairOptions(), Quiet()).done is None
    require_refused(path)
    repair(open_repository(path), frozenset(), RepairOptions(accept_loss=True), Quiet())
    before = size_of(path)
    assert prune(path).state == "done"
    assert size_of(path) < before
    assert find_damage(path) == []
    assert prune(path).state == "nothing"
    assert [stored.backup.id for stored in open_repository(path).backups()] == [last]


def test_a_repository_that_was_never_pruned_knows_what_was_committed(path: Path) -> None:
    for number in range(3):
        back_up(path, {number: number})
    with RepositoryWriter(open_repository(path), HOST) as died:
        died.store_blob(FrameType.DATA, chunk(9))
        died.flush()
    assert find_damage(path) == []
    committed = {f"manifests/{file.name}" for file in (path / "manifests").iterdir()}
    lose_manifests(path)
    assert set(find_damage(path)) == committed
    require_refused(path)
    # Nor does the next backup hide it.
    back_up(path, {4: 4})
    assert set(find_damage(path)) == committed
    require_refused(path)
    repair(open_repository(path), frozenset(), RepairOptions(accept_loss=True), Quiet())
    assert prune(path, everybody).state == "done"
    assert find_damage(path) == []


def test_one_manifest_that_is_lost_is_told_from_a_run_that_died(path: Path) -> None:
    back_up(path, {0: 0})
    lost = backup_run(path, back_up(path, {1: 1}))
    back_up(path, {2: 2})
    (path / "manifests" / lost).unlink()
    assert find_damage(path) == [f"manifests/{lost}"]
    require_refused(path)


def test_whoever_finds_its_packs_does_not_take_the_place_of_a_lost_manifest(path: Path) -> None:
    lost = backup_run(path, back_up(path, {0: 0}))
    lose_manifests(path)
    # With the index gone too they look like those of a run that died.
    shutil.rmtree(path / "index")
    with RepositoryWriter(open_repository(path), HOST, everybody) as run:
        assert run.adopted == 0
    assert f"manifests/{lost}" in find_damage(path)
    require_refused(path)


def test_a_commit_stands_where_nothing_more_can_be_stored(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The record that tells of it is one more object, and no part of it."""
    put = LocalBackend.put
    lost: list[str] = []

    def fail(backend: LocalBackend, name: str, data: bytes) -> None:
        if name.startswith("writers/") and not name.endswith(".0"):
            lost.append(name)
            raise BackendFailedError("write", backend.place, OSError(errno.ENOSPC, ""))
        put(backend, name, data)

    monkeypatch.setattr(LocalBackend, "put", fail)
    backup = back_up(path, {0: 0})
    monkeypatch.undo()
    assert lost == [f"writers/{backup_run(path, backup)}.1"]
    assert [stored.backup.id for stored in open_repository(path).backups()] == [backup]
    assert prune(path).state == "nothing"


def backup_run(path: Path, id_: str) -> str:
    """Return the run that made a backup."""
    (run,) = (each.manifest.writer for each in open_repository(path).backups() if each.backup.id == id_)
    return run


def test_what_never_had_manifests_is_pruned(path: Path) -> None:
    assert prune(path).state == "nothing"
    # The first run ever is killed.
    with RepositoryWriter(open_repository(path), HOST) as run:
        run.store_blob(FrameType.DATA, chunk(1))
        run.flush()
    assert size_of(path)
    assert find_damage(path) == []
    assert prune(path, everybody).state == "done"
    assert size_of(path) == 0
    assert find_damage(path) == []


def test_what_was_forgotten_altogether_is_pruned(path: Path) -> None:
    forget(path, back_up(path, {0: 0}), back_up(path, {1: 1}))
    assert prune(path).state == "done"
    assert size_of(path) == 0
    assert find_damage(path) == []
    assert prune(path).state == "nothing"


def test_what_is_lost_between_the_two_looks_of_a_collection(path: Path) -> None:
    given_up = back_up(path, {0: 0})
    back_up(path, {1: 1})
    forget(path, given_up)
    repository = open_repository(path)
    run = RepositoryWriter(repository, HOST)
    with run:
        # At work: the epoch stays open until it ends.
        assert prune(path).state == "waiting"
        lose_manifests(path)
    require_refused(path)
