"""A check names the backup whose map is false, and not the one whose nodes and chunks it leads to."""

from __future__ import annotations

from pathlib import Path

import pytest

from blocksnap.operations.catalogue import map_root
from blocksnap.repository.blockmap import HOLE, MapRoot, encode_node
from blocksnap.repository.check import Checker
from blocksnap.repository.documents import Inodes
from blocksnap.repository.frame import FrameType
from blocksnap.repository.keys import KeyRing, Role
from blocksnap.repository.repair_plan import Planner
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


def test_all_that_need_what_is_gone_are_named(path: Path, role: Role) -> None:
    true, root = store_volume(path)
    with open_writer(open_repository(path)) as run:
        second = commit_map(run, root, "second")
    with open_writer(open_repository(path)) as run:
        commit_map(run, MapRoot(1, HOLE), "third")
    lose_data(path)
    assert named_by_a_check(path, role) == {true[:8], second[:8]}
