"""The block map equals a plain dictionary, whatever is done to it, and shares what did not change."""

from __future__ import annotations

import hashlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from blocksnap.errors import DamageError
from blocksnap.repository.blockmap import (
    FANOUT,
    HOLE,
    ZERO,
    MapReader,
    MapRoot,
    MapWriter,
    decode_node,
    encode_node,
    levels_for,
)
from blocksnap.repository.errors import NewerFormatError


class Nodes:
    def __init__(self) -> None:
        self.stored: dict[bytes, bytes] = {}
        self.loads = 0

    def store(self, plain: bytes) -> bytes:
        id_ = hashlib.sha256(plain).digest()
        self.stored[id_] = plain
        return id_

    def load(self, id_: bytes) -> bytes:
        self.loads += 1
        return self.stored[id_]


def chunk(name: object) -> bytes:
    return hashlib.sha256(repr(name).encode()).digest()


def entries(reader: MapReader, root: MapRoot, count: int) -> list[bytes]:
    return [e for _, n, e in reader.runs(root, 0, count) for _ in range(n)]


steps = st.lists(
    st.tuples(st.integers(0, 9000), st.integers(1, 5000), st.sampled_from([HOLE, ZERO, b"a", b"b"])),
    max_size=8,
)


@settings(max_examples=80, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 9000), steps), min_size=1, max_size=4))
def test_a_chain_of_backups_equals_a_list(backups: list[tuple[int, list[tuple[int, int, bytes]]]]) -> None:
    nodes = Nodes()
    model: list[bytes] = []
    root: MapRoot | None = None
    history: list[tuple[MapRoot, list[bytes]]] = []
    for count, changes in backups:
        writer = MapWriter(MapReader(nodes.load), root, count, nodes.store)
        expected = (model + [HOLE] * count)[:count]
        position = 0
        for skip, length, what in changes:
            begin = position + skip % 700
            end = min(begin + length, count)
            if begin >= end:
                break
            if what in (HOLE, ZERO):
                writer.fill(begin, end, what)
                expected[begin:end] = [what] * (end - begin)
            else:
                end = min(end, begin + 200)
                for number in range(begin, end):
                    entry = chunk((what, number))
                    assert writer.set(number, entry) == (expected[number] != entry)
                    expected[number] = entry
            position = end
        root = writer.finish()
        assert root.levels == levels_for(count)
        reader = MapReader(nodes.load)
        assert entries(reader, root, count) == expected
        assert entries(reader, root, root.capacity)[count:] == [HOLE] * (root.capacity - count)
        for number in (0, count // 2, count - 1):
            assert reader.entry(root, number) == expected[number]
        for before_root, before in history:
            told = [n for one in reader.differences(root, before_root, count) for n in range(*one)]
            other = (before + [HOLE] * count)[:count]
            assert told == [
                n for n in range(count) if expected[n] != other[n] and {expected[n], other[n]} != {HOLE, ZERO}
            ]
        history.append((root, expected))
        model = expected


def test_a_difference_costs_what_differs() -> None:
    nodes = Nodes()
    first = MapWriter(MapReader(nodes.load), None, 60_000, nodes.store)
    for number in range(60_000):
        first.set(number, chunk(number))
    before = first.finish()
    second = MapWriter(MapReader(nodes.load), before, 60_000, nodes.store)
    second.set(30_000, chunk("new"))
    after = second.finish()
    nodes.loads = 0
    assert list(MapReader(nodes.load).differences(after, before, 60_000)) == [(30_000, 30_001)]
    assert nodes.loads == 2 * before.levels


def test_the_root_depends_on_content_only() -> None:
    nodes = Nodes()
    first = MapWriter(MapReader(nodes.load), None, 5000, nodes.store)
    for number in range(0, 5000, 7):
        first.set(number, chunk(number))
    one = first.finish()
    second = MapWriter(MapReader(nodes.load), None, 5000, nodes.store)
    second.fill(0, 4000, ZERO)
    other = second.finish()
    third = MapWriter(MapReader(nodes.load), other, 5000, nodes.store)
    for number in range(5000):
        if number % 7:
            third.fill(number, number + 1, HOLE)
        else:
            third.set(number, chunk(number))
    assert third.finish() == one


def test_an_unchanged_map_stores_no_node() -> None:
    nodes = Nodes()
    first = MapWriter(MapReader(nodes.load), None, 300_000, nodes.store)
    for number in range(1000):
        first.set(number * 299, chunk(number))
    root = first.finish()
    again = MapWriter(MapReader(nodes.load), root, 300_000, nodes.store)
    assert not any([again.set(number * 299, chunk(number)) for number in range(1000)])
    assert again.finish() == root
    assert again.nodes_written == 0


def test_a_change_writes_one_path() -> None:
    nodes = Nodes()
    first = MapWriter(MapReader(nodes.load), None, FANOUT**3, nodes.store)
    first.fill(0, FANOUT**3, ZERO)
    root = first.finish()
    assert root.entry == ZERO
    second = MapWriter(MapReader(nodes.load), root, FANOUT**3, nodes.store)
    second.set(12345, chunk(1))
    second.finish()
    assert second.nodes_written == 3


def test_growth_keeps_the_old_map_below_new_levels() -> None:
    nodes = Nodes()
    first = MapWriter(MapReader(nodes.load), None, 64, nodes.store)
    for number in range(64):
        first.set(number, chunk(number))
    small = first.finish()
    grown = MapWriter(MapReader(nodes.load), small, 5000, nodes.store)
    large = grown.finish()
    assert large.levels == 3
    assert grown.nodes_written == 2
    shrunk = MapWriter(MapReader(nodes.load), large, 64, nodes.store)
    assert shrunk.finish() == small


def test_going_back_is_refused() -> None:
    writer = MapWriter(MapReader(Nodes().load), None, 100, Nodes().store)
    writer.set(7, ZERO)
    with pytest.raises(ValueError, match="chunk 7"):
        writer.set(7, ZERO)


@given(st.lists(st.sampled_from([HOLE, ZERO, chunk(1), chunk(2)]), min_size=64, max_size=64))
def test_nodes_round_trip(entries: list[bytes]) -> None:
    plain = encode_node(3, entries)
    assert decode_node(plain, level=3, where="x") == entries
    with pytest.raises(DamageError):
        decode_node(plain, level=2, where="x")


@given(st.binary(max_size=300))
def test_hostile_nodes_are_refused_or_sound(plain: bytes) -> None:
    try:
        entries = decode_node(plain, level=0, where="x")
    except (DamageError, NewerFormatError):
        return
    assert encode_node(0, entries) == plain
