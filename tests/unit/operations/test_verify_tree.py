"""A backup of a subvolume that is read as a whole: what is found, and that it has an end."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest

from blocksnap.operations.catalogue import find_backup
from blocksnap.operations.reporting import Quiet
from blocksnap.operations.verify_tree import UnreadableInodeError, verify_tree_backup
from blocksnap.repository.documents import Inodes
from blocksnap.repository.listings import DirectoryEntry
from support.inode_trees import Node, store_tree
from support.repositories import make_repository, open_repository, open_writer
from support.shared_maps import lose_data


@pytest.mark.parametrize(
    ("pages", "count", "problems"),
    [
        (1 << 50, 2, []),
        (1 << 50, 1, ["there are more inodes than 1, as the manifest says"]),
        (17, 2, []),
    ],
)
def test_it_has_an_end(tmp_path: Path, pages: int, count: int, problems: list[str]) -> None:
    """However many pages the manifest claims."""
    make_repository(tmp_path / "repository", encrypted=False)
    repository = open_repository(tmp_path / "repository")
    names = (DirectoryEntry(b"file", 257, 1, 2),)
    with open_writer(repository) as writer:
        tree = {256: Node(names=names, kind=stat.S_IFDIR), 257: Node({0: 1}, 1)}
        store_tree(writer, repository, tree)()
    repository = open_repository(tmp_path / "repository")
    backup = find_backup(repository, "latest").backup
    claimed = backup.model_copy(update={"inodes": Inodes(pages=pages, count=count)})
    assert [err.brief for err in verify_tree_backup(repository, claimed, Quiet())] == problems


def test_chunks_and_records_are_told_in_one_order(tmp_path: Path) -> None:
    """Chunks are read behind the walk, which has looked at later inodes by then."""
    make_repository(tmp_path / "repository", encrypted=False)
    repository = open_repository(tmp_path / "repository")
    wrong = (DirectoryEntry(b"nobody", 999, 1, 2),)
    with open_writer(repository) as writer:
        tree = {257: Node({0: 1}, 1), 300: Node(names=wrong, kind=stat.S_IFDIR), 301: Node({0: 2}, 1)}
        store_tree(writer, repository, tree)()
    lose_data(tmp_path / "repository")
    repository = open_repository(tmp_path / "repository")
    found = verify_tree_backup(repository, find_backup(repository, "latest").backup, Quiet())
    assert [err.inode for err in found if isinstance(err, UnreadableInodeError)] == [257, 300, 301]
