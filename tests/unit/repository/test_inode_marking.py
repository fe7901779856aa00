"""Nothing that an inode record leads to is ever garbage: marking, collecting and checking nested maps."""

from __future__ import annotations

import random
import stat
from datetime import UTC, datetime
from pathlib import Path

import pytest

from blocksnap.errors import DamageError
from blocksnap.operations.catalogue import map_root
from blocksnap.repository.blockmap import FANOUT, decode_node
from blocksnap.repository.check import Checker
from blocksnap.repository.collector import Collector, Outcome
from blocksnap.repository.documents import Forgotten, WriterRecord
from blocksnap.repository.epochs import create_forgotten
from blocksnap.repository.frame import FrameType
from blocksnap.repository.inodes import page_references
from blocksnap.repository.listings import DirectoryEntry
from blocksnap.repository.marking import TRUSTED, Marker, mark_backups
from blocksnap.repository.nodes import NodeLoader
from blocksnap.repository.numbered import NumberedIndex
from blocksnap.repository.repair_plan import Planner
from blocksnap.repository.repository import Repository
from blocksnap.repository.victims import Limits
from blocksnap.repository.writer import Author, RepositoryWriter
from support.inode_trees import Node, read_tree, store_tree
from support.repositories import make_repository, open_repository

HOST = Author("host", "host.example", pid=1, boot="b", started=1)
EAGER = Limits(dead_percent=0.0)


def everybody(_: WriterRecord) -> bool:
    return True


@pytest.fixture
def path(tmp_path: Path) -> Path:
    make_repository(tmp_path / "repository", encrypted=False)
    return tmp_path / "repository"


def back_up(path: Path, changes: dict[int, Node | None]) -> str:
    repository = open_repository(path)
    with RepositoryWriter(repository, HOST) as run:
        return store_tree(run, repository, changes)()


def forget(path: Path, *ids: str) -> None:
    run = random.randbytes(16).hex()
    create_forgotten(open_repository(path), Forgotten(run=run, time=datetime.now(UTC), backups=ids))


def prune(path: Path) -> Outcome:
    repository = open_repository(path)
    collector = Collector(repository, map_root, EAGER, now=lambda: datetime.now(UTC), advance=lambda _: None)
    with RepositoryWriter(repository, HOST, collects=True) as run:
        return collector.collect(run, lambda _: False)


def file(*seeds: int, places: int = 0) -> Node:
    return Node(dict(enumerate(seeds)), max(places, len(seeds)))


def directory(*names: str, step: int = 1) -> Node:
    entries = (DirectoryEntry(name.encode(), 300 + at, 1, 2 + at * step) for at, name in enumerate(names))
    return Node(names=tuple(entries), kind=stat.S_IFDIR)


def everything() -> dict[int, Node | None]:
    """Every way in which a record can refer to something."""
    return {
        256: directory(*(f"{number:040}" for number in range(300)), step=3),
        257: file(1),
        258: file(2, 3),
        259: Node({0: 4, 70: 5, 4000: 6}, 5000),
        260: Node(xattrs=((b"user.large", b"x" * 5000), (b"user.small", b"y"))),
        261: Node(detail=bytes(range(256)) * 300),
        262: Node(detail=b"t" * 3000, kind=stat.S_IFLNK),
        263: Node(kind=stat.S_IFBLK),
        264: Node({}, 3),
        5000: file(7, 8, 9),
    }


def reachable(repository: Repository) -> set[bytes]:
    """Walk everything by other means than those of the marker."""
    found: set[bytes] = set()

    def walk(entry: bytes, level: int, leaf: FrameType) -> None:
        if len(entry) != 32:
            return
        found.add(entry)
        if level >= 0:
            plain = repository.load_node(entry)
            for child in decode_node(plain, level=level, where="test"):
                walk(child, level - 1, leaf)
        elif leaf == FrameType.INODES:
            for each in page_references(repository.load(FrameType.INODES, entry), "test"):
                walk(each.root.entry, each.root.levels - 1, each.leaf)

    for stored in repository.backups():
        root = map_root(stored.backup.map)
        walk(root.entry, root.levels - 1, FrameType.INODES)
    return found


def marked(repository: Repository) -> set[bytes]:
    repository.refresh_index()
    index = NumberedIndex(repository.index.views)
    marker = Marker(index, [TRUSTED] * len(index.packs), NodeLoader(repository))
    mark_backups(marker, [stored.backup for stored in repository.backups()], map_root)
    assert not marker.lost
    return {id_ for id_, number, *_ in index.entries() if marker.is_marked(number)}


def test_everything_that_a_record_refers_to_is_marked(path: Path) -> None:
    id_ = back_up(path, everything())
    repository = open_repository(path)
    types = {row[5] for row in NumberedIndex(_views(repository)).entries()}
    assert types == {FrameType.DATA, FrameType.NODE, FrameType.ATTACHMENT, FrameType.INODES}
    assert marked(repository) == reachable(repository)
    assert marked(repository) == {row[0] for row in NumberedIndex(_views(repository)).entries()}
    assert read_tree(path, id_) == everything()


def _views(repository: Repository):  # type: ignore[no-untyped-def] # noqa: ANN202
    repository.refresh_index()
    return repository.index.views


@pytest.mark.parametrize("seed", range(2))
def test_random_histories_are_collected_and_stay_whole(path: Path, seed: int) -> None:
    rng = random.Random(seed)
    models: dict[str, dict[int, Node]] = {}
    model: dict[int, Node] = {}
    for step in range(7):
        changes = _random_changes(rng) if step else everything()
        model = {**model, **{n: node for n, node in changes.items() if node is not None}}
        for number in (n for n, node in changes.items() if node is None):
            model.pop(number, None)
        models[back_up(path, changes)] = model
        if step and rng.random() < 0.7 and len(models) > 2:
            gone = rng.choice(list(models)[:-1])
            del models[gone]
            forget(path, gone)
            assert prune(path).state in ("done", "nothing")
            repository = open_repository(path)
            assert marked(repository) == reachable(repository)
        for id_, expected in models.items():
            assert read_tree(path, id_) == expected
    checker = Checker(open_repository(path), map_root, lambda _: None)
    checker.check_structure()
    checker.check_packs()
    assert [f for f in checker.result.findings if f.severity != "garbage"] == []
    forget(path, *list(models)[:-1])
    assert prune(path).state in ("done", "nothing")
    last = list(models)[-1]
    assert read_tree(path, last) == models[last]
    repository = open_repository(path)
    there = {row[0] for row in NumberedIndex(_views(repository)).entries()}
    assert there == reachable(repository), "what nobody needs is gone, and nothing else"


def _random_changes(rng: random.Random) -> dict[int, Node | None]:
    changes: dict[int, Node | None] = {}
    for _ in range(rng.randrange(1, 6)):
        number = rng.choice([257, 258, 259, 260, 261, 300, 5000, 9000])
        changes[number] = rng.choice(
            [
                None,
                file(*(rng.randrange(40) for _ in range(rng.choice([0, 1, 2, 70])))),
                Node({rng.randrange(200): rng.randrange(40)}, 200),
                Node(xattrs=((b"user.a", rng.randbytes(2000)),)),
                Node(detail=rng.randbytes(rng.choice([10, 70_000]))),
                directory(*(f"{rng.randrange(1 << 60):040}-{n}" for n in range(rng.choice([1, 100])))),
            ]
        )
    return changes


def _relies_on_the_condemned(path: Path, changes: dict[int, Node | None]) -> None:
    """A run at work uses chunks, blocks and nodes that only a forgotten backup has: they stay."""
    first = back_up(path, everything())
    second = back_up(path, {number: None for number in everything() if number != 263})
    forget(path, first)
    repository = open_repository(path)
    with RepositoryWriter(repository, HOST) as run:
        commit = store_tree(run, repository, changes)
        assert run.stored.new_chunks == 0
        assert prune(path).state == "waiting"
        third = commit()
    assert prune(path).state == "done"
    expected = {263: Node(kind=stat.S_IFBLK), **{n: node for n, node in changes.items() if node}}
    assert read_tree(path, third) == expected
    assert read_tree(path, second) == {263: Node(kind=stat.S_IFBLK)}
    assert marked(open_repository(path)) == reachable(open_repository(path))


@pytest.mark.parametrize("number", sorted(everything()))
def test_what_a_run_at_work_found_stays(path: Path, number: int) -> None:
    _relies_on_the_condemned(path, {number: everything()[number]})


def test_what_changed_in_a_file_since_it_was_marked_stays(path: Path) -> None:
    """The difference between two pages is followed into the maps of their files."""
    base = {n: n % 40 for n in range(FANOUT * 3)}
    back_up(path, {257: Node(base, len(base)), 258: file(1)})
    first = back_up(path, {257: Node({**base, 100: 50}, len(base))})
    back_up(path, {257: Node(base, len(base))})
    forget(path, first)
    repository = open_repository(path)
    with RepositoryWriter(repository, HOST) as run:
        changes: dict[int, Node | None] = {257: Node({**base, 100: 50}, len(base))}
        commit = store_tree(run, repository, changes)
        assert run.stored.new_chunks == 0
        assert prune(path).state == "waiting"
        third = commit()
    assert prune(path).state == "done"
    assert read_tree(path, third) == {**changes, 258: file(1)}


def _damaged(path: Path, kind: FrameType) -> None:
    """Harm one frame of a type in its pack."""
    repository = open_repository(path)
    row = next(row for row in NumberedIndex(_views(repository)).entries() if row[5] == kind)
    index = NumberedIndex(_views(repository))
    pack = path / index.packs[row[2]].name
    data = bytearray(pack.read_bytes())
    data[row[3] + 100] ^= 1
    pack.chmod(0o600)
    pack.write_bytes(data)


@pytest.mark.parametrize("kind", [FrameType.DATA, FrameType.NODE, FrameType.ATTACHMENT, FrameType.INODES])
def test_a_check_and_a_repair_name_what_damage_takes(path: Path, kind: FrameType) -> None:
    id_ = back_up(path, everything())
    _damaged(path, kind)
    checker = Checker(open_repository(path), map_root, lambda _: None)
    checker.check_structure()
    checker.check_packs()
    checker.name_losses()
    assert checker.result.losses
    assert {loss.backup for loss in checker.result.losses} == {id_}
    assert all(loss.inode or not loss.length for loss in checker.result.losses)
    suspects = [finding.object for finding in checker.result.findings if finding.object.startswith("packs/")]
    plan = Planner(open_repository(path), map_root, suspects).plan()
    assert plan.losses == tuple(checker.result.losses)


@pytest.mark.parametrize("kind", [FrameType.NODE, FrameType.INODES])
def test_nothing_is_collected_while_inodes_cannot_be_read(path: Path, kind: FrameType) -> None:
    back_up(path, everything())
    _damaged(path, kind)
    before = sorted((path / "packs").rglob("*-*"))
    with pytest.raises(DamageError):
        prune(path)
    assert sorted((path / "packs").rglob("*-*")) == before
