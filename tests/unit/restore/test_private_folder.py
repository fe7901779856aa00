"""Copies into a directory that somebody else owns, who gives what is not complete other names."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import Any, cast

import pytest

from blocksnap.operations.catalogue import find_backup
from blocksnap.operations.reporting import Quiet
from blocksnap.operations.trees import FilesOfTree
from blocksnap.repository.listings import DirectoryEntry
from blocksnap.restore.contents import answers
from blocksnap.restore.inside import Inner, InsideError
from blocksnap.restore.partitions import Contents
from blocksnap.restore.private_folder import private_folder
from support.inode_trees import Node, chunk, store_tree
from support.repositories import make_repository, open_repository, open_writer


class Owner:
    """The owner of a directory: gives the hidden folder in it another name, and its own to a link."""

    def __init__(self, place: Path) -> None:
        self.home, self.victim = place / "home", place / "victim"
        self.home.mkdir()
        self.victim.mkdir()
        (self.victim / "shadow").write_text("not theirs")

    def swap(self) -> None:
        for hidden in self.home.glob(".blocksnap-*.partial"):
            if not hidden.is_symlink():
                hidden.rename(self.home / "aside")
                hidden.symlink_to(self.victim)

    def found_nothing_but(self, name: str) -> bool:
        """Tell whether there is what was copied, an empty folder and the link, and all else is untouched."""
        assert os.listdir(self.victim) == ["shadow"]
        assert (self.victim / "shadow").read_text() == "not theirs"
        left = [each for each in os.listdir(self.home) if not each.startswith(".blocksnap-")]
        return sorted(left) == sorted(["aside", name]) and not os.listdir(self.home / "aside")


@pytest.fixture
def owner(tmp_path: Path) -> Owner:
    return Owner(tmp_path)


def inner_with(folder: Path) -> Inner:
    """What the inner process has of an image that is mounted there."""
    inner = Inner(str(folder))
    facts = cast("Any", inner)
    facts._contents["x"] = Contents(None, ())
    facts._mounted["x", ""] = str(folder)
    return inner


def program(folder: Path, lines: str) -> None:
    folder.mkdir()
    (folder / "cp").write_text(f"#!/bin/sh -e\n{lines}\n")
    (folder / "cp").chmod(0o755)


def test_a_file_of_an_image_goes_nowhere_else(
    owner: Owner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backup = tmp_path / "backup"
    backup.mkdir()
    (backup / "shadow").write_text("theirs")
    home, victim = owner.home, owner.victim
    program(
        tmp_path / "programs",
        f"for h in {home}/.blocksnap-*; do mv $h {home}/aside; ln -s {victim} $h; done; PATH=/bin:/usr/bin; "
        'exec cp "$@"',
    )
    monkeypatch.setenv("PATH", f"{tmp_path / 'programs'}:{os.environ['PATH']}")
    request = {"backup": "x", "path": "shadow", "to": str(home)}
    assert list(answers()["copy"](inner_with(backup), request)) == [{"made": f"{home}/shadow"}]
    assert (home / "shadow").read_text() == "theirs"
    assert owner.found_nothing_but("shadow")


def test_what_a_program_says_names_the_folder_that_people_know(
    owner: Owner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (owner.victim / "big").write_text("x")
    program(tmp_path / "programs", 'echo "cp: error writing $5: No space left on device" >&2; exit 1')
    monkeypatch.setenv("PATH", f"{tmp_path / 'programs'}:{os.environ['PATH']}")
    request = {"backup": "x", "path": "big", "to": str(owner.home)}
    from blocksnap.system.command import CommandError

    with pytest.raises(CommandError, match=rf"writing {owner.home}/\.blocksnap-\w+\.partial/big: No space"):
        list(answers()["copy"](inner_with(owner.victim), request))
    assert os.listdir(owner.home) == []
    request["to"] = str(owner.home / "missing")
    with pytest.raises(InsideError, match="missing: No such file or directory"):
        list(answers()["copy"](inner_with(owner.victim), request))


class Swapping(Quiet):
    """Has the owner act when the first bytes are there."""

    def __init__(self, owner: Owner) -> None:
        super().__init__()
        self._owner = owner

    def advance(self, done_bytes: int) -> None:
        if done_bytes:
            self._owner.swap()


def test_a_file_of_a_tree_goes_nowhere_else(owner: Owner, tmp_path: Path) -> None:
    make_repository(tmp_path / "repository", encrypted=False)
    repository = open_repository(tmp_path / "repository")
    top = Node(names=(DirectoryEntry(b"shadow", 257, 1, 2),), kind=stat.S_IFDIR)
    with open_writer(repository) as writer:
        store_tree(writer, repository, {256: top, 257: Node({0: 1}, 1)})()
    repository = open_repository(tmp_path / "repository")
    files = FilesOfTree(repository, find_backup(repository, "latest").backup, Swapping(owner))
    assert files.copy("shadow", str(owner.home)) == [f"{owner.home}/shadow"]
    assert (owner.home / "shadow").read_bytes() == chunk(1)
    assert owner.found_nothing_but("shadow")


def test_nothing_is_removed_but_what_was_made(owner: Owner) -> None:
    """A directory of ours that its owner cannot empty gets the name of the one that is to go."""
    with private_folder(str(owner.home)) as private:
        Path(private.path).rename(owner.home / "aside")
        owner.victim.rename(private.path)
        (owner.home / "aside" / "file").write_text("x")
    assert os.listdir(owner.home / "aside") == []
    assert os.listdir(private.path) == ["shadow"]


def test_leftovers_stay_where_another_may_have_named_them(owner: Owner) -> None:
    left = owner.home / ".blocksnap-abcdefgh.partial"
    owner.victim.chmod(0o700)
    owner.victim.rename(left)
    owner.home.chmod(0o777)
    with private_folder(str(owner.home)) as private:
        assert private.names() == []
    assert os.listdir(owner.home) == [left.name]
    owner.home.chmod(0o1777)
    with private_folder(str(owner.home)):
        pass
    assert os.listdir(owner.home) == []
