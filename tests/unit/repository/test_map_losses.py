"""What is lost of maps is found in work and memory that go with what is stored, not how often."""

from __future__ import annotations

import random
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice, pairwise
from pathlib import Path

import pytest

from blocksnap.errors import DamageError
from blocksnap.operations import losses as known
from blocksnap.operations.catalogue import map_root
from blocksnap.operations.losses import current_losses
from blocksnap.operations.repair import RepairOptions, repair
from blocksnap.operations.reporting import Quiet
from blocksnap.operations.verify import verify_repository
from blocksnap.repository import repairing
from blocksnap.repository.blockmap import FANOUT, HOLE, ZERO, Entry, MapReader, MapRoot, encode_node
from blocksnap.repository.check import Checker
from blocksnap.repository.documents import Inodes
from blocksnap.repository.frame import FrameType
from blocksnap.repository.inodes import InodeRecord, encode_page
from blocksnap.repository.losses import MOST_LISTED
from blocksnap.repository.map_losses import MapLosses, Measure
from blocksnap.repository.repair_plan import Planner
from support.inode_trees import chunk
from support.repositories import CHUNK, make_repository, open_repository, open_writer
from support.shared_maps import commit_map, lose_data, store_shared_map

MOST_BYTES = 48 << 20


class Nodes:
    """Nodes in memory, named by a number; counts how many are read."""

    def __init__(self) -> None:
        self._nodes: dict[bytes, bytes] = {}
        self.loads = 0

    def add(self, level: int, entries: list[Entry]) -> bytes:
        id_ = len(self._nodes).to_bytes(32, "big")
        self._nodes[id_] = encode_node(level, entries)
        return id_

    def load(self, id_: bytes) -> bytes:
        self.loads += 1
        if id_ not in self._nodes:
            raise DamageError("it is not there")
        return self._nodes[id_]


def name(seed: int) -> bytes:
    return seed.to_bytes(32, "little")


@contextmanager
def bounded_memory() -> Iterator[None]:
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < MOST_BYTES
    finally:
        tracemalloc.stop()


def random_map(luck: random.Random, nodes: Nodes, levels: int) -> MapRoot:
    """Make a map of few nodes on each level; some are missing, some are one level too high or low."""
    below = [name(1 << 64 | n) for n in range(6)]
    for level in range(levels):
        choice = [*below, HOLE, ZERO, name(2 << 64)]
        made = []
        for _ in range(3):
            runs = [[luck.choice(choice)] * luck.randrange(1, 20) for _ in range(FANOUT)]
            made.append(nodes.add(level, [entry for run in runs for entry in run][:FANOUT]))
        below = [*made, *below[:1]]
    return MapRoot(levels, below[0])


def brute_losses(
    nodes: Nodes, entry: Entry, level: int, at: int, bad: frozenset[bytes]
) -> Iterator[tuple[int, int]]:
    if len(entry) != 32:
        return
    if entry in bad:
        yield at, at + FANOUT**level
    elif level:
        span = FANOUT ** (level - 1)
        try:
            children = MapReader(nodes.load).node(entry, level - 1)
        except DamageError:
            yield at, at + FANOUT**level
            return
        for slot, child in enumerate(children):
            yield from brute_losses(nodes, child, level - 1, at + slot * span, bad)


@pytest.mark.parametrize("seed", range(12))
def test_what_is_remembered_of_shared_nodes_is_what_is_there(seed: int) -> None:
    luck, nodes = random.Random(seed), Nodes()
    bad = frozenset(name(1 << 64 | n) for n in luck.sample(range(6), 2))
    root = random_map(luck, nodes, 3)
    found = brute_losses(nodes, root.entry, root.levels, 0, bad)
    lost = {n for begin, end in found for n in range(begin, end)}
    losses = MapLosses(MapReader(nodes.load), bad, bad)
    ends = [0, root.capacity, *(luck.randrange(root.capacity) for _ in range(6))]
    for begin, end in [(min(pair), max(pair)) for pair in zip(ends, reversed(ends), strict=True)]:
        ranges = list(losses.ranges(root, begin, end))
        inside = {n for n in lost if begin <= n < end}
        assert {n for first, last in ranges for n in range(first, last)} == inside
        assert all(one[1] < other[0] for one, other in pairwise(ranges))
        measure = Measure(len(inside), len(ranges), min(inside), max(inside) + 1) if inside else Measure()
        assert losses.measure(root, begin, end) == measure


def test_a_node_that_is_whole_is_lost_where_it_stands_at_another_level() -> None:
    nodes = Nodes()
    leaf = nodes.add(0, [name(1 << 64)] * FANOUT)
    middle = nodes.add(1, [leaf] * FANOUT)
    high = nodes.add(2, [middle, leaf, *[HOLE] * (FANOUT - 2)])
    losses = MapLosses(MapReader(nodes.load), (), ())
    assert losses.measure(MapRoot(2, middle), 0, FANOUT**2) == Measure()
    assert list(losses.ranges(MapRoot(3, high), 0, FANOUT**3)) == [(FANOUT**2, 2 * FANOUT**2)]


def test_ten_levels_of_one_node_each_are_ten_nodes_of_work() -> None:
    nodes = Nodes()
    id_ = nodes.add(0, [name(1 << 64), HOLE] * (FANOUT // 2))
    for level in range(1, 10):
        id_ = nodes.add(level, [id_] * FANOUT)
    root, bad = MapRoot(10, id_), {name(1 << 64)}
    losses = MapLosses(MapReader(nodes.load), bad, bad)
    with bounded_memory():
        half = root.capacity // 2
        assert losses.measure(root, 0, root.capacity) == Measure(half, half, 0, root.capacity - 1)
        assert list(islice(losses.ranges(root, 0, root.capacity), 100)) == [
            (n, n + 1) for n in range(0, 200, 2)
        ]
        assert losses.measure(root, 101, root.capacity - 1).chunks == half - 51
    assert nodes.loads == 10


def store_hostile(path: Path, levels: int) -> tuple[str, str]:
    """Store two backups that need one chunk: once, and in every second place of a large map."""
    with open_writer(open_repository(path)) as run:
        entry = run.store_blob(FrameType.DATA, chunk(1))
        small = commit_map(run, store_shared_map(run, [entry, *[HOLE] * 63], 1), "small")
    with open_writer(open_repository(path)) as run:
        root = store_shared_map(run, [entry, HOLE] * (FANOUT // 2), levels)
        large = commit_map(run, root, "large")
    return small, large


def test_a_check_tells_no_more_ranges_than_anybody_reads(tmp_path: Path) -> None:
    make_repository(tmp_path / "r")
    small, large = store_hostile(tmp_path / "r", 8)
    lose_data(tmp_path / "r")
    checker = Checker(open_repository(tmp_path / "r"), map_root, lambda _: None)
    with bounded_memory():
        checker.check_structure()
        checker.name_losses()
    told = {each.backup: each for each in checker.result.harmed}
    assert told.keys() == {small, large}
    assert (told[small].ranges, told[small].size_bytes, told[small].left_out) == (1, CHUNK, "")
    half = FANOUT**8 // 2
    assert (told[large].ranges, told[large].size_bytes) == (half, half * CHUNK)
    assert [loss.offset for loss in told[large].first] == [n * 2 * CHUNK for n in range(MOST_LISTED)]
    messages = [each.message for each in checker.result.findings if large[:8] in each.object]
    assert len(messages) == MOST_LISTED + 1
    assert f"{half - MOST_LISTED} more ranges, {half * CHUNK} bytes in all" in messages[-1]
    assert told[large].figures == {
        "backup": large, "volume": "large", "ranges": half, "bytes": half * CHUNK, "listed": MOST_LISTED,
    }  # fmt: skip


def test_a_repair_writes_down_that_all_is_lost_and_the_rest_comes_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "r"
    make_repository(path)
    small, large = store_hostile(path, 8)
    lose_data(path)
    for segment in (path / "index").iterdir():
        segment.unlink()
    monkeypatch.setattr(repairing, "_MOST_RANGES", 6)
    monkeypatch.setattr(known, "_MOST", 500)
    with bounded_memory():
        done = repair(open_repository(path), frozenset(), RepairOptions(), Quiet())
    assert done.plan.listed
    assert {each.backup: each.ranges for each in done.plan.harmed} == {small: 1, large: FANOUT**8 // 2}
    repository = open_repository(path)
    (record,) = repository.aside_records().values()
    assert [(each.backup, each.offset) for each in record.ranges] == [
        (small, 0),
        *((large, n * 2 * CHUNK) for n in range(3)),
    ]
    assert record.ranges[-1].offset + record.ranges[-1].length == (FANOUT**8 - 1) * CHUNK
    backups = {stored.backup.id: stored.backup for stored in repository.backups()}
    with bounded_memory():
        lost = current_losses(repository, backups[large])
        assert lost.total_bytes == FANOUT**8 // 2 * CHUNK
        covering = list(lost.covering())
    assert covering[:2] == [(0, CHUNK), (2 * CHUNK, CHUNK)]
    assert sum(covering[-1]) == (FANOUT**8 - 1) * CHUNK
    assert sum(length for _, length in covering) >= lost.total_bytes
    # Nothing is left to be written down, and nothing is given up by it.
    assert repair(open_repository(path), frozenset(), RepairOptions(), Quiet()).done is None
    with open_writer(repository) as run:
        run.store_again(FrameType.DATA, run.identify(FrameType.DATA, chunk(1)), chunk(1))
        run.flush()
    assert Planner(open_repository(path), map_root).plan().is_whole


def test_a_page_of_inodes_that_stands_everywhere_is_looked_at_once(tmp_path: Path) -> None:
    make_repository(tmp_path / "r")
    with open_writer(open_repository(tmp_path / "r")) as run:
        entry = run.store_blob(FrameType.DATA, chunk(1))
        content = store_shared_map(run, [entry, HOLE] * (FANOUT // 2), 5)
        file = InodeRecord(
            number=1, generation=1, mode=0o100644, uid=0, gid=0, nlink=1, flags=0,
            size=content.capacity * CHUNK, device=(0, 0), mtime=0, atime=0, ctime=0, otime=0, content=content,
        )  # fmt: skip
        page = run.store_blob(FrameType.INODES, encode_page([file]))
        root = store_shared_map(run, [page] * FANOUT, 7)
        tree = commit_map(run, root, "tree", inodes=Inodes(pages=root.capacity, count=1))
    lose_data(tmp_path / "r")
    with bounded_memory():
        plan = Planner(open_repository(tmp_path / "r"), map_root).plan()
    (found,) = plan.harmed
    ranges = root.capacity * content.capacity // 2
    assert (found.backup, found.ranges, found.size_bytes) == (tree, ranges, ranges * CHUNK)
    assert len(plan.losses) == MOST_LISTED
    assert {(loss.inode, loss.length) for loss in plan.losses} == {(1, CHUNK)}


def test_a_verify_tells_the_first_and_counts_the_rest(tmp_path: Path) -> None:
    make_repository(tmp_path / "r")
    with open_writer(open_repository(tmp_path / "r")) as run:
        missing = run.identify(FrameType.NODE, b"nowhere")
        middle = run.store_node(encode_node(1, [missing] * FANOUT))
        top = run.store_node(encode_node(2, [middle] * FANOUT))
        commit_map(run, MapRoot(3, top), "large")
    repository = open_repository(tmp_path / "r")
    (stored,) = repository.backups()
    *first, rest = verify_repository(repository, stored.backup, Quiet())
    span = FANOUT * CHUNK
    assert [err.brief.split(" cannot")[0] for err in first] == [
        f"bytes {n * span} to {(n + 1) * span}" for n in range(1000)
    ]
    assert rest.brief == f"{FANOUT**2 - 1000} more places cannot be read"
