"""Forgetting and collecting on a real directory: what goes, what stays, and who is waited for."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from blocksnap.backends.base import ObjectInfo
from blocksnap.backends.local import LocalBackend
from blocksnap.errors import DamageError
from blocksnap.operations.catalogue import map_root, newest_of, root_document
from blocksnap.repository import collector as collecting
from blocksnap.repository.blockmap import MapReader, MapWriter
from blocksnap.repository.check import Checker
from blocksnap.repository.collector import Collector, Outcome
from blocksnap.repository.documents import (
    Backup,
    Forgotten,
    Manifest,
    SetAside,
    Statistics,
    VolumeRecord,
    WriterRecord,
)
from blocksnap.repository.epochs import create_forgotten, create_set_aside, read_epoch
from blocksnap.repository.errors import FencedError
from blocksnap.repository.fencing import fence, settled_runs
from blocksnap.repository.frame import FrameType
from blocksnap.repository.repository import Repository
from blocksnap.repository.victims import Limits
from blocksnap.repository.writer import Author, RepositoryWriter
from support.repositories import CHUNK, make_repository, open_repository

CHUNKS = 40
HOST = Author("host", "host.example", pid=1, boot="b", started=1)
_NOTHING = Statistics(
    changed_bytes=0, read_bytes=0, new_bytes=0, stored_bytes=0, metadata_bytes=0, new_chunks=0,
    freeze_ms=0, skew_ms=0, seconds=0,
)  # fmt: skip


def nobody(_: WriterRecord) -> bool:
    return False


def everybody(_: WriterRecord) -> bool:
    return True


def chunk(number: int) -> bytes:
    return random.Random(number).randbytes(1000)


def manifest_of(run: RepositoryWriter, root: object, parent: Backup | None) -> Manifest:
    now = datetime.now(UTC)
    backup = Backup(
        id=run.backup_id(0), volume=VolumeRecord(name="v", key="v", kind="file"), time=now,
        kind="incremental" if parent else "full", parent=parent.id if parent else None, method="compare",
        reason="test", size=CHUNKS * CHUNK, chunk_size=CHUNK, map=root_document(root), source={},  # type: ignore[arg-type]
        statistics=_NOTHING,
    )  # fmt: skip
    return Manifest(writer=run.id.hex(), time=now, host="h", hostname="h", program="p", backups=(backup,))


def store(run: RepositoryWriter, repository: Repository, content: dict[int, int]) -> Callable[[], str]:
    """Store chunks on top of the newest backup; what is returned commits it."""
    parent = newest_of(repository.backups(), "v")
    root = map_root(parent.map) if parent else None
    builder = MapWriter(MapReader(repository.load_node), root, CHUNKS, run.store_node)
    for number, seed in sorted(content.items()):
        builder.set(number, run.store_blob(FrameType.DATA, chunk(seed)))
    new = builder.finish()
    return lambda: run.commit(lambda _: manifest_of(run, new, parent))[0].backups[0].id


def back_up(path: Path, content: dict[int, int]) -> str:
    repository = open_repository(path)
    with RepositoryWriter(repository, HOST) as run:
        return store(run, repository, content)()


def forget(path: Path, *ids: str) -> None:
    repository = open_repository(path)
    create_forgotten(
        repository, Forgotten(run=random.randbytes(16).hex(), time=datetime.now(UTC), backups=ids)
    )


def prune(
    path: Path,
    is_gone: Callable[[WriterRecord], bool] = nobody,
    *,
    later: float = 0,
    limits: Limits | None = None,
) -> Outcome:
    repository = open_repository(path)
    collector = Collector(
        repository,
        map_root,
        limits or Limits(),
        now=lambda: datetime.now(UTC) + timedelta(seconds=later),
        advance=lambda _: None,
    )
    with RepositoryWriter(repository, HOST, collects=True) as run:
        return collector.collect(run, is_gone)


def content_of(path: Path, id_: str) -> dict[int, bytes]:
    repository = open_repository(path)
    backup = next(stored.backup for stored in repository.backups() if stored.backup.id == id_)
    return {
        number: repository.load(FrameType.DATA, entry)
        for number, _, entry in MapReader(repository.load_node).runs(map_root(backup.map), 0, CHUNKS)
        if len(entry) == 32
    }


def run_of(path: Path, id_: str) -> str:
    backups = open_repository(path).backups()
    return next(stored.manifest.writer for stored in backups if stored.backup.id == id_)


def size_of(path: Path) -> int:
    return sum(file.stat().st_size for file in (path / "packs").rglob("*") if file.is_file())


def flip_a_bit(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[200] ^= 1
    file.chmod(0o600)
    file.write_bytes(data)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    make_repository(tmp_path / "repository")
    return tmp_path / "repository"


def test_space_comes_back_and_what_stays_is_whole(path: Path) -> None:
    first = back_up(path, {n: n for n in range(30)})
    second = back_up(path, {n: 100 + n for n in range(20)})
    before = size_of(path)
    assert prune(path).state == "nothing"
    forget(path, first)
    assert [stored.backup.id for stored in open_repository(path).backups()] == [second]
    outcome = prune(path)
    assert outcome.state == "done"
    assert size_of(path) < before - 15 * 1000
    expected = {n: chunk(100 + n) for n in range(20)} | {n: chunk(n) for n in range(20, 30)}
    assert content_of(path, second) == expected
    assert prune(path).state == "nothing"


def test_a_run_at_work_is_waited_for_and_keeps_what_it_found(path: Path) -> None:
    first = back_up(path, {n: n for n in range(30)})
    second = back_up(path, dict.fromkeys(range(30), 7))
    forget(path, first)
    repository = open_repository(path)
    with RepositoryWriter(repository, HOST) as run:
        # It relies on chunks that only the forgotten backup has.
        commit = store(run, repository, {n: n for n in range(10)})
        assert run.stored.new_chunks == 0
        waiting = prune(path)
        assert (waiting.state, [each.writer for each in waiting.waiting]) == ("waiting", [run.id.hex()])
        third = commit()
    done = prune(path)
    assert done.state == "done"
    expected = {n: chunk(7) for n in range(30)} | {n: chunk(n) for n in range(10)}
    assert content_of(path, third) == expected
    assert content_of(path, second) == {n: chunk(7) for n in range(30)}


def test_a_run_that_knows_the_epoch_is_not_waited_for(path: Path) -> None:
    first = back_up(path, {n: n for n in range(30)})
    back_up(path, dict.fromkeys(range(30), 7))
    forget(path, first)
    with RepositoryWriter(open_repository(path), HOST):
        assert prune(path).state == "waiting"
        repository = open_repository(path)
        with RepositoryWriter(repository, HOST) as late:
            commit = store(late, repository, {n: n for n in range(10)})
            # The condemned copies are of no use to it.
            assert late.stored.new_chunks == 10 - 1
            assert {each.writer for each in prune(path).waiting} != {late.id.hex()}
            third = commit()
    assert prune(path, everybody).state == "done"
    assert content_of(path, third)[3] == chunk(3)


def test_a_silent_run_is_shut_out(path: Path) -> None:
    first = back_up(path, {n: n for n in range(30)})
    back_up(path, dict.fromkeys(range(30), 7))
    forget(path, first)
    repository = open_repository(path)
    with RepositoryWriter(repository, HOST) as run:
        commit = store(run, repository, {1: 1})
        assert prune(path, later=7 * 3600).state == "done"
        with pytest.raises(FencedError):
            commit()


def test_what_a_dead_run_had_stored_is_taken_over(path: Path) -> None:
    repository = open_repository(path)
    with RepositoryWriter(repository, HOST) as run:
        store(run, repository, {n: n for n in range(20)})
        run._publish(run._data)
        run._collect(leave=0)
        # It dies here: a pack is stored, and nothing says what is in it.
    repository = open_repository(path)
    with RepositoryWriter(repository, HOST, everybody) as following:
        assert following.adopted > 20 * 1000
        id_ = store(following, repository, {n: n for n in range(20)})()
        assert following.stored.new_chunks == 0
    assert content_of(path, id_) == {n: chunk(n) for n in range(20)}
    assert prune(path).state in ("nothing", "done")
    assert content_of(path, id_) == {n: chunk(n) for n in range(20)}


def test_what_is_taken_over_is_durable_before_it_is_listed(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    repository = open_repository(path)
    sync = LocalBackend._sync_folder

    def die(backend: LocalBackend, folder: str) -> None:
        if folder.startswith("packs/"):
            raise KeyboardInterrupt
        sync(backend, folder)

    run = RepositoryWriter(repository, HOST)
    store(run, repository, {n: n for n in range(20)})
    with monkeypatch.context() as patch:
        # Killed when its packs have their names, which are not durable yet.
        patch.setattr(LocalBackend, "_sync_folder", die)
        with pytest.raises(KeyboardInterrupt):
            run.flush()
    run.stop()
    names = {info.name for info in repository.backend.list("packs/")}
    assert names
    flushed: list[str] = []

    def note(backend: LocalBackend, folder: str) -> None:
        flushed.append(folder)
        sync(backend, folder)

    monkeypatch.setattr(LocalBackend, "_sync_folder", note)
    with RepositoryWriter(open_repository(path), HOST, everybody) as following:
        assert following.adopted
    assert {name.rpartition("/")[0] for name in names} <= set(flushed[: flushed.index("index")])


def test_an_interrupted_collection_is_taken_up(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = back_up(path, {n: n for n in range(30)})
    second = back_up(path, {n: 50 + n for n in range(20)})
    forget(path, first)

    def die(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(collecting, "execute_sweep", die)
        with pytest.raises(KeyboardInterrupt):
            prune(path)
    epoch = read_epoch(open_repository(path))
    assert epoch.is_open
    assert epoch.sweep is not None
    assert len(content_of(path, second)) == 30
    assert prune(path).state == "done"
    assert not read_epoch(open_repository(path)).is_open
    assert len(content_of(path, second)) == 30


def test_a_sweep_goes_on_over_a_segment_that_was_damaged_since(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = back_up(path, {n: n for n in range(30)})
    (harmed,) = (path / "index").iterdir()
    second = back_up(path, {n: 50 + n for n in range(20)})
    forget(path, first)
    with monkeypatch.context() as patch:
        patch.setattr(collecting, "execute_sweep", lambda *_: None)
        prune(path)
    sweep = read_epoch(open_repository(path)).sweep
    assert sweep is not None
    assert sweep.packs
    flip_a_bit(harmed)
    assert prune(path).state == "done"
    assert not {name for name in sweep.packs if (path / name).exists()}
    assert len(content_of(path, second)) == 30


def test_nothing_goes_while_a_manifest_cannot_be_read(path: Path) -> None:
    first = back_up(path, {n: n for n in range(30)})
    second = back_up(path, dict.fromkeys(range(30), 7))
    forget(path, first)
    manifest = path / "manifests" / run_of(path, second)
    manifest.chmod(0o600)
    manifest.write_bytes(manifest.read_bytes()[:-1] + b"x")
    before = size_of(path)
    with pytest.raises(DamageError, match="nothing was deleted"):
        prune(path)
    assert size_of(path) == before


def test_what_a_vanished_host_left_goes_although_nothing_was_forgotten(path: Path) -> None:
    back_up(path, {n: 100 + n for n in range(5)})
    repository = open_repository(path)
    with RepositoryWriter(repository, HOST) as run:
        store(run, repository, {n: n for n in range(30)})
        run.flush()
    before = size_of(path)
    assert prune(path).state == "nothing"
    assert prune(path, later=7 * 3600).state == "done"
    assert size_of(path) < before - 30 * 1000
    assert len(content_of(path, open_repository(path).backups()[0].backup.id)) == 5


def test_a_twin_of_what_a_damaged_pack_holds_stays(path: Path) -> None:
    first = back_up(path, {n: n for n in range(30)})
    repository = open_repository(path)
    with RepositoryWriter(repository, HOST) as run:
        # The same chunks once more, as a run stores them that has met a blob that does not open.
        repository.bad_ids.update(repository.keys.identify(FrameType.DATA, chunk(n)) for n in range(10))
        second = store(run, repository, {n: n for n in range(10)})()
    third = back_up(path, {n: 60 + n for n in range(10, 30)})
    forget(path, first, second)
    # Everything is to be copied: both twins are marked.
    limits = Limits(dead_percent=-1)
    collector = Collector(
        open_repository(path), map_root, limits, now=lambda: datetime.now(UTC), advance=lambda _: None
    )
    copied = [pack for pack in collector.plan().choice.of("copy") if pack.data]
    counts = [pack for pack in copied if run_of(path, third) not in pack.name]
    assert len(counts) == 2
    flip_a_bit(path / counts[0].name)
    assert prune(path, limits=limits).problems
    assert content_of(path, third) == {n: chunk(n) for n in range(10)} | {
        n: chunk(60 + n) for n in range(10, 30)
    }


def test_a_damaged_pack_is_not_copied(path: Path) -> None:
    first = back_up(path, {n: n for n in range(30)})
    second = back_up(path, {n: 50 + n for n in range(20)})
    forget(path, first)
    biggest = max((path / "packs").rglob("*-*"), key=lambda file: file.stat().st_size)
    flip_a_bit(biggest)
    outcome = prune(path)
    assert any("hash" in problem.brief for problem in outcome.problems)
    assert biggest.exists()
    assert second in {stored.backup.id for stored in open_repository(path).backups()}


def test_a_check_looks_again_when_garbage_goes_meanwhile(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = back_up(path, {n: n for n in range(30)})
    second = back_up(path, {n: 50 + n for n in range(20)})
    repository = open_repository(path)
    checker = Checker(repository, map_root, lambda _: None)
    load, pending = Checker._load_segments, [first]

    def load_late(checker: Checker) -> None:
        if pending:
            forget(path, pending.pop())
            assert prune(path).state == "done"
        load(checker)

    monkeypatch.setattr(Checker, "_load_segments", load_late)
    checker.check_structure()
    checker.check_packs()
    assert checker.result.findings == []
    assert checker.result.backups == 1
    assert len(content_of(path, second)) == 30


def test_a_check_reads_what_collections_left(path: Path) -> None:
    first = back_up(path, {n: n for n in range(30)})
    back_up(path, dict.fromkeys(range(30), 7))
    forget(path, first)
    assert prune(path).state == "done"
    for name in ("condemned", "sweep", "done"):
        found = path / "gc" / "00000001" / name
        kept = found.read_bytes()
        found.chmod(0o600)
        found.write_bytes(kept[:-1] + bytes([kept[-1] ^ 1]))
        checker = Checker(open_repository(path), map_root, lambda _: None)
        checker.check_structure()
        assert [finding.object for finding in checker.result.findings] == [f"gc/00000001/{name}"]
        found.write_bytes(kept)


@pytest.mark.parametrize("given_up", [False, True])
def test_what_was_set_aside_is_no_reason_to_drop_what_a_run_relies_on(path: Path, given_up: bool) -> None:
    first = back_up(path, {n: n for n in range(30)})
    (harmed,) = [pack for pack in (path / "packs").rglob("*-*") if pack.stat().st_size > 20_000]
    repository = open_repository(path)
    lost = repository.keys.identify(FrameType.DATA, chunk(0))
    if given_up:
        # It was lost once, and has turned up in a pack that is whole.
        aside = SetAside(run="1" * 32, time=datetime.now(UTC), lost=(lost.hex(),))
    else:
        flip_a_bit(harmed)
        name = harmed.relative_to(path).as_posix()
        aside = SetAside(run="1" * 32, time=datetime.now(UTC), packs=(name,))
    create_set_aside(repository, aside)
    second = back_up(path, {0: 0, 1: 100})
    back_up(path, {0: 101} if not given_up else {n: 200 + n for n in range(30)})
    forget(path, first, second)
    repository = open_repository(path)
    with RepositoryWriter(repository, HOST) as run:
        # It relies on the only whole copy, which is condemned before it commits.
        commit = store(run, repository, {2: 0})
        assert run.stored.new_chunks == 0
        assert prune(path).state == "waiting"
        condemned = read_epoch(open_repository(path)).condemned
        assert condemned is not None
        fourth = commit()
    assert prune(path).state == "done"
    assert content_of(path, fourth)[2] == chunk(0)


YEAR = timedelta(days=400)


def test_a_clock_that_is_a_year_ahead_lets_no_run_back_in(path: Path) -> None:
    first = back_up(path, {n: n for n in range(30)})
    back_up(path, dict.fromkeys(range(30), 7))
    forget(path, first)
    repository = open_repository(path)
    with RepositoryWriter(repository, HOST) as asleep:
        commit = store(asleep, repository, {n: n for n in range(10)})
        assert prune(path, everybody).state == "done"
        prune(path, later=YEAR.total_seconds())
        with pytest.raises(FencedError):
            commit()


def test_old_fences_go(path: Path) -> None:
    back_up(path, {0: 0})
    repository = open_repository(path)
    old, young = "a" * 32, "b" * 32
    assert fence(repository, old, datetime.now(UTC) - YEAR)
    assert fence(repository, young, datetime.now(UTC) - YEAR / 2)
    # By both clocks: whoever shuts out with a wrong one does not have the fence go at once.
    prune(path)
    assert {old, young} <= settled_runs(repository)
    for run, moment in ((old, datetime.now(UTC) - YEAR), (young, datetime.now(UTC) - YEAR / 2)):
        os.utime(path / "manifests" / run, (moment.timestamp(), moment.timestamp()))
    prune(path)
    there = settled_runs(repository)
    assert (old in there, young in there) == (False, True)


@pytest.mark.parametrize("clock", ["_began", "_began_on"])
def test_a_collector_that_slept_for_a_year_decides_nothing(path: Path, clock: str) -> None:
    first = back_up(path, {n: n for n in range(30)})
    back_up(path, dict.fromkeys(range(30), 7))
    forget(path, first)
    with RepositoryWriter(open_repository(path), HOST):
        assert prune(path).state == "waiting"
    repository = open_repository(path)
    collector = Collector(
        repository, map_root, Limits(), now=lambda: datetime.now(UTC), advance=lambda _: None
    )
    with RepositoryWriter(repository, HOST, collects=True) as run:
        setattr(run, clock, getattr(run, clock) - YEAR.total_seconds())
        with pytest.raises(FencedError):
            collector.collect(run, everybody)
        with pytest.raises(FencedError):
            run.commit(lambda _: manifest_of(run, map_root(newest(repository).map), None))
    assert read_epoch(repository).sweep is None


def newest(repository: Repository) -> Backup:
    found = newest_of(repository.backups(), "v")
    assert found is not None
    return found


def test_a_check_beside_a_collection_takes_nothing_for_damage(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Records go at the end of a prune that has nothing to collect, so nothing in gc/ tells of it."""
    for number in range(3):
        back_up(path, {number: number})
    repository = open_repository(path)
    listing, states = repository.backend.list, []

    def list_objects(prefix: str) -> Iterator[ObjectInfo]:
        found = list(listing(prefix))
        if prefix == "writers/" and not states:
            states.append("begun")
            states.append(prune(path).state)
        return iter(found)

    monkeypatch.setattr(repository.backend, "list", list_objects)
    checker = Checker(repository, map_root, lambda _: None, level=2)
    checker.check_structure()
    assert states == ["begun", "nothing"]
    assert not checker.result.damaged
