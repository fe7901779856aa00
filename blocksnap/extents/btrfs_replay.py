"""Which inodes the steps of a send stream touch: found by following them on the parent's tree.

A send stream names everything by the path it has at that moment. New inodes are made under temporary names
and renamed, directories move with all that is below them, and a name can be given to another inode before the
stream comes to the one that had it. So the steps are followed: each name that is touched is a node, which
knows where it was in the parent, or that it is new. To ask the later snapshot for the path in the end would
take the same replay, and could not tell a name that was removed from one that was given away; the parent's
tree answers for both. Memory is bounded by the steps, not by the tree.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from blocksnap.extents.model import ExtentList

Step = tuple[int, bytes, bytes, int, bytes | None]
"""(kind, path, other, number, ranges) as ``_native.btrfs_send`` tells it."""


@dataclass(slots=True, eq=False)
class Node:
    """What a name led to when a step first used it; after that it may have other names, or none.

    ``base`` is its path in the parent; for what is new it is None, and ``number`` is the inode.
    """

    base: bytes | None
    number: int = 0
    data: list[bytes] = field(default_factory=list)
    """Packed ranges that may have other bytes."""
    holes: list[bytes] = field(default_factory=list)
    """Packed ranges that read as zeros, except for what is in ``data`` too."""
    shortest: int | None = None
    """The smallest size it was given: what the parent had from there on is gone."""
    is_directory: bool = False
    """Of what is new; the parent tells of the rest."""
    lost_a_name: bool = False
    """Whether a name of it was removed. It may have others."""
    names: dict[bytes, Node | None] | None = None
    """What is known of the names in it; None stands for one that is gone."""


class Replay:
    """The parent's tree as far as steps have touched it."""

    def __init__(self) -> None:
        self.root = Node(b"")
        self._touched: dict[Node, None] = {}

    def follow(self, steps: Iterable[Step]) -> list[Node]:
        """Take the steps, and return every node that they touch, in the order in which they do.

        Raises ValueError when a step cannot be taken, as when it names what was removed before.
        """
        from blocksnap import _native

        take = {
            _native.STEP_CREATE: self._create,
            _native.STEP_CREATE_DIRECTORY: self._create_directory,
            _native.STEP_RENAME: self._rename,
            _native.STEP_LINK: self._link,
            _native.STEP_REMOVE: self._remove,
            _native.STEP_DATA: self._data,
            _native.STEP_HOLE: self._hole,
            _native.STEP_RESIZE: self._resize,
            _native.STEP_TOUCH: self._touch,
        }
        for kind, path, other, number, ranges in steps:
            take[kind](path, other, number, ranges or b"")
        return list(self._touched)

    def _create(self, path: bytes, _other: bytes, number: int, _ranges: bytes) -> None:
        self._put(path, Node(None, number))

    def _create_directory(self, path: bytes, _other: bytes, number: int, _ranges: bytes) -> None:
        self._put(path, Node(None, number, is_directory=True))

    def _rename(self, path: bytes, other: bytes, _number: int, _ranges: bytes) -> None:
        node = self._find(path)
        self._put(path, None)
        self._put(other, node)

    def _link(self, path: bytes, other: bytes, _number: int, _ranges: bytes) -> None:
        self._put(path, self._find(other))

    def _remove(self, path: bytes, _other: bytes, _number: int, _ranges: bytes) -> None:
        self._mark(self._find(path)).lost_a_name = True
        self._put(path, None)

    def _data(self, path: bytes, _other: bytes, _number: int, ranges: bytes) -> None:
        self._mark(self._find(path)).data.append(ranges)

    def _hole(self, path: bytes, _other: bytes, _number: int, ranges: bytes) -> None:
        self._mark(self._find(path)).holes.append(ranges)

    def _resize(self, path: bytes, _other: bytes, number: int, _ranges: bytes) -> None:
        node = self._mark(self._find(path))
        node.shortest = number if node.shortest is None else min(node.shortest, number)

    def _touch(self, path: bytes, _other: bytes, _number: int, _ranges: bytes) -> None:
        self._mark(self._find(path))

    def _mark(self, node: Node) -> Node:
        self._touched[node] = None
        return node

    def _find(self, path: bytes) -> Node:
        node = self.root
        if not path:
            return node
        for name in path.split(b"/"):
            if node.names is None:
                node.names = {}
            if name not in node.names:
                if node.base is None:
                    raise ValueError(f"{path!r} is named in a send stream, and cannot be there")
                node.names[name] = Node(b"%s/%s" % (node.base, name) if node.base else name)
            found = node.names[name]
            if found is None:
                raise ValueError(f"{path!r} is named in a send stream after it was removed")
            node = found
        return node

    def _put(self, path: bytes, node: Node | None) -> None:
        """Give a name to a node, or to none.

        It touches the node. A directory in which names differ has its own steps; one in which something is
        only on its way to its place, as all that is new is in the top directory, is not touched.
        """
        folder, _, name = path.rpartition(b"/")
        if not name:
            raise ValueError("a send stream wants to move the subvolume itself")
        parent = self._find(folder)
        if parent.names is None:
            parent.names = {}
        replaced = parent.names.get(name)
        if node is not None and replaced is not None:
            replaced.lost_a_name = True
        parent.names[name] = node
        if node is not None:
            self._mark(node)


def changed_ranges(
    nodes: Iterable[Node], size: int, end: tuple[int, int] | None
) -> tuple[ExtentList, ExtentList]:
    """Return (changed, holes) of a file of ``size`` bytes, of which the stream touched these nodes.

    ``end`` are the block size and the size that the parent's file had, if the parent had one: where it
    differs, the blocks at both ends count as changed.
    """
    changed = ExtentList()
    emptied: list[tuple[int, int]] = []
    for node in nodes:
        for packed in node.data:
            changed = changed.union(ExtentList.of(ExtentList(packed).pairs()))
        for packed in node.holes:
            emptied += ExtentList(packed).pairs()
        if node.shortest is not None:
            emptied.append((node.shortest, max(0, size - node.shortest)))
    if end is not None and end[1] != size:
        block, before = end
        changed = changed.union(
            ExtentList.of((at // block * block, block) for at in (before, max(0, size - 1)))
        )
    changed = changed.clip(size)
    return changed, ExtentList.of(emptied).clip(size).intersect(ExtentList.of(_gaps(changed, size)))


def _gaps(extents: ExtentList, size: int) -> Iterator[tuple[int, int]]:
    at = 0
    for offset, length in extents.pairs():
        yield at, offset - at
        at = offset + length
    yield at, size - at
