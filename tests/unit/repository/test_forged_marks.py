"""What somebody with a stolen key adds has no collection delete what others need."""

from __future__ import annotations

import errno
import itertools
import os
import threading
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from blocksnap.backends.base import Buffer
from blocksnap.backends.errors import BackendFailedError
from blocksnap.backends.local import LocalBackend
from blocksnap.errors import DamageError
from blocksnap.operations.catalogue import map_root
from blocksnap.repository import writer as writing
from blocksnap.repository.blockmap import MapReader
from blocksnap.repository.check import Checker
from blocksnap.repository.collector import Collector, Outcome
from blocksnap.repository.documents import Backup, Forgotten, Manifest, VolumeRecord, WriterRecord
from blocksnap.repository.epochs import create_forgotten
from blocksnap.repository.fencing import SILENCE, is_silent, read_runs
from blocksnap.repository.frame import FrameHeader, FrameType, Sealer
from blocksnap.repository.index import ROW, encode_rows, encode_sorted, segment_name
from blocksnap.repository.keys import KeyRing, Role
from blocksnap.repository.marking import TRUSTED, Marker
from blocksnap.repository.nodes import NodeLoader
from blocksnap.repository.numbered import NumberedIndex
from blocksnap.repository.pack import PackWriter
from blocksnap.repository.repair_plan import Planner
from blocksnap.repository.repository import Repository
from blocksnap.repository.victims import Limits
from blocksnap.repository.writer import Author, RepositoryWriter
from support.inode_trees import NOTHING, Node, chunk, read_tree, store_tree
from support.repositories import CHUNK, PASSPHRASE, make_repository, open_repository

HOST = Author("host", "host.example", pid=1, boot="b", started=1)
NODES = {256 + at * 16: Node({place: (at * 7 + place) % 60 for place in range(5)}, 5) for at in range(30)}
Row = tuple[bytes, int, int, int, int]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    make_repository(tmp_path / "repository")
    return tmp_path / "repository"


def with_role(path: Path, role: Role) -> Repository:
    repository = open_repository(path)
    held = repository.keys.held_by(role)
    repository.keys = KeyRing.of_role(role, held, repository_id=repository.keys.repository_id)
    return repository


def store_victim(path: Path) -> str:
    repository = open_repository(path)
    with RepositoryWriter(repository, HOST) as run:
        return store_tree(run, repository, NODES)()


def backup_of(repository: Repository) -> Backup:
    return next(stored.backup for stored in repository.backups())


def numbered(repository: Repository) -> NumberedIndex:
    repository.refresh_index()
    return NumberedIndex(repository.index.views)


def prune(path: Path, limits: Limits | None = None) -> Outcome:
    repository = open_repository(path)
    collector = Collector(
        repository, map_root, limits or Limits(), now=lambda: datetime.now(UTC), advance=lambda _: None
    )
    with RepositoryWriter(repository, HOST, collects=True) as run:
        return collector.collect(run, lambda _: False)


def forge_rows(path: Path, repository: Repository, first: bytes, as_data: FrameType | None = None) -> None:
    """List every id that there is in another pack, too; ``first`` is the writer that the segment names.

    Or list only those of one type, as data.
    """
    index = numbered(repository)
    entries = list(index.entries())
    pack = entries[0][2]
    at = next(entry for entry in entries if entry[2] == pack)
    rows = [
        (id_, 0, at[3], at[4], kind if as_data is None else FrameType.DATA)
        for id_, _, _, _, _, kind in entries
        if (id_ != at[0] if as_data is None else kind == as_data)
    ]
    where = [(index.packs[pack], index.sizes[pack])]
    LocalBackend(str(path)).put(
        segment_name(0, first, 0), encode_rows(rows, where, repository.keys.index_key)
    )


@pytest.mark.parametrize("first", [bytes(16), b"\xff" * 16])
@pytest.mark.parametrize("role", [Role.RESTORE, Role.GC])
def test_forged_rows_take_nothing_from_those_that_are_true(path: Path, role: Role, first: bytes) -> None:
    victim = store_victim(path)
    repository = with_role(path, role)
    forge_rows(path, repository, first)
    packs = sorted((path / "packs").rglob("*-*"))
    assert prune(path).sweep is None
    assert sorted((path / "packs").rglob("*-*")) == packs
    assert read_tree(path, victim) == NODES


def test_every_row_of_a_needed_id_is_marked(path: Path) -> None:
    store_victim(path)
    repository = open_repository(path)
    forge_rows(path, repository, bytes(16))
    index = numbered(repository)
    marker = Marker(index, [TRUSTED] * len(index.packs), NodeLoader(repository))
    backup = backup_of(repository)
    marker.mark([map_root(backup.map)], FrameType.INODES)
    needed = {id_ for id_, number, *_ in index.entries() if marker.is_marked(number)}
    assert needed
    assert all(marker.is_marked(number) for id_, number, *_ in index.entries() if id_ in needed)


def forge_pack(path: Path, repository: Repository) -> None:
    """Store frames with the headers of the true ones and nothing in them, listed as theirs."""
    index = numbered(repository)
    owner = next(stored.manifest.writer for stored in repository.backups())
    packs = PackWriter(repository.backend, repository.keys, bytes.fromhex(owner))
    rows: list[Row] = []
    for id_, _, pack, offset, length, kind in index.entries():
        frame = memoryview(bytearray(length))
        repository.read_range(index.packs[pack].name, offset, frame)
        header = FrameHeader.parse(frame, where="test")
        frame[-16:] = bytes(16)
        rows.append((id_, 0, packs.size, length, kind))
        packs.add(frame, id_=id_, kind=FrameType(kind), plain_length=header.plain_length)
    sealed = packs.seal()
    data = encode_rows(rows, [(sealed.id, sealed.size)], repository.keys.index_key)
    LocalBackend(str(path)).put(segment_name(0, bytes(16), 0), data)


@pytest.mark.parametrize("role", [Role.GC, Role.ADMIN])
def test_what_is_copied_is_not_the_forged_frame_instead_of_the_true_one(path: Path, role: Role) -> None:
    victim = store_victim(path)
    forge_pack(path, open_repository(path))
    repository = with_role(path, role)
    collector = Collector(
        repository, map_root, Limits(dead_percent=-1.0), now=lambda: datetime.now(UTC), advance=lambda _: None
    )
    with RepositoryWriter(repository, HOST, collects=True) as run:
        outcome = collector.collect(run, lambda _: False)
    assert outcome.sweep is not None
    assert outcome.sweep.packs
    assert read_tree(path, victim) == NODES


def test_what_is_twice_and_opens_is_copied_once(path: Path) -> None:
    victim = store_victim(path)
    repository = open_repository(path)
    with RepositoryWriter(repository, HOST) as run:
        for seed in {seed for node in NODES.values() for seed in node.chunks.values()}:
            run.store_again(FrameType.DATA, run.identify(FrameType.DATA, chunk(seed)), chunk(seed))
        run.flush()
        backup = backup_of(repository)
        run.commit(lambda _: bogus(run, backup, map_root(backup.map).levels, inodes=True))
    prune(path, Limits(dead_percent=-1.0))
    index = numbered(open_repository(path))
    ids = [id_ for id_, _, _, _, _, kind in index.entries() if kind == FrameType.DATA]
    assert len(ids) == len(set(ids)) > 0
    assert read_tree(path, victim) == NODES


def bogus(run: RepositoryWriter, victim: Backup, levels: int, *, inodes: bool = False) -> Manifest:
    """Make a backup of a volume whose map is that of the inodes of another host's subvolume."""
    now = datetime.now(UTC)
    backup = Backup(
        id=run.backup_id(0), volume=VolumeRecord(name="x", key="x", kind="file"), time=now, kind="full",
        parent=None, method="compare", reason="t", size=victim.size if inodes else 64**levels * CHUNK,
        chunk_size=CHUNK, map=victim.map.model_copy(update={"levels": levels}),
        inodes=victim.inodes if inodes else None, source={}, statistics=NOTHING,
    )  # fmt: skip
    return Manifest(writer=run.id.hex(), time=now, host="h", hostname="h", program="p", backups=(backup,))


def commit_bogus(path: Path, *, forges: bool, deeper: int = 0) -> str:
    repository = with_role(path, Role.BACKUP)
    victim = backup_of(repository)
    if forges:
        forge_rows(path, repository, bytes(16), FrameType.INODES)
    with RepositoryWriter(repository, HOST) as run:
        run.commit(lambda _: bogus(run, victim, victim.map.levels + deeper))
        return run.backup_id(0)


def forget(path: Path, id_: str) -> None:
    run = os.urandom(16).hex()
    create_forgotten(open_repository(path), Forgotten(run=run, time=datetime.now(UTC), backups=(id_,)))


@pytest.mark.parametrize("deeper", [0, 1, 2])
def test_a_map_that_leads_to_what_is_something_else_is_named_and_no_loss(path: Path, deeper: int) -> None:
    victim = store_victim(path)
    wrong = commit_bogus(path, forges=False, deeper=deeper)
    with pytest.raises(DamageError) as caught:
        prune(path)
    assert f"{wrong[:8]} of x" in caught.value.brief
    assert victim[:8] not in caught.value.brief
    plan = Planner(open_repository(path), map_root).plan()
    assert not plan.lost
    assert not plan.harmed
    forget(path, wrong)
    assert prune(path).state == "done"
    assert read_tree(path, victim) == NODES


def test_what_was_entered_as_something_else_is_entered_all_the_same(path: Path) -> None:
    victim = store_victim(path)
    commit_bogus(path, forges=True)
    prune(path)
    assert read_tree(path, victim) == NODES


@pytest.mark.parametrize("wrong_first", [True, False])
def test_a_node_that_is_needed_at_another_level_is_entered_at_its_own(
    path: Path, *, wrong_first: bool
) -> None:
    victim = store_victim(path)
    repository = open_repository(path)
    index = numbered(repository)
    root = map_root(backup_of(repository).map)
    marker = Marker(index, [TRUSTED] * len(index.packs), NodeLoader(repository))
    wrong = type(root)(root.levels + 1, root.entry)
    for leaf, each in itertools.product(
        (FrameType.INODES, FrameType.DATA), (wrong, root) if wrong_first else (root, wrong)
    ):
        marker.mark([each], leaf)
    assert root.entry in marker.mistaken
    assert root.entry not in marker.lost
    reader = MapReader(repository.load_node)
    pages = [entry for _, _, entry in reader.runs(root, 0, root.capacity) if len(entry) == 32]
    assert pages
    assert all(marker.is_marked(row.number) for page in pages for row in index.find(page))
    assert read_tree(path, victim) == NODES


def test_a_backup_under_the_id_of_another_runs_is_damage(path: Path) -> None:
    victim = store_victim(path)
    repository = with_role(path, Role.BACKUP)
    with RepositoryWriter(repository, HOST) as run:
        manifest = bogus(run, backup_of(repository), 3)
        stolen = manifest.backups[0].model_copy(update={"id": victim})
        run.commit(lambda _: manifest.model_copy(update={"backups": (stolen,)}))
    seen = open_repository(path)
    assert [stored.backup.volume.name for stored in seen.backups()] == ["tree"]
    assert ["id of another run" in problem.brief for problem in seen.damage] == [True]


@pytest.mark.parametrize(
    ("ids", "ordinal", "packs"), [((0, 1), 7, 0), ((0, 1), 1, 1), ((1, 0), 0, 1)], ids=["no", "few", "order"]
)
def test_a_segment_that_contradicts_itself_costs_no_more_than_damage(
    path: Path, ids: tuple[int, ...], ordinal: int, packs: int
) -> None:
    victim = store_victim(path)
    repository = open_repository(path)
    index = numbered(repository)
    rows = [ROW.pack(bytes([id_]) * 32, ordinal, 64, 100 | 1 << 24) for id_ in ids]
    known = [(index.packs[0], index.sizes[0])] * packs
    name = segment_name(0, bytes(16), 0)
    repository.backend.put(name, encode_sorted(rows, known, repository.keys.index_key))
    assert read_tree(path, victim) == NODES
    seen = open_repository(path)
    plan = Planner(seen, map_root).plan()
    assert [segment.name for segment in plan.segments] == [name]
    assert plan.is_whole
    checker = Checker(open_repository(path), map_root, lambda _: None)
    checker.check_structure()
    assert name in {finding.object for finding in checker.result.findings}
    with RepositoryWriter(open_repository(path), HOST) as run:
        assert run.store_blob(FrameType.DATA, b"more")


@pytest.mark.parametrize("time", ["2026-01-01T00:00:00", "0001-01-01T00:00:00+14:00", "9999-12-31T23:59:00Z"])
def test_a_time_that_cannot_be_reckoned_with_is_damage(path: Path, time: str) -> None:
    store_victim(path)
    repository = open_repository(path)
    with RepositoryWriter(repository, HOST) as run:
        manifest = bogus(run, backup_of(repository), 3)
        when = datetime.fromisoformat(time)
        wrong = manifest.backups[0].model_copy(update={"time": when})
        run.commit(lambda _: manifest.model_copy(update={"backups": (wrong,)}))
    record = WriterRecord(writer="a" * 32, sequence=0, host="h", hostname="h", pid=1, time=datetime.now(UTC))
    plain = record.model_copy(update={"time": when}).model_dump_json().encode()
    repository.backend.put(f"writers/{'a' * 32}.0", Sealer(repository.keys).seal(FrameType.WRITER, plain))
    seen = open_repository(path)
    assert len(seen.backups()) == 1
    assert len(seen.damage) == 1
    assert read_runs(seen)["a" * 32].record is None


def test_a_record_of_a_clock_that_was_wrong_does_not_last_for_ever(path: Path) -> None:
    repository = open_repository(path)
    now = datetime.now(UTC)
    record = WriterRecord(
        writer="a" * 32, sequence=0, host="h", hostname="h", pid=1, time=datetime(2099, 1, 1, tzinfo=UTC)
    )
    name = f"writers/{'a' * 32}.0"
    sealed = Sealer(repository.keys).seal(FrameType.WRITER, record.model_dump_json().encode())
    repository.backend.put(name, sealed)
    run = read_runs(repository)["a" * 32]
    assert not is_silent(run, now, lambda _: False)
    assert is_silent(run, now + SILENCE + timedelta(minutes=1), lambda _: False)


def test_a_beat_that_failed_after_it_was_made_is_not_the_last(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writing, "HEARTBEAT_SECONDS", 0.01)
    beaten = threading.Event()

    class Ambiguous(LocalBackend):
        def put(self, name: str, data: Buffer) -> None:
            super().put(name, data)
            if name.endswith(".1"):
                raise BackendFailedError("create", self.place, OSError(errno.EIO, ""))
            if name.endswith(".3"):
                beaten.set()

    with RepositoryWriter(Repository.open(Ambiguous(str(path)), lambda: PASSPHRASE), HOST):
        assert beaten.wait(30)
