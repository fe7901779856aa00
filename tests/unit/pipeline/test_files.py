"""Many files in one flow: every chunk of every file, in order, whatever goes wrong."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
from blake3 import blake3

from blocksnap.pipeline.files import FileReadError, FilesFlow
from blocksnap.pipeline.protocols import Sealer

CHUNK = 16 << 10


@dataclass(frozen=True)
class Item:
    inode: int
    size: int
    ranges: Sequence[tuple[int, int]]


class Sink:
    """Keeps chunks as they are."""

    overhead = 0

    def __init__(self) -> None:
        self.stored: dict[bytes, bytes] = {}
        self.claimed: set[bytes] = set()

    def identify(self, plain: memoryview) -> bytes:
        return blake3(plain).digest()

    def claim(self, id_: bytes) -> bool:
        is_new = id_ not in self.claimed
        self.claimed.add(id_)
        return is_new

    def new_sealer(self) -> Sealer:
        return _Copying()

    def store(self, id_: bytes, frame: memoryview, plain_length: int) -> None:
        assert len(frame) == plain_length
        self.stored[id_] = bytes(frame)


class _Copying:
    def seal_into(self, id_: bytes, plain: memoryview, out: memoryview) -> int:
        del id_
        out[: len(plain)] = plain
        return len(plain)


@pytest.fixture
def files(tmp_path: Path) -> Callable[[dict[int, bytes]], Callable[[int], int]]:
    def make(contents: dict[int, bytes]) -> Callable[[int], int]:
        for inode, content in contents.items():
            (tmp_path / str(inode)).write_bytes(content)
        return lambda inode: os.open(tmp_path / str(inode), os.O_RDONLY)

    return make


def take(flow: FilesFlow[Item]) -> None:
    for _, results in flow.walked():
        list(results)


Files = Callable[[dict[int, bytes]], Callable[[int], int]]


def whole(inode: int, content: bytes) -> Item:
    return Item(inode, len(content), [(0, -(-len(content) // CHUNK))] if content else [])


@pytest.mark.parametrize("workers", [1, 2])
def test_every_chunk_in_order(files: Files, workers: int) -> None:
    contents = {n: bytes([n % 256]) * (n * 997 % 70_000) for n in range(300)} | {500: os.urandom(5 << 20)}
    items = [whole(inode, content) for inode, content in contents.items()]
    # Many in a row that have nothing to read do not hold up those before and behind them.
    items[100:100] = [Item(9000 + n, 0, []) for n in range(3000)]
    sink, found = Sink(), dict[int, list[tuple[bytes | None, int]]]()
    with FilesFlow(iter(items), files(contents), CHUNK, sink, workers=workers) as flow:
        for item, results in flow.walked():
            if item.inode < 9000:
                found[item.inode] = [(r.id, r.length) for r in results]
    # One worker may have claimed for a later file what the other meets in an earlier one.
    assert contents == {
        inode: b"".join(sink.stored[id_] if id_ else bytes(length) for id_, length in results)
        for inode, results in found.items()
    }


def test_parts_of_files_and_zeros(files: Files) -> None:
    content = os.urandom(CHUNK) + bytes(CHUNK * 2) + os.urandom(CHUNK) + bytes(100)
    item = Item(1, len(content), [(1, 2), (3, 5)])
    sink = Sink()
    with FilesFlow([item], files({1: content}), CHUNK, sink) as flow:
        results = next(list(results) for _, results in flow.walked())
    assert [(r.number, r.id is None, r.length) for r in results] == [
        (1, True, CHUNK), (3, False, CHUNK), (4, True, 100),
    ]  # fmt: skip
    assert len(sink.stored) == 1


def test_a_file_that_cannot_be_read(files: Files) -> None:
    contents = {1: b"one", 2: b"two"}
    opening = files(contents)
    items = [whole(1, b"one"), Item(3, 10, [(0, 1)]), whole(2, b"two")]
    with FilesFlow(items, opening, CHUNK, Sink()) as flow, pytest.raises(FileReadError, match="inode 3"):
        take(flow)
    with FilesFlow([Item(1, 10, [(0, 1)])], opening, CHUNK, Sink()) as flow:
        with pytest.raises(FileReadError, match="it ends there"):
            take(flow)


def test_a_walk_that_fails(files: Files) -> None:
    def walk() -> Iterator[Item]:
        yield from (whole(1, b"one") for _ in range(50))
        raise ValueError("the tree makes no sense")

    with FilesFlow(walk(), files({1: b"one"}), CHUNK, Sink()) as flow:
        with pytest.raises(ValueError, match="no sense"):
            take(flow)


def test_whoever_gives_up_leaves_no_thread(files: Files) -> None:
    endless = (Item(1, 3, [(0, 1)]) for _ in iter(int, 1))
    with FilesFlow(endless, files({1: b"one"}), CHUNK, Sink()) as flow:
        next(flow.walked())
    idle = (Item(1, 0, []) for _ in iter(int, 1))
    with FilesFlow(idle, files({1: b"one"}), CHUNK, Sink()) as flow:
        next(flow.walked())
