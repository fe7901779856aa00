"""A check names the backup whose map is false, and not the one whose nodes and chunks it leads to."""

from __future__ import annotations

from pathlib import Path

import pytest

from blocksnap.operations.catalogue import map_root
from blocksnap.operations.losses import current_losses
from blocksnap.operations.repair import RepairOptions, repair
from blocksnap.operations.reporting import Quiet
from blocksnap.repository.blockmap import HOLE, MapRoot, encode_node
from blocksnap.repository.check import Checker
from blocksnap.repository.documents import Inodes
from blocksnap.repository.frame import FrameType
from blocksnap.repository.index import encode_rows, segment_name
from blocksnap.repository.keys import KeyRing, Role
from blocksnap.repository.marking import TRUSTED, Marker, mistaken_backups
from blocksnap.repository.nodes import NodeLoader
from blocksnap.repository.numbered import NumberedIndex
from blocksnap.repository.repair_plan import Planner
from blocksnap.repository.repository import Repository
from support.inode_trees import Node, chunk, store_tree
from support.repositories import make_repository, open_repository, open_writer
from support.shared_maps import commit_map, lose_data, store_shared_map


@pytest.fixture
def path(tmp_path: Path) -> Path:
    make_repository(tmp_path / "repository")
    return tmp_path / "repository"


@pytest.fixture(params=[Role.ADMIN, Role.BACKUP])
def role(request: pytest.FixtureRequest) -> Role:
    role: Role = request.param
    return role


def store_volume(path: Path) -> tuple[str, MapRoot]:
    """Store a volume that is whole; return its id and its map."""
    with open_writer(open_repository(path)) as run:
        entries = [run.store_blob(FrameType.DATA, chunk(seed)) for seed in range(4)]
        root = store_shared_map(run, [*entries, *[HOLE] * 60], 2)
        return commit_map(run, root, "true"), root


def named_by_a_check(path: Path, role: Role) -> set[str]:
    """Return the backups, by what their ids begin with, of which a check tells anything."""
    repository = open_repository(path)
    held = repository.keys.held_by(role)
    repository.keys = KeyRing.of_role(role, held, repository_id=repository.keys.repository_id)
    checker = Checker(repository, map_root, lambda _: None, level=2)
    checker.check_structure()
    checker.name_losses()
    assert checker.result.damaged
    assert {loss.backup[:8] for loss in checker.result.losses} <= {
        each.object[7:15] for each in checker.result.findings
    }
    names = (finding.object for finding in checker.result.findings)
    return {name[7:15] for name in names if name.startswith("backup ")}


@pytest.mark.parametrize("deeper", [-1, 1])
def test_the_root_of_another_map_at_another_level(path: Path, role: Role, deeper: int) -> None:
    _, root = store_volume(path)
    with open_writer(open_repository(path)) as run:
        wrong = commit_map(run, MapRoot(root.levels + deeper, root.entry), "false")
    assert named_by_a_check(path, role) == {wrong[:8]}
    plan = Planner(open_repository(path), map_root).plan()
    assert not plan.lost
    assert not plan.harmed


def test_a_node_of_another_map_at_another_level(path: Path, role: Role) -> None:
    _, root = store_volume(path)
    with open_writer(open_repository(path)) as run:
        id_ = run.store_node(encode_node(2, [root.entry, *[HOLE] * 63]))
        top = run.store_node(encode_node(3, [id_, root.entry, *[HOLE] * 62]))
        wrong = commit_map(run, MapRoot(4, top), "false")
    assert named_by_a_check(path, role) == {wrong[:8]}


def test_the_map_of_a_subvolume_as_that_of_a_volume(path: Path, role: Role) -> None:
    repository = open_repository(path)
    with open_writer(repository) as run:
        store_tree(run, repository, {256: Node({0: 1}, 1)})()
    root = map_root(open_repository(path).backups()[0].backup.map)
    with open_writer(open_repository(path)) as run:
        wrong = commit_map(run, root, "false")
    assert named_by_a_check(path, role) == {wrong[:8]}


def test_the_map_of_a_volume_as_that_of_a_subvolume(path: Path, role: Role) -> None:
    _, root = store_volume(path)
    with open_writer(open_repository(path)) as run:
        wrong = commit_map(run, root, "false", inodes=Inodes(pages=root.capacity, count=1))
    assert named_by_a_check(path, role) == {wrong[:8]}


def test_the_map_of_a_volume_as_what_was_mapped(path: Path, role: Role) -> None:
    _, root = store_volume(path)
    with open_writer(open_repository(path)) as run:
        wrong = commit_map(run, MapRoot(1, HOLE), "false", mapped=root)
    assert named_by_a_check(path, role) == {wrong[:8]}


@pytest.mark.parametrize("places", [[0, 1], [5000, 5001]], ids=["within", "behind the end"])
def test_a_chunk_as_a_node(path: Path, role: Role, places: list[int]) -> None:
    _, root = store_volume(path)
    with open_writer(open_repository(path)) as run:
        entries = [HOLE] * 64
        for place in places:
            entries[place // 4096] = run.identify(FrameType.DATA, chunk(1))
        top = run.store_node(encode_node(2, entries))
        wrong = commit_map(run, MapRoot(3, top), "false", chunks=4096)
    assert root.levels == 2
    assert named_by_a_check(path, role) == {wrong[:8]}


@pytest.mark.parametrize(("wrong", "most"), [([], 1), ([0], 15), ([77], 15), ([3, 40, 41, 99], 50)])
def test_what_many_share_is_not_walked_for_each_of_them(path: Path, wrong: list[int], most: int) -> None:
    _, root = store_volume(path)
    with open_writer(open_repository(path)) as run:
        commit_map(run, MapRoot(1, root.entry), "false")
    repository = open_repository(path)
    repository.refresh_index()
    index = NumberedIndex(repository.index.views)
    false, true = sorted((each.backup for each in repository.backups()), key=lambda each: each.volume.name)
    backups = [(false if at in wrong else true).model_copy(update={"id": f"{at:032x}"}) for at in range(100)]
    walks: list[Marker] = []

    def new_marker() -> Marker:
        walks.append(Marker(index, [TRUSTED] * len(index.packs), NodeLoader(repository)))
        return walks[-1]

    assert list(mistaken_backups(backups, new_marker, map_root)) == [backups[at] for at in wrong]
    assert len(walks) <= most


def harm(path: Path, id_: bytes) -> frozenset[str]:
    """Flip a bit of a frame that has an id; return the pack it is in."""
    repository = open_repository(path)
    repository.refresh_index()
    at = repository.index.find(id_)
    assert at is not None
    pack = path / at.pack.name
    content = bytearray(pack.read_bytes())
    content[at.offset + at.length // 2] ^= 1
    pack.chmod(0o600)
    pack.write_bytes(content)
    return frozenset([at.pack.name])


@pytest.mark.parametrize("levels", [1, 3], ids=["false first", "true first"])
@pytest.mark.parametrize("what", ["chunk", "node"])
def test_what_a_false_map_leads_to_is_lost_all_the_same(path: Path, what: str, levels: int) -> None:
    true, root = store_volume(path)
    with open_writer(open_repository(path)) as run:
        id_ = run.identify(FrameType.DATA, chunk(1)) if what == "chunk" else root.entry
        # Maps with fewer levels are walked first, and nodes come before what they lead to.
        if what == "node":
            wrong = store_shared_map(run, [id_] * 64, levels)
        elif levels == 1:
            wrong = MapRoot(1, id_)
        else:
            wrong = MapRoot(levels, run.store_node(encode_node(levels - 1, [id_, *[HOLE] * 63])))
        commit_map(run, wrong, "false")
    suspects = harm(path, id_)
    plan = Planner(open_repository(path), map_root, suspects).plan()
    assert plan.lost == {id_}
    assert not plan.is_whole
    assert true in {each.backup for each in plan.harmed}
    done = repair(open_repository(path), suspects, RepairOptions(), Quiet())
    assert not done.plan.is_whole
    repository = open_repository(path)
    (backup,) = (each.backup for each in repository.backups() if each.backup.id == true)
    assert current_losses(repository, backup).total_bytes > 0


@pytest.mark.parametrize("first", [bytes(16), b"\xff" * 16])
def test_a_chunk_that_a_row_calls_a_node(path: Path, first: bytes) -> None:
    store_volume(path)
    repository = open_repository(path)
    repository.refresh_index()
    with open_writer(repository) as run:
        id_ = run.identify(FrameType.DATA, chunk(1))
        at = repository.index.find(id_)
        assert at is not None
        pack = [(at.pack, (path / at.pack.name).stat().st_size)]
        rows = encode_rows([(id_, 0, at.offset, at.length, FrameType.NODE)], pack, repository.keys.index_key)
        repository.backend.put(segment_name(0, first, 0), rows)
        wrong = commit_map(run, MapRoot(1, id_), "false")
    assert named_by_a_check(path, Role.ADMIN) == {wrong[:8]}


def test_a_harmed_chunk_that_is_whole_elsewhere_has_no_map_walked(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store_volume(path)
    with open_writer(open_repository(path)) as run:
        id_ = run.identify(FrameType.DATA, chunk(1))
        run.store_again(FrameType.DATA, id_, chunk(1))
        commit_map(run, MapRoot(1, HOLE), "second")
    harm(path, id_)
    checker = Checker(open_repository(path), map_root, lambda _: None)
    checker.check_structure()
    checker.check_packs()
    assert checker.result.bad_ids == {id_}
    loads: list[bytes] = []
    monkeypatch.setattr(Repository, "load_node", lambda _, node: loads.append(node))
    checker.name_losses()
    assert not loads
    assert not checker.result.losses


def test_all_that_need_what_is_gone_are_named(path: Path, role: Role) -> None:
    true, root = store_volume(path)
    with open_writer(open_repository(path)) as run:
        second = commit_map(run, root, "second")
    with open_writer(open_repository(path)) as run:
        commit_map(run, MapRoot(1, HOLE), "third")
    lose_data(path)
    assert named_by_a_check(path, role) == {true[:8], second[:8]}
