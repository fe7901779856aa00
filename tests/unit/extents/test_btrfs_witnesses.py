"""Which inodes a backup of a subvolume names as witnesses of its history, and what they say."""

from __future__ import annotations

import pytest

from blocksnap.extents.btrfs_changes import RememberedInode, Witness
from blocksnap.extents.btrfs_witnesses import (
    LARGEST_AGE,
    PER_AGE,
    YOUNGEST,
    Hearing,
    choose,
    from_binding,
    hear,
    newest,
    to_binding,
    unseen,
)
from blocksnap.system.btrfs import InodeStamp

PARENT = 100
WITNESS = Witness(inode=300, generation=7, transaction=90, changed_at=-5, directory=256)
SAME = InodeStamp(7, 90, -5, is_directory=False)


def heard(*, file: InodeStamp | None, folder: InodeStamp | None = None) -> Hearing:
    return hear([WITNESS], PARENT, {300: file, 256: folder}.__getitem__)


def test_one_that_nobody_touched_stands() -> None:
    assert heard(file=SAME) == Hearing((WITNESS,), None)


@pytest.mark.parametrize(
    "file",
    [
        InodeStamp(7, 101, 1, is_directory=False),
        # Another file has its number.
        InodeStamp(101, 101, 1, is_directory=False),
        # A snapshot got its name there after the copy.
        InodeStamp(7, 100, 1, is_directory=True),
    ],
)
def test_one_that_was_touched_says_nothing(file: InodeStamp) -> None:
    assert heard(file=file) == Hearing((), None)


@pytest.mark.parametrize(
    "folder", [None, InodeStamp(1, 101, 1, is_directory=True), InodeStamp(1, 100, 1, True)]
)
def test_one_that_was_removed_says_nothing(folder: InodeStamp | None) -> None:
    assert heard(file=None, folder=folder) == Hearing((), None)


@pytest.mark.parametrize(
    "file",
    [
        InodeStamp(7, 80, -5, is_directory=False),
        InodeStamp(7, 90, -4, is_directory=False),
        InodeStamp(7, 100, 9, is_directory=False),
        InodeStamp(6, 90, -5, is_directory=False),
    ],
)
def test_one_that_is_otherwise_contradicts(file: InodeStamp) -> None:
    assert "inode 300 is as it never was" in (heard(file=file).contradiction or "")


def test_one_that_was_never_there_contradicts() -> None:
    found = heard(file=None, folder=InodeStamp(1, 99, 1, is_directory=True))
    assert "inode 300 is missing" in (found.contradiction or "")


def test_from_when_on_it_is_looked() -> None:
    assert Hearing((WITNESS,), None).look_since(PARENT) == 90
    assert Hearing((), None).look_since(PARENT) == 1
    assert Hearing((), None).look_since(5000) == Hearing((WITNESS,), None).look_since(5000)
    assert Hearing((), None).look_since(5000) == 5000 - LARGEST_AGE


def test_what_the_parent_did_not_see() -> None:
    known = {300: RememberedInode(7, 1, None, -5), 301: RememberedInode(7, 1, None)}
    assert unseen([(300, SAME), (301, SAME), (302, None)], known) is None
    assert "inode 302 is older" in (unseen([(302, SAME)], known) or "")
    assert "inode 300 is older" in (unseen([(300, InodeStamp(8, 90, -5, False))], known) or "")
    assert "inode 300 was changed" in (unseen([(300, InodeStamp(7, 95, 6, False))], known) or "")


def test_the_youngest_are_chosen_and_some_of_each_age() -> None:
    inodes = [(257 + number, number) for number in range(1, 100_001)]
    chosen = choose(inodes, 100_000)
    assert set(newest(inodes)) <= set(chosen)
    assert len(newest(inodes)) == YOUNGEST
    ages = [(100_000 - (number - 257)).bit_length() for number in chosen]
    assert all(ages.count(age) >= min(PER_AGE, 1 << max(age - 1, 0)) for age in range(17))
    assert len(chosen) <= YOUNGEST + PER_AGE * 18
    assert choose(inodes, 100_001) != chosen


def test_few_are_all_chosen() -> None:
    assert choose([(256, 5), (300, 5), (256, 5)], 5) == (256, 300)
    assert choose([], 5) == ()


def test_bindings() -> None:
    assert from_binding(to_binding([WITNESS])) == (WITNESS,)
    assert to_binding([]) == {}
    assert from_binding({}) == ()
    assert from_binding({"witnesses": 7}) == ()
    nonsense = [
        [1, 2, 3, 4],
        [1, 2, 3, 4, "5"],
        [1, 2, 3, 4, True],
        [-1, 2, 3, 4, 5],
        [1, 2, 3, 4, 1 << 64],
        5,
    ]
    assert from_binding({"witnesses": [*nonsense, [300, 7, 90, -5, 256]]}) == (WITNESS,)
