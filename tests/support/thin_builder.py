"""Writes dm-thin metadata of any size, with nodes shared copy-on-write between snapshots.

What stands in the file is what the kernel would have left after the same history: the rules for sharing,
times and new mappings are those of dm-thin-metadata.c, splitting and joining of nodes those of dm-btree, and
the reference counts in both space maps are right, so that ``thin_check`` accepts it. Nodes live in the file
alone, so memory does not grow with the number of mappings, and checksums are made for thousands of blocks at
once (``thin_checksums``), so that 134 million mappings are a matter of a minute or two.
"""

from __future__ import annotations

import mmap
import os
import random
import struct
from array import array
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self

from support.thin_checksums import seal_blocks
from support.thin_metadata import BLOCK_SIZE, NODE_SALT, SUPERBLOCK_SALT
from support.thin_space_maps import DataCounts, write_data_space_map, write_metadata_space_map

CHUNK_SIZE = 65536
TIME_MASK = 0xFFFFFF
SPACE_MAP_ROOT = struct.Struct("<QQQQ96x")
_HEADER = struct.Struct("<IIQIIII")
_INTERNAL, _LEAF = 1, 2

Change = tuple[int, int | None]
"""A chunk, and its new mapping or None to unmap it."""


class Node(NamedTuple):
    """A btree node in memory; its values are mappings, or the blocks of its children."""

    leaf: bool
    keys: Sequence[int]
    values: Sequence[int]


@dataclass(frozen=True, slots=True)
class BuiltDevice:
    """A thin device: its tree and its details."""

    root: int
    mapped: int
    transaction: int
    created: int
    snapshotted: int


def room(value_size: int) -> int:
    """Return how many entries a node has room for (dm-btree.c: calc_max_entries)."""
    return (BLOCK_SIZE - _HEADER.size) // (8 + value_size) // 3 * 3


MOST = room(8)
LEAST = MOST // 3


def parts(count: int, per_node: int, most: int) -> list[slice]:
    """Cut ``count`` entries into nodes of about ``per_node``, none of which is over ``most``."""
    number = max(1, count // per_node, -(-count // most))
    ends = [count * (n + 1) // number for n in range(number)]
    return [slice(begin, end) for begin, end in zip([0, *ends], ends, strict=False) if end > begin]


class ThinBuilder:
    """A pool's metadata, changed by the messages and requests that a pool gets; ``commit`` makes it valid."""

    def __init__(
        self,
        path: Path,
        *,
        blocks: int = 4096,
        data_blocks: int = 1 << 20,
        entries: tuple[int, int] = (LEAST, MOST),
    ) -> None:
        """Begin an empty pool in a sparse file of ``blocks`` metadata blocks.

        ``entries`` are the least and the most that a node may have; the tools insist on what is the default,
        while fewer make deep trees of little, and with a least of 1 some of whose subtrees are shorter.
        """
        self._least, self._most = entries
        self.path, self.blocks, self.data_blocks = path, blocks, data_blocks
        self.time = self.transaction = self.held_root = 0
        self.devices: dict[int, BuiltDevice] = {}
        self._next_data = 0
        self._free_data: list[int] = []
        self._next_block = 1
        self._free_blocks: list[int] = []
        self._unsealed: list[tuple[int, int]] = []
        self.taken: list[int] = []
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        try:
            os.ftruncate(fd, blocks * BLOCK_SIZE)
            self.image = mmap.mmap(fd, 0)
        finally:
            os.close(fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.image.close()

    # --- what a pool is told ---

    def create_thin(self, device_id: int) -> None:
        """Make an empty device."""
        self._open_transaction()
        root = self.save(Node(leaf=True, keys=(), values=()))
        self.devices[device_id] = BuiltDevice(root, 0, self.transaction, self.time, self.time)

    def create_snap(self, device_id: int, origin_id: int) -> None:
        """Make a snapshot: the pool's time goes on, and the root is shared."""
        self._open_transaction()
        self.time += 1
        origin = replace(self.devices[origin_id], snapshotted=self.time)
        self.devices[origin_id] = origin
        self.devices[device_id] = replace(origin, transaction=self.transaction, created=self.time)

    def delete(self, device_id: int) -> None:
        """Drop a device; what it alone used is free after ``reclaim``."""
        self._open_transaction()
        del self.devices[device_id]

    def write(self, device_id: int, chunks: Iterable[int]) -> dict[int, int]:
        """Write to chunks; return the data block that each write went to.

        A mapping older than the device's last snapshot counts as shared and is broken (dm-thin.c: bio_detain,
        break_sharing); any other is overwritten in place.
        """
        device = self.devices[device_id]
        changes: list[Change] = []
        written: dict[int, int] = {}
        for chunk, before in self.lookup(device.root, sorted(set(chunks))):
            value = before
            if value is None or value & TIME_MASK < device.snapshotted:
                value = self._allocate_data() << 24 | self.time
                changes.append((chunk, value))
            written[chunk] = value >> 24
        self.change(device_id, changes)
        return written

    def discard(self, device_id: int, chunks: Iterable[int]) -> None:
        """Unmap chunks."""
        self.change(device_id, [(chunk, None) for chunk in sorted(set(chunks))])

    def hold(self) -> int:
        """Take a metadata snapshot (reserve_metadata_snap) and return its block."""
        self._open_transaction()
        block = self.allocate_block()
        self._superblock(block, *self._upper_trees(), SPACE_MAP_ROOT.pack(0, 0, 0, 0) * 2)
        self.held_root = block
        return block

    # --- in bulk ---

    def fill(
        self,
        device_id: int,
        chunks: range,
        *,
        per_leaf: int | None = None,
        per_node: int | None = None,
        scattered_data: bool = False,
        scattered_nodes: bool = False,
    ) -> None:
        """Make a device that maps ``chunks``, with about so many entries a node.

        ``scattered_data`` and ``scattered_nodes`` put neighbours far apart, as random writes do.
        """
        self._open_transaction()
        begin, count = self._next_data, len(chunks)
        leaves = parts(count, per_leaf or self._most, self._most)
        self._next_data += len(leaves) * max((len(chunks[leaf]) for leaf in leaves), default=0)
        order = list(range(len(leaves)))
        if scattered_nodes:
            random.Random(count).shuffle(order)
        children = []
        # Blocks are written in their order, whichever leaf each is.
        for number in order:
            leaf = leaves[number]
            keys = chunks[leaf]
            # In a volume written at random neighbours are far apart: here by the number of leaves.
            step, first = (len(leaves), number) if scattered_data else (1, leaf.start)
            values = range((begin + first) << 24 | self.time, 1 << 64, step << 24)[: len(keys)]
            children.append((keys[0], self.save(Node(leaf=True, keys=keys, values=values))))
        children.sort()
        root = (
            self._stack(children, per_node or self._most)
            if children
            else self.save(Node(leaf=True, keys=(), values=()))
        )
        self.devices[device_id] = BuiltDevice(root, count, self.transaction, self.time, self.time)

    def change(self, device_id: int, changes: Sequence[Change]) -> None:
        """Map and unmap chunks, given in order, in one transaction: nodes on the way are copied."""
        if not changes:
            return
        self._open_transaction()
        device = self.devices[device_id]
        mapped = device.mapped
        for (_, before), (_, after) in zip(
            self.lookup(device.root, [chunk for chunk, _ in changes]), changes, strict=True
        ):
            mapped += (after is not None) - (before is not None)
        root = self._save_root(self._changed(device.root, changes))
        self.devices[device_id] = replace(device, root=root, mapped=mapped)

    def lookup(self, root: int, chunks: Sequence[int]) -> Iterator[Change]:
        """Yield chunks, given in order, with their mappings."""
        if not chunks:
            return
        node = self.read(root)
        if node.leaf:
            found = dict(zip(node.keys, node.values, strict=True))
            yield from ((chunk, found.get(chunk)) for chunk in chunks)
            return
        for child, (begin, end) in zip(node.values, _shares(node.keys, chunks), strict=True):
            yield from self.lookup(child, chunks[begin:end])

    # --- nodes ---

    def read(self, block: int) -> Node:
        """Return a node of a mapping tree."""
        at = block * BLOCK_SIZE
        _, kind, number, count, most, size, _ = _HEADER.unpack_from(self.image, at)
        assert (number, size) == (block, 8)
        keys, values = array("Q"), array("Q")
        keys.frombytes(self.image[at + 32 : at + 32 + 8 * count])
        values.frombytes(self.image[at + 32 + 8 * most : at + 32 + 8 * (most + count)])
        return Node(leaf=kind == _LEAF, keys=keys, values=values)

    def graft(self, device_id: int, root: int, mapped: int) -> None:
        """Give a device a tree that was made with ``save``."""
        self.devices[device_id] = BuiltDevice(root, mapped, self.transaction, self.time, self.time)

    def save(self, node: Node, block: int | None = None) -> int:
        """Write a node and return its block."""
        return self.save_raw(
            array("Q", node.keys).tobytes(), array("Q", node.values).tobytes(), 8, leaf=node.leaf, block=block
        )

    def save_raw(
        self, keys: bytes, values: bytes, value_size: int, *, leaf: bool, block: int | None = None
    ) -> int:
        """Write a node of packed keys and values and return its block."""
        most = room(value_size)
        if block is None:
            block = self.allocate_block()
        kind = _LEAF if leaf else _INTERNAL
        header = _HEADER.pack(0, kind, block, len(keys) // 8, most, value_size, 0)
        content = b"".join((header, keys.ljust(8 * most, b"\0"), values))
        self.put(block, content, NODE_SALT)
        return block

    def put(self, block: int, content: bytes, salt: int) -> None:
        """Write a whole block whose checksum is made later."""
        self.image[block * BLOCK_SIZE : (block + 1) * BLOCK_SIZE] = content.ljust(BLOCK_SIZE, b"\0")
        self._unsealed.append((block, salt))

    def tree(self, entries: Sequence[tuple[int, bytes]], value_size: int) -> int:
        """Write a tree of any values, given in order, and return its root."""
        if not entries:
            return self.save_raw(b"", b"", value_size, leaf=True)
        children = []
        for part in parts(len(entries), room(value_size), room(value_size)):
            keys = array("Q", (key for key, _ in entries[part])).tobytes()
            values = b"".join(value for _, value in entries[part])
            children.append((entries[part][0][0], self.save_raw(keys, values, value_size, leaf=True)))
        return self._stack(children, room(8), room(8))

    def _stack(self, children: list[tuple[int, int]], per_node: int, most: int | None = None) -> int:
        """Put internal nodes on top of nodes until there is one; return it."""
        while len(children) > 1:
            children = [
                (children[part][0][0], self.save(_internal(children[part])))
                for part in parts(len(children), per_node, most or self._most)
            ]
        return children[0][1]

    def _changed(self, block: int, changes: Sequence[Change]) -> list[Node]:
        """Return the nodes, yet to be written, that take the place of one: none, one or several."""
        node = self.read(block)
        if node.leaf:
            merged: dict[int, int | None] = dict(zip(node.keys, node.values, strict=True))
            merged.update(changes)
            return self._cut(
                True, [(key, value) for key, value in sorted(merged.items()) if value is not None]
            )
        children: list[tuple[int, int | Node]] = []
        shares = _shares(node.keys, [chunk for chunk, _ in changes])
        for key, child, (begin, end) in zip(node.keys, node.values, shares, strict=True):
            if begin == end:
                children.append((key, child))
                continue
            pieces = self._changed(child, changes[begin:end])
            # The bound of a child stays where it was when its first keys go, and goes down for a lower one.
            bounds = [min(key, piece.keys[0]) if n == 0 else piece.keys[0] for n, piece in enumerate(pieces)]
            children += zip(bounds, pieces, strict=True)
        self._join_small(children)
        if len(children) == 1:
            # An only child is lifted into its parent.
            return [self._node(children[0][1])]
        return self._cut(False, [(key, self._saved(child)) for key, child in children])

    def _join_small(self, children: list[tuple[int, int | Node]]) -> None:
        """Join nodes under a third full with a neighbour (dm-btree-remove.c: rebalance_children)."""
        at = 0
        while at < len(children) and len(children) > 1:
            one = children[at][1]
            if isinstance(one, int) or len(one.keys) >= self._least:
                at += 1
                continue
            left = at - 1 if at else 0
            pair = [self._node(child) for _, child in children[left : left + 2]]
            if pair[0].leaf != pair[1].leaf:
                at += 1
                continue
            entries = [entry for each in pair for entry in zip(each.keys, each.values, strict=True)]
            joined = self._cut(pair[0].leaf, entries)
            bounds = [children[left][0], *(piece.keys[0] for piece in joined[1:])]
            children[left : left + 2] = zip(bounds, joined, strict=True)
            at = left + len(joined)

    def _cut(self, leaf: bool, entries: Sequence[tuple[int, int]]) -> list[Node]:
        """Make nodes of entries: more than fit one are divided evenly, as a split does."""
        return [
            Node(
                leaf=leaf,
                keys=[key for key, _ in entries[part]],
                values=[value for _, value in entries[part]],
            )
            for part in parts(len(entries), self._most, self._most)
        ]

    def _node(self, child: int | Node) -> Node:
        return self.read(child) if isinstance(child, int) else child

    def _saved(self, child: int | Node) -> int:
        return child if isinstance(child, int) else self.save(child)

    def _save_root(self, nodes: list[Node]) -> int:
        if not nodes:
            return self.save(Node(leaf=True, keys=(), values=()))
        if len(nodes) > 1:
            return self._stack([(node.keys[0], self.save(node)) for node in nodes], self._most)
        return self.save(nodes[0])

    # --- space ---

    def allocate_block(self) -> int:
        """Return a free metadata block."""
        if self._free_blocks:
            block = self._free_blocks.pop()
        else:
            block = self._next_block
            self._next_block += 1
        if block >= self.blocks:
            raise ValueError(f"{self.blocks} metadata blocks are too few")
        self.taken.append(block)
        return block

    def _allocate_data(self) -> int:
        if self._free_data:
            return self._free_data.pop()
        self._next_data += 1
        if self._next_data > self.data_blocks:
            raise ValueError(f"{self.data_blocks} data blocks are too few")
        return self._next_data - 1

    def _open_transaction(self) -> None:
        self.transaction += 1

    def reclaim(self) -> None:
        """Commit, and let what nobody uses any more be used again, as the kernel does after a commit."""
        counts, data = self.commit()
        self._free_blocks = [block for block in range(1, self._next_block) if not counts[block]]
        self._free_data = [block for block in range(self._next_data) if not data.count(block)]

    # --- commit ---

    def commit(self) -> tuple[array[int], DataCounts]:
        """Write upper trees, space maps and superblock; return how often each block is referred to."""
        mapping, details = self._upper_trees()
        roots = [(mapping, details)]
        if self.held_root:
            roots.append(struct.unpack_from("<QQ", self.image, self.held_root * BLOCK_SIZE + 320))
        counts, data = self._count(roots)
        self.taken.clear()
        data_root = write_data_space_map(self, data)
        metadata_root = write_metadata_space_map(self, counts)
        self._superblock(0, mapping, details, data_root + metadata_root)
        seal_blocks(self.image, self._unsealed)
        self._unsealed.clear()
        return counts, data

    def _upper_trees(self) -> tuple[int, int]:
        ordered = sorted(self.devices.items())
        mapping = self.tree([(number, struct.pack("<Q", device.root)) for number, device in ordered], 8)
        packed = [
            (n, struct.pack("<QQII", d.mapped, d.transaction, d.created, d.snapshotted)) for n, d in ordered
        ]
        return mapping, self.tree(packed, 24)

    def _superblock(self, block: int, mapping: int, details: int, space_maps: bytes) -> None:
        held = self.held_root if block == 0 else 0
        head = struct.pack("<IIQ16xQIIQQ", 0, 0, block, 27022010, 2, self.time, self.transaction, held)
        tail = struct.pack("<QQIIQIII", mapping, details, CHUNK_SIZE // 512, 8, self.blocks, 0, 0, 0)
        self.put(block, head + space_maps + tail, SUPERBLOCK_SALT)

    def _count(self, roots: Iterable[tuple[int, int]]) -> tuple[array[int], DataCounts]:
        """Count references: a node's from its parents, a data block's from leaves."""
        counts = array("I", bytes(4 * self.blocks))
        data = DataCounts(self.data_blocks)
        counts[0] = 1
        if self.held_root:
            counts[self.held_root] = 1
        for mapping, details in roots:
            self._walk(details, counts, lambda _: None, leaves_only=True)
            self._walk(mapping, counts, lambda node: self._walk_devices(node, counts, data))
        return counts, data

    def _walk_devices(self, upper_leaf: Node, counts: array[int], data: DataCounts) -> None:
        for root in upper_leaf.values:
            self._walk(root, counts, data.add_leaf)

    def _walk(
        self, root: int, counts: array[int], visit: Callable[[Node], None], *, leaves_only: bool = False
    ) -> None:
        pending = [root]
        while pending:
            block = pending.pop()
            counts[block] += 1
            if counts[block] > 1:
                continue
            kind = struct.unpack_from("<I", self.image, block * BLOCK_SIZE + 4)[0]
            if kind == _LEAF and leaves_only:
                continue
            node = self.read(block)
            if node.leaf:
                visit(node)
            else:
                pending += node.values


def _internal(children: Sequence[tuple[int, int]]) -> Node:
    return Node(leaf=False, keys=[key for key, _ in children], values=[block for _, block in children])


def _shares(keys: Sequence[int], chunks: Sequence[int]) -> list[tuple[int, int]]:
    """Say for each child which of the chunks, given in order, are its business."""
    ends = [bisect_left(chunks, key) for key in keys[1:]] + [len(chunks)]
    return list(zip([0, *ends], ends, strict=False))
