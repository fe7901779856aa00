"""Steps of a send stream lead to the right inodes, whatever was renamed meanwhile, and to the right bytes."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from blocksnap import _native
from blocksnap.extents.btrfs_replay import Node, Replay, Step, changed_ranges
from blocksnap.extents.model import ExtentList

CREATE, MKDIR, RENAME, LINK, REMOVE, DATA, HOLE, RESIZE, TOUCH = (
    _native.STEP_CREATE, _native.STEP_CREATE_DIRECTORY, _native.STEP_RENAME, _native.STEP_LINK,
    _native.STEP_REMOVE, _native.STEP_DATA, _native.STEP_HOLE, _native.STEP_RESIZE, _native.STEP_TOUCH,
)  # fmt: skip


def packed(*pairs: tuple[int, int]) -> bytes:
    return b"".join(struct.pack("<QQ", *pair) for pair in pairs)


def step(kind: int, path: bytes, other: bytes = b"", number: int = 0, ranges: bytes | None = None) -> Step:
    return kind, path, other, number, ranges


def touched(*steps: Step) -> list[tuple[bytes | None, int]]:
    return [(node.base, node.number) for node in Replay().follow(steps)]


def test_what_is_below_a_renamed_directory_is_still_what_it_was() -> None:
    assert touched(
        step(RENAME, b"a/b", b"o300-7-0"),
        step(RENAME, b"o300-7-0", b"c"),
        step(TOUCH, b"c/d/e"),
        step(TOUCH, b"a/x"),
    ) == [(b"a/b", 0), (b"a/b/d/e", 0), (b"a/x", 0)]


def test_a_name_given_to_another_inode() -> None:
    assert touched(
        step(RENAME, b"a", b"o257-6-0"),
        step(CREATE, b"o258-9-0", number=258),
        step(RENAME, b"o258-9-0", b"a"),
        step(DATA, b"a", ranges=packed((0, 1))),
        step(REMOVE, b"o257-6-0"),
    ) == [(b"a", 0), (None, 258)]


def test_names_that_were_exchanged() -> None:
    nodes = Replay().follow([
        step(RENAME, b"a", b"o257-6-0"),
        step(RENAME, b"b", b"a"),
        step(RENAME, b"o257-6-0", b"b"),
        step(DATA, b"a", ranges=packed((0, 1))),
        step(DATA, b"b", ranges=packed((4, 1))),
    ])  # fmt: skip
    assert {node.base: node.data for node in nodes} == {b"a": [packed((4, 1))], b"b": [packed((0, 1))]}


def test_links_are_one_inode() -> None:
    nodes = Replay().follow([
        step(MKDIR, b"d", number=300),
        step(LINK, b"d/link", b"a"),
        step(REMOVE, b"a"),
        step(RESIZE, b"d/link", number=5),
    ])  # fmt: skip
    directory, file = nodes
    assert (directory.number, directory.is_directory) == (300, True)
    assert (file.base, file.lost_a_name, file.shortest) == (b"a", True, 5)


def test_the_subvolume_itself() -> None:
    assert touched(step(TOUCH, b""), step(TOUCH, b"a")) == [(b"", 0), (b"a", 0)]


@pytest.mark.parametrize(
    "steps",
    [
        [step(REMOVE, b"a"), step(TOUCH, b"a")],
        [step(REMOVE, b"a"), step(TOUCH, b"a/b")],
        [step(RENAME, b"a", b"b"), step(TOUCH, b"a")],
        [step(MKDIR, b"a", number=300), step(TOUCH, b"a/b")],
        [step(REMOVE, b"a"), step(LINK, b"b", b"a")],
        [step(RENAME, b"a", b"")],
        [step(REMOVE, b"")],
    ],
)
def test_steps_that_cannot_be_taken(steps: list[Step]) -> None:
    with pytest.raises(ValueError, match="send stream"):
        Replay().follow(steps)


class Model:
    """A tree of objects, each of which knows what it was in the beginning: its path, or its number."""

    def __init__(self, data: st.DataObject) -> None:
        self.data = data
        self.places: dict[bytes, object] = {}
        self.tree: dict[bytes, tuple[bytes | None, int]] = {
            path: (path, 0) for path in (b"a", b"a/b", b"a/b/c", b"a/d", b"e", b"f", b"f/g")
        }
        self.folders = {(b"a", 0), (b"a/b", 0), (b"f", 0)}
        self.touched: set[tuple[bytes | None, int]] = set()
        self.count = 0

    def choose(self, paths: list[bytes]) -> bytes:
        return self.data.draw(st.sampled_from(sorted(paths)))

    def free_name(self, *, not_below: bytes | None = None) -> bytes:
        folders = [b"", *(path for path, inode in self.tree.items() if inode in self.folders)]
        if not_below is not None:
            folders = [path for path in folders if not (path + b"/").startswith(not_below + b"/")]
        folder = self.choose(folders)
        name = self.data.draw(st.sampled_from([b"a", b"b", b"c", b"e", b"o300-1-0"]))
        path = folder + b"/" + name if folder else name
        self.count += 1
        return path + b"%d" % self.count if path in self.tree else path

    def is_empty(self, path: bytes) -> bool:
        return not any(other.startswith(path + b"/") for other in self.tree)

    def act(self) -> Step:
        kind = self.data.draw(st.sampled_from([CREATE, MKDIR, RENAME, LINK, REMOVE, TOUCH, RENAME]))
        if not self.tree or kind in (CREATE, MKDIR):
            return self.create(kind if kind in (CREATE, MKDIR) else CREATE)
        path = self.choose(list(self.tree))
        inode = self.tree[path]
        if (kind == LINK and inode in self.folders) or (kind == REMOVE and not self.is_empty(path)):
            kind = TOUCH
        self.touched.add(inode)
        if kind == TOUCH:
            return step(TOUCH, path)
        if kind == REMOVE:
            del self.tree[path]
            return step(REMOVE, path)
        if kind == LINK:
            new = self.free_name()
            self.tree[new] = inode
            return step(LINK, new, path)
        new = self.free_name(not_below=path)
        for other in [other for other in self.tree if (other + b"/").startswith(path + b"/")]:
            self.tree[new + other[len(path) :]] = self.tree.pop(other)
        return step(RENAME, path, new)

    def create(self, kind: int) -> Step:
        path, inode = self.free_name(), (None, 1000 + self.count)
        self.tree[path] = inode
        self.touched.add(inode)
        if kind == MKDIR:
            self.folders.add(inode)
        return step(kind, path, number=inode[1])


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_steps_that_can_be_taken(data: st.DataObject) -> None:
    model = Model(data)
    steps = [model.act() for _ in range(data.draw(st.integers(0, 30)))]
    assert set(touched(*steps)) == model.touched


EDITS = st.lists(
    st.tuples(st.sampled_from([DATA, HOLE, RESIZE]), st.integers(0, 40), st.integers(0, 20)), max_size=8
)


@settings(max_examples=60, deadline=None)
@given(before=st.integers(0, 40), edits=EDITS)
def test_ranges_tell_what_the_edits_did(before: int, edits: list[tuple[int, int, int]]) -> None:
    """A file of letters, edited as a receiver of the stream would: what is in neither set is as it was."""
    content = bytearray(b"p" * before)
    node = Node(b"file")
    for kind, offset, length in edits:
        if kind == RESIZE:
            content[offset:] = bytes(max(0, offset - len(content)))
            node.shortest = offset if node.shortest is None else min(node.shortest, offset)
            continue
        (node.data if kind == DATA else node.holes).append(packed((offset, length)))
        # A punch keeps the size.
        end = offset + length if kind == DATA else min(offset + length, len(content))
        content.extend(bytes(max(0, end - len(content))))
        content[offset:end] = (b"d" if kind == DATA else b"\0") * max(0, end - offset)
    size = len(content)
    changed, holes = changed_ranges([node], size, (8, before))
    assert not changed.intersect(holes)
    rebuilt = bytearray(b"p" * min(before, size)).ljust(size, b"\0")
    for extents, source in ((changed, content), (holes, bytes(size))):
        for offset, length in extents.pairs():
            assert offset + length <= size
            rebuilt[offset : offset + length] = source[offset : offset + length]
    assert rebuilt == content


def test_several_nodes_of_one_file() -> None:
    """Two names of it were used, which the parent's tree tells to be one inode."""
    one, other = Node(b"a"), Node(b"b")
    one.data = [packed((8, 4), (0, 4))]
    other.data = [packed((4, 4))]
    other.holes = [packed((10, 10))]
    changed, holes = changed_ranges([one, other], 15, None)
    assert changed == ExtentList.of([(0, 12)])
    assert holes == ExtentList.of([(12, 3)])


def test_blocks_at_both_ends_where_the_size_changed() -> None:
    assert changed_ranges([], 10000, (4096, 9000))[0] == ExtentList.of([(8192, 10000 - 8192)])
    assert changed_ranges([], 10000, (4096, 3))[0] == ExtentList.of([(0, 4096), (8192, 10000 - 8192)])
    assert changed_ranges([], 0, (4096, 3))[0] == ExtentList()
    assert changed_ranges([], 10000, (4096, 10000))[0] == ExtentList()
