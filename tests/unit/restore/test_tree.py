"""Trees restored to a plain directory: what hostile records want is refused, and nothing is left of it."""

from __future__ import annotations

import itertools
import os
import resource
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import pytest

from blocksnap.errors import BlocksnapError, DamageError, TargetError
from blocksnap.operations.catalogue import find_backup
from blocksnap.operations.reporting import Quiet
from blocksnap.operations.restore_tree import RestoredTree, restore_tree
from blocksnap.repository.frame import FrameType
from blocksnap.repository.inode_map import InodeReader
from blocksnap.repository.listings import DirectoryEntry
from blocksnap.repository.repository import Repository
from blocksnap.restore import inode_values
from blocksnap.restore.tree_layout import is_layout, read_layout
from blocksnap.restore.tree_place import remove_tree
from blocksnap.restore.unkept import Unkept
from support.inode_trees import Node, chunk, inode_map, store_tree
from support.repositories import CHUNK, make_repository, open_repository, open_writer

FILE, FOLDER, LINK, SUBVOLUME = 1, 2, 7, 8
VECTOR = bytes.fromhex("010c0000010201020d0020128040030001010402020101")


@pytest.fixture
def place(tmp_path: Path) -> Path:
    make_repository(tmp_path / "repository", encrypted=False)
    (tmp_path / "targets").mkdir()
    return tmp_path


def names(*entries: tuple[bytes, int, int]) -> Node:
    listed = (DirectoryEntry(name, inode, kind, 2 + at) for at, (name, inode, kind) in enumerate(entries))
    return Node(names=tuple(listed), kind=stat.S_IFDIR)


def restored(place: Path, tree: Mapping[int, Node]) -> RestoredTree:
    repository = open_repository(place / "repository")
    with open_writer(repository) as writer:
        store_tree(writer, repository, tree)()
    repository = open_repository(place / "repository")
    backup = find_backup(repository, "latest").backup
    return restore_tree(repository, backup, str(place / "targets" / "out"), Quiet(), verify=True)


def test_a_tree_comes_back(place: Path) -> None:
    done = restored(
        place,
        {
            256: names(
                (b"file", 257, FILE), (b"folder", 258, FOLDER), (b"link", 260, LINK), (b"sub", 300, SUBVOLUME)
            ),
            257: Node({0: 1, 2: 2, 3: 1}, 5),
            258: names((b"inner", 259, FILE)),
            259: Node(detail=b"a state that nobody understands", mtime=10**18),
            260: Node(detail=b"folder/inner", kind=stat.S_IFLNK),
        },
    )  # fmt: skip
    out = place / "targets" / "out"
    assert (out / "file").read_bytes() == chunk(1) + bytes(CHUNK) + chunk(2) + chunk(1) + bytes(CHUNK)
    assert (out / "folder" / "inner").stat().st_mtime_ns == 10**18
    assert os.readlink(out / "link") == "folder/inner"
    assert (done.nested, done.result.inodes, done.verified) == (("sub",), 4, True)
    assert os.listdir(place / "targets") == ["out"]


@contextmanager
def few_descriptors(count: int) -> Iterator[None]:
    """Have no room for more than so many beside those that are open; usually a process may have 1,024."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    used = set(map(int, os.listdir("/proc/self/fd")))
    limit = next(each for each in itertools.count() if each - sum(fd < each for fd in used) == count)
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


def deep(depth: int, last: Node) -> dict[int, Node]:
    folders = {300 + at: names((b"d", 301 + at, FOLDER)) for at in range(depth - 1)}
    top = {256: names((b"d", 300, FOLDER), (b"z", 257, FILE)), 257: GOOD}
    return top | folders | {299 + depth: last}


def test_a_deep_tree_needs_few_descriptors(place: Path) -> None:
    """Also to be read back, and to be removed: each level of it once was one more."""
    depth, targets = 400, os.open(place / "targets", os.O_RDONLY)
    try:
        with few_descriptors(100):
            done = restored(place, deep(depth, names((b"last", 258, FILE))) | {258: GOOD})
            assert (done.result.inodes, done.verified) == (depth + 2, True)
            fd = os.dup(targets)
            for name in (b"out", *[b"d"] * depth):
                below = os.open(name, os.O_RDONLY | os.O_NOFOLLOW, dir_fd=fd)
                os.close(fd)
                fd = below
            assert os.listdir(fd) == ["last"]
            assert os.fstat(fd).st_mtime_ns == 0
            os.close(fd)
    finally:
        remove_tree(targets, "out")
        os.close(targets)
    assert os.listdir(place / "targets") == []


def test_a_deep_tree_that_fails_leaves_nothing(place: Path) -> None:
    with few_descriptors(100), pytest.raises(DamageError, match="there is no inode 99"):
        restored(place, deep(1100, names((b"last", 99, FILE))))
    assert os.listdir(place / "targets") == []


def test_many_files_and_directories_need_few_descriptors(place: Path) -> None:
    """Files without content, and those that share all they have with another; directories, read back."""
    many = range(1000, 1300)
    entries = [(b"%d" % number, number, FOLDER if number % 3 == 2 else FILE) for number in many]
    kinds = (Node(), GOOD, names())
    with few_descriptors(100):
        done = restored(place, {256: names(*entries)} | {number: kinds[number % 3] for number in many})
    assert (done.result.inodes, done.verified) == (len(many), True)
    out = place / "targets" / "out"
    assert {(out / str(number)).read_bytes() for number in many if number % 3 == 1} == {chunk(1)}
    assert all((out / str(number)).stat().st_size == 0 for number in many if number % 3 == 0)


class Renaming(Quiet):
    """Gives the directory of the target another name when the first bytes are restored."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def advance(self, done_bytes: int) -> None:
        if done_bytes and self._folder.exists():
            self._folder.rename(self._folder.with_name("elsewhere"))


@pytest.mark.parametrize("last", [257, 99])
def test_the_directory_above_may_be_renamed(place: Path, last: int) -> None:
    """The tree gets its name where it is by then; one that fails is removed from there."""
    repository = open_repository(place / "repository")
    # Behind so much that some of it is restored before.
    many = [(b"%d" % number, number, FILE) for number in range(1000, 1600)]
    tree = {256: names(*many, (b"last", last, FILE)), 257: GOOD} | {
        number: Node({0: number}, 1) for _, number, _ in many
    }
    with open_writer(repository) as writer:
        store_tree(writer, repository, tree)()
    repository = open_repository(place / "repository")
    backup = find_backup(repository, "latest").backup
    wanted, renaming = place / "targets" / "out", Renaming(place / "targets")
    if last == 257:
        restore_tree(repository, backup, str(wanted), renaming)
    else:
        with pytest.raises(DamageError, match="there is no inode 99"):
            restore_tree(repository, backup, str(wanted), renaming)
    assert os.listdir(place / "elsewhere") == (["out"] if last == 257 else [])


GOOD = Node({0: 1}, 1)
HOSTILE: dict[str, dict[int, Node]] = {
    "a cycle": {256: names((b"a", 257, FOLDER)), 257: names((b"b", 257, FOLDER))},
    "the top again": {256: names((b"a", 256, FOLDER))},
    "a directory in two places": {
        256: names((b"a", 257, FOLDER), (b"b", 257, FOLDER)),
        257: names((b"c", 258, FILE)),
        258: GOOD,
    },
    "a name that leads nowhere": {256: names((b"a", 257, FILE))},
    "a file that is a directory": {256: names((b"a", 257, FOLDER)), 257: GOOD},
    "a top that is a file": {256: GOOD},
    "no top": {257: GOOD},
    "a kind that is none": {256: names((b"a", 257, 0)), 257: Node(kind=0o070000)},
    "a link to nowhere": {256: names((b"a", 257, LINK)), 257: Node(kind=stat.S_IFLNK)},
    "a link with a zero byte": {
        256: names((b"a", 257, LINK)),
        257: Node(detail=b"a\0b", kind=stat.S_IFLNK),
    },
    "a link that is too long": {
        256: names((b"a", 257, LINK)),
        257: Node(detail=b"x" * 4096, kind=stat.S_IFLNK),
    },
    "an attribute that is too long": {
        256: names((b"a", 257, FILE)),
        257: Node({0: 1}, 1, xattrs=((b"user.x", b"x" * 65537),)),
    },
    "an attribute with a name that is too long": {
        256: names((b"a", 257, FILE)),
        257: Node({0: 1}, 1, xattrs=((b"user." + b"x" * 251, b""),)),
    },
    "the same name twice": {256: names((b"a", 257, FILE), (b"a", 257, FILE)), 257: GOOD},
    "up": {256: names((b"..", 257, FILE)), 257: GOOD},
    "a path": {256: names((b"../../stolen", 257, FILE)), 257: GOOD},
    "nothing": {256: names((b"", 257, FILE)), 257: GOOD},
}


@pytest.mark.parametrize("what", HOSTILE)
def test_hostile_records_are_refused(place: Path, what: str) -> None:
    before = sorted(path.name for path in place.iterdir())
    with pytest.raises(DamageError):
        restored(place, HOSTILE[what])
    assert os.listdir(place / "targets") == []
    assert sorted(path.name for path in place.iterdir()) == before


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("a link that is too long", "symbolic link 257 is damaged: 4096 bytes"),
        ("an attribute that is too long", "inode 257 is damaged: its extended attribute b'user.x' has 65537"),
        ("an attribute with a name that is too long", "inode 257 is damaged: it has an extended attribute"),
    ],
)
def test_what_no_kernel_has_is_named_and_not_held(
    place: Path, monkeypatch: pytest.MonkeyPatch, what: str, said: str
) -> None:
    with pytest.raises(DamageError, match=said):
        restored(place, HOSTILE[what])
    # A record may claim any length of one block many times; nothing of that is read.
    monkeypatch.setattr(inode_values, "LARGEST_VALUE", 1000)
    tree = {256: names((b"a", 257, FILE)), 257: Node({0: 1}, 1, xattrs=((b"user.x", b"x" * 1200),))}
    with pytest.raises(DamageError, match=r"inode 257 is damaged: 12\d\d bytes are more than it can have"):
        restored(place, tree)


def test_a_link_is_not_followed(place: Path) -> None:
    """A symbolic link and a directory of one name: the second is refused, and nothing is written there."""
    (place / "outside").mkdir()
    tree = {
        256: names((b"a", 257, LINK), (b"b", 258, FOLDER)),
        257: Node(detail=os.fsencode(place / "outside"), kind=stat.S_IFLNK),
        258: names((b"c", 259, FILE)),
        259: GOOD,
    }
    restored(place, tree)
    assert os.readlink(place / "targets" / "out" / "a") == str(place / "outside")
    assert os.listdir(place / "outside") == []


def test_what_is_there_is_not_replaced(place: Path) -> None:
    (place / "targets" / "out").mkdir()
    with pytest.raises(TargetError, match="exists already"):
        restored(place, {256: names()})
    assert os.listdir(place / "targets") == ["out"]


def test_a_lost_chunk_ends_it_or_becomes_zeros(place: Path) -> None:
    repository = open_repository(place / "repository")
    tree = {
        256: names((b"file", 257, FILE), (b"other", 258, FILE), (b"shared", 259, FILE)),
        257: Node({0: 1, 1: 2}, 2),
        258: GOOD,
        259: Node({0: 3, 1: 1, 2: 2, 3: 4}, 4),
    }
    with open_writer(repository) as writer:
        store_tree(writer, repository, tree)()
    repository = open_repository(place / "repository")
    lose(place, repository, FrameType.DATA, repository.keys.identify(FrameType.DATA, chunk(2)))
    backup = find_backup(repository, "latest").backup
    out = place / "targets" / "out"
    with pytest.raises(BlocksnapError, match=f"bytes {CHUNK} to {2 * CHUNK} of file cannot be restored"):
        restore_tree(repository, backup, str(out), Quiet())
    assert os.listdir(place / "targets") == []
    done = restore_tree(repository, backup, str(out), Quiet(), zero_missing=True)
    assert [(each.path, each.offset, each.length) for each in done.missing] == [
        ("file", CHUNK, CHUNK), ("shared", 2 * CHUNK, CHUNK),
    ]  # fmt: skip
    assert (out / "file").read_bytes() == chunk(1) + bytes(CHUNK)
    assert (out / "other").read_bytes() == chunk(1)
    assert (out / "shared").read_bytes() == chunk(3) + chunk(1) + bytes(CHUNK) + chunk(4)


def test_a_lost_map_of_a_file_is_that_of_zeros(place: Path) -> None:
    repository = open_repository(place / "repository")
    tree = {256: names((b"file", 257, FILE), (b"other", 258, FILE)), 257: Node({0: 1, 1: 2}, 2), 258: GOOD}
    with open_writer(repository) as writer:
        store_tree(writer, repository, tree)()
    repository = open_repository(place / "repository")
    backup = find_backup(repository, "latest").backup
    record = InodeReader(repository, inode_map(backup)).find(257)
    assert record is not None
    lose(place, repository, FrameType.NODE, record.content.entry)
    out = place / "targets" / "out"
    with pytest.raises(BlocksnapError, match=f"bytes 0 to {2 * CHUNK} of file cannot be restored"):
        restore_tree(repository, backup, str(out), Quiet())
    done = restore_tree(repository, backup, str(out), Quiet(), zero_missing=True)
    assert [(each.path, each.offset, each.length) for each in done.missing] == [("file", 0, 2 * CHUNK)]
    assert (out / "file").read_bytes() == bytes(2 * CHUNK)
    assert (out / "other").read_bytes() == chunk(1)


def lose(place: Path, repository: Repository, kind: FrameType, id_: bytes) -> None:
    """Change a byte of what the repository has of something."""
    location = repository.locate(kind, id_)
    pack = place / "repository" / location.pack.name
    data = bytearray(pack.read_bytes())
    data[location.offset + location.length // 2] ^= 1
    pack.chmod(0o600)
    pack.write_bytes(data)


def test_layouts() -> None:
    assert [(kind, offset // 4096, length // 4096) for kind, offset, length in read_layout(VECTOR)] == [
        ("inline", 0, 1), ("preallocated", 2, 2), ("data", 4, 32), ("data", 37, 4),
    ]  # fmt: skip
    for wrong in (b"", b"\1", b"\2\x0c", b"\1\x0c\1\0", b"\1\x0c\0\0\0", VECTOR[:-1]):
        assert not is_layout(wrong)
        assert len(list(read_layout(wrong))) < 4


def test_what_is_not_kept_is_told_once() -> None:
    unkept = Unkept()
    assert not unkept
    for number in range(5):
        unkept.note("flag x", b"path %d" % number)
    assert unkept.lines() == ["flag x, of 5: path 0, path 1, path 2, ..."]
    assert unkept.document() == [{"what": "flag x", "count": 5, "examples": ["path 0", "path 1", "path 2"]}]
