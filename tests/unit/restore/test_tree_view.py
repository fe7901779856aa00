"""Trees looked into without being restored: what is found, what is refused, and what is kept of it."""

from __future__ import annotations

import fcntl
import gc
import itertools
import os
import random
import stat
import tracemalloc
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest

from blocksnap.errors import DamageError
from blocksnap.operations.catalogue import find_backup
from blocksnap.operations.reporting import Quiet
from blocksnap.operations.trees import FilesOfTree, NoSuchPathError
from blocksnap.pipeline.flow import Geometry
from blocksnap.repository import inode_map as inode_maps
from blocksnap.repository.blockmap import MapRoot
from blocksnap.repository.errors import DamagedObjectError
from blocksnap.repository.frame import FrameType
from blocksnap.repository.inodes import InodeRecord
from blocksnap.repository.listings import DirectoryEntry
from blocksnap.restore import inode_values, tree_names, tree_places, tree_view
from blocksnap.restore.images import Image, ImageReader
from blocksnap.restore.private_folder import private_folder
from blocksnap.restore.tree_names import Names
from blocksnap.restore.tree_places import Places, PlacesFailedError
from blocksnap.restore.tree_serving import ShownTree, Trees
from blocksnap.restore.tree_view import STUB, TreeView
from support.inode_trees import Node, chunk, inode_map, store_tree
from support.repositories import CHUNK, make_repository, open_repository, open_writer

FILE, FOLDER, LINK, SUBVOLUME = 1, 2, 7, 8
TREE = {
    256: [(b"file", 257, FILE), (b"folder", 258, FOLDER), (b"link", 260, LINK), (b"sub", 300, SUBVOLUME)],
    258: [(b"inner", 259, FILE), (b"deeper", 261, FOLDER)],
    261: [(b"last", 262, FILE)],
}
GOOD = Node({0: 1, 2: 2}, 3)


def names(*entries: tuple[bytes, int, int]) -> Node:
    listed = (DirectoryEntry(name, inode, kind, 2 + at) for at, (name, inode, kind) in enumerate(entries))
    return Node(names=tuple(listed), kind=stat.S_IFDIR)


def files_of(place: Path, tree: Mapping[int, Node]) -> FilesOfTree:
    make_repository(place / "repository", encrypted=False)
    repository = open_repository(place / "repository")
    with open_writer(repository) as writer:
        store_tree(writer, repository, tree)()
    repository = open_repository(place / "repository")
    return FilesOfTree(repository, find_backup(repository, "latest").backup, Quiet())


def view_of(files: FilesOfTree, place: Path, places: Places | None = None, ordinal: int = 0) -> TreeView:
    source = open_repository(place / "repository")
    return TreeView(source, inode_map(files.backup), CHUNK, 5, places or Places(), ordinal)


def small_tree() -> dict[int, Node]:
    folders = {number: names(*listed) for number, listed in TREE.items()}
    return {**folders, 257: GOOD, 259: GOOD, 260: Node(detail=b"folder", kind=stat.S_IFLNK), 262: GOOD}


@pytest.mark.parametrize("collide", [False, True])
def test_names_are_found(monkeypatch: pytest.MonkeyPatch, collide: bool) -> None:
    if collide:
        monkeypatch.setattr(tree_names, "hash", lambda name: name[0] % 3, raising=False)
    dice = random.Random(3)
    listed = {dice.randbytes(dice.randrange(1, 256)).translate(None, b"/\0") or b"x" for _ in range(200)}
    entries = [
        DirectoryEntry(name, 257 + at, at % 8, at + 2) for at, name in enumerate(sorted(listed, key=len))
    ]
    found = Names(entries, "here")
    assert [(each.name, each.inode, each.kind) for each in found] == [
        (each.name, each.inode, each.kind) for each in entries
    ]
    for each in entries:
        assert found.find(each.name) == (each.name, each.inode, each.kind)
        assert (found.find(each.name + b"!") is not None) == (each.name + b"!" in listed)
    for at in (0, 100):
        twice = [*entries, DirectoryEntry(entries[at].name, 1, 1, 1000)]
        with pytest.raises(DamagedObjectError, match="same name twice"):
            Names(twice, "here")
    assert list(Names([], "here")) == []
    assert Names([], "here").find(b"x") is None


def test_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = files_of(tmp_path, small_tree())
    # With nothing kept it is the same.
    for folders, held in ((4096, 1 << 20), (1, 1)):
        monkeypatch.setattr(tree_view, "_KEPT_FOLDERS", folders)
        monkeypatch.setattr(tree_view, "_KEPT_NAMES_BYTES", held)
        view = view_of(files, tmp_path)
        for _ in range(2):
            assert view.find(b"folder/deeper/last").number == 262
            assert view.find(b"").number == 256
            assert view.find(b"sub").number == STUB
            assert list(view.names(view.find(b"sub"))) == []
            assert view.target(view.find(b"link")) == b"folder"
            for path in (b"no", b"folder/no", b"no/folder", b"sub/file"):
                with pytest.raises(FileNotFoundError):
                    view.find(path)
            for path in (b"file/x", b"link/inner", b"folder/inner/x/y"):
                with pytest.raises(NotADirectoryError):
                    view.find(path)


def test_hostile_trees(tmp_path: Path) -> None:
    tree = {
        256: names(
            (b"loop", 257, FOLDER), (b"top", 256, FOLDER), (b"wrong", 258, FOLDER), (b"no", 300, FILE)
        ),
        257: names((b"again", 257, FOLDER)),
        258: GOOD,
    }
    files = files_of(tmp_path, tree)
    view = view_of(files, tmp_path)
    assert view.find(b"loop").number == 257
    for path in (b"loop/again", b"loop/again/again", b"top", b"top/loop", b"wrong", b"wrong/x", b"no"):
        with pytest.raises(DamageError):
            view.find(path)
    with pytest.raises(DamageError):
        list(files.entries("", recursive=True, find=None))
    (tmp_path / "out").mkdir()
    for path in ("", "loop", "top", "wrong", "no"):
        with pytest.raises(DamageError):
            files.copy(path, str(tmp_path / "out"))
    assert os.listdir(tmp_path / "out") == []


@pytest.mark.parametrize("recent", [1 << 16, 2])
def test_a_directory_in_two_places_has_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recent: int
) -> None:
    """Each of 60 directories holds the next one twice: 2^60 paths, and the number of a stub among them.

    However many were looked at meanwhile: what is not in memory any more is not forgotten.
    """
    monkeypatch.setattr(tree_places, "_RECENT", recent)
    numbers = [256, 299, 2, *range(300, 357)]
    tree = {
        number: names((b"a", below, FOLDER), (b"b", below, FOLDER))
        for number, below in itertools.pairwise(numbers)
    }
    files = files_of(tmp_path, tree | {numbers[-1]: names((b"again", 2, FOLDER))})
    view, found, waiting = view_of(files, tmp_path), [], [b""]
    while waiting:
        path = waiting.pop()
        try:
            folder = view.find(path)
        except DamageError as err:
            assert "is in two places" in err.brief
            continue
        found.append(folder.number)
        assert len(found) <= len(numbers), "a directory is found again and again"
        waiting += [path + b"/" + each.name if path else each.name for each in view.names(folder)]
    assert sorted(found) == sorted(numbers)
    # Which place it is does not change.
    assert view.find(b"b").number == 299
    for _ in range(2):
        with pytest.raises(DamageError, match="in two places"):
            view.find(b"a")
    with pytest.raises(DamageError, match="in two places"):
        list(files.entries("", recursive=True, find=None))


def test_places_are_kept_when_a_view_is_not(tmp_path: Path) -> None:
    """Several backups are shown at once, of which a few are in memory; each has places of its own."""
    tree = {256: names((b"a", 300, FOLDER), (b"b", 300, FOLDER)), 300: names()}
    files, places = files_of(tmp_path, tree), Places()
    assert view_of(files, tmp_path, places, 1).find(b"a").number == 300
    assert view_of(files, tmp_path, places, 2).find(b"b").number == 300
    for ordinal, wrong in ((1, b"b"), (2, b"a")):
        with pytest.raises(DamageError, match="in two places"):
            view_of(files, tmp_path, places, ordinal).find(wrong)


def test_places_of_backups_that_are_shown_together(tmp_path: Path) -> None:
    """Each has its own, also while so many others are looked at that little of it is in memory."""
    tree = {256: names((b"a", 300, FOLDER), (b"b", 300, FOLDER)), 300: names()}
    files, told = files_of(tmp_path, tree), list[str]()
    repository = open_repository(tmp_path / "repository")
    shown = [ShownTree(str(at), inode_map(files.backup), CHUNK, at) for at in range(9)]
    reader = ImageReader(repository)
    try:
        trees = Trees(repository, reader, shown, lambda err: told.append(err.brief))
        for at in range(9):
            assert stat.S_ISDIR(trees.getattr(f"/{at}/{'ab'[at % 2]}")["st_mode"])
        for at in range(9):
            with pytest.raises(OSError, match="Input/output error"):
                trees.getattr(f"/{at}/{'ba'[at % 2]}")
    finally:
        reader.close()
    assert len(told) == 9
    assert all("in two places" in each for each in told)


def test_places_are_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tree_places, "_RECENT", 64)
    places, model, dice = Places(), dict[tuple[int, int], bytes](), random.Random(5)
    numbers = [0, 256, (1 << 63) - 1, 1 << 63, (1 << 64) - 1, *range(1000, 1400)]
    for _ in range(8000):
        key, path = (dice.randrange(3), dice.choice(numbers)), dice.choice([b"one", b"other"])
        assert places.is_its_own(*key, path) == (model.setdefault(key, path) == path)
        assert len(places._recent) <= 64


def test_a_place_that_cannot_be_kept_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tree_places, "_RECENT", 1)
    monkeypatch.setattr(tree_places, "_TABLE", "CREATE TABLE others (tree INTEGER)")
    places = Places()
    assert places.is_its_own(0, 256, b"")
    for _ in range(3):
        with pytest.raises(PlacesFailedError, match="cannot remember"):
            places.is_its_own(0, 257, b"a")


def test_deep_directories_take_little_memory(tmp_path: Path) -> None:
    depth = 2000
    tree = {256: names((b"d", 300, FOLDER))} | {
        300 + at: names((b"d", 301 + at, FOLDER)) for at in range(depth)
    }
    files = files_of(tmp_path, tree | {300 + depth: names()})
    view = view_of(files, tmp_path)
    tracemalloc.start()
    try:
        for at in range(1, depth + 1):
            assert view.find(b"/".join([b"d"] * at)).number == 299 + at
        # A set of all above it for each would be 200 MB.
        assert tracemalloc.get_traced_memory()[0] < 30 << 20
    finally:
        tracemalloc.stop()


def test_records_above_a_directory_are_not_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    depth, large = 300, ((b"user.x", b"x" * 900),)
    tree = {256: names((b"d", 300, FOLDER))} | {
        300 + at: replace(names((b"d", 301 + at, FOLDER)), xattrs=large) for at in range(depth)
    }
    files = files_of(tmp_path, tree | {300 + depth: names()})
    monkeypatch.setattr(inode_maps, "_CACHED_PAGES", 2)
    monkeypatch.setattr(tree_view, "_KEPT_FOLDERS", 16)
    view = view_of(files, tmp_path)
    assert view.find(b"/".join([b"d"] * depth)).number == 299 + depth
    gc.collect()
    assert sum(isinstance(each, InodeRecord) for each in gc.get_objects()) < 100
    assert view.find(b"d").number == 300


def test_the_place_of_a_nested_subvolume_is_empty(tmp_path: Path) -> None:
    """Also when an inode has the number that the kernel shows there, and names."""
    tree = {
        2: names((b"below", 300, SUBVOLUME)),
        256: names((b"two", 2, FOLDER), (b"sub", 300, SUBVOLUME)),
    }
    files = files_of(tmp_path, tree)
    view = view_of(files, tmp_path)
    assert [each.name for each in view.names(view.find(b"two"))] == [b"below"]
    for path in (b"sub", b"two/below"):
        assert list(view.names(view.find(path))) == []
    for path in (b"sub/below", b"two/below/below"):
        with pytest.raises(FileNotFoundError):
            view.find(path)


def test_values_that_are_too_large_are_not_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tree = {
        256: names((b"good", 257, LINK), (b"long", 258, LINK), (b"file", 259, FILE)),
        257: Node(detail=b"x" * 4095, kind=stat.S_IFLNK),
        258: Node(detail=b"x" * 4096, kind=stat.S_IFLNK),
        259: Node({0: 1}, 1, xattrs=((b"user.one", b"1" * 2000),), detail=b"s" * 2000),
    }
    view = view_of(files_of(tmp_path, tree), tmp_path)
    assert view.target(view.find(b"good")) == b"x" * 4095
    with pytest.raises(DamageError, match="4096 bytes"):
        view.target(view.find(b"long"))
    file = view.find(b"file")
    assert view.xattrs(file) == {b"user.one": b"1" * 2000}
    monkeypatch.setattr(inode_values, "LARGEST_VALUE", 1999)
    with pytest.raises(DamageError, match="more than it can have"):
        view.xattrs(file)
    assert view.room(file) == file.size


def test_copies_and_refusals(tmp_path: Path) -> None:
    files = files_of(tmp_path, small_tree())
    out = tmp_path / "out"
    out.mkdir()
    assert files.copy("folder/inner", str(out)) == [str(out / "inner")]
    assert (out / "inner").read_bytes() == chunk(1) + bytes(CHUNK) + chunk(2)
    assert files.copy("/folder/./deeper/", str(out)) == [str(out / "deeper")]
    assert os.listdir(out / "deeper") == ["last"]
    for path in ("..", "folder/../file", "link/inner", "file/x", "nothing"):
        with pytest.raises(NoSuchPathError):
            files.copy(path, str(out))
    listed = [entry["path"] for entry in files.entries("", recursive=True, find=None)]
    assert listed == [
        "file", "folder", "link", "sub", "folder/deeper", "folder/inner", "folder/deeper/last",
    ]  # fmt: skip
    assert sorted(os.listdir(out)) == ["deeper", "inner"]


def test_a_chunk_of_another_length_is_no_content(tmp_path: Path) -> None:
    """A chunk that is in memory already has its right id, but not the length that another file wants."""
    make_repository(tmp_path / "repository")
    repository = open_repository(tmp_path / "repository")
    with open_writer(repository) as writer:
        id_ = writer.store_blob(FrameType.DATA, b"short")
        writer.flush()
    reader = ImageReader(open_repository(tmp_path / "repository"))
    try:
        short = MapRoot(0, id_)
        assert reader.read(Image(Geometry(5, CHUNK), short), 0, 9) == b"short"
        for size in (4, 6, CHUNK):
            with pytest.raises(DamageError, match="has 5 bytes"):
                reader.read(Image(Geometry(size, CHUNK), short), 0, size)
    finally:
        reader.close()


def test_only_what_was_left_behind_is_removed(tmp_path: Path) -> None:
    for name, mode in {".blocksnap-abcdefgh.partial": 0o700, ".blocksnap-openopen.partial": 0o755}.items():
        (tmp_path / name).mkdir(mode=mode)
        (tmp_path / name / "file").write_text("x")
    (tmp_path / ".blocksnap-of.12345678.partial").mkdir(mode=0o700)
    (tmp_path / ".blocksnap-locked_1.partial").mkdir(mode=0o700)
    fd = os.open(tmp_path / ".blocksnap-locked_1.partial", os.O_RDONLY)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        with private_folder(str(tmp_path)) as one, private_folder(str(tmp_path)) as other:
            assert one.path != other.path
            assert Path(one.path).is_dir()
    finally:
        os.close(fd)
    assert sorted(os.listdir(tmp_path)) == [
        ".blocksnap-locked_1.partial", ".blocksnap-of.12345678.partial", ".blocksnap-openopen.partial",
    ]  # fmt: skip
