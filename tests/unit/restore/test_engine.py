"""Restores equal what was stored; damage is named by range and never restored."""

from __future__ import annotations

import errno
import io
import os
import random
import threading
import tracemalloc
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from blocksnap.errors import DamageError, TargetError
from blocksnap.pipeline.flow import Geometry
from blocksnap.repository.blockmap import HOLE, ZERO, Entry, MapReader, MapRoot, MapWriter
from blocksnap.repository.errors import MissingChunkError
from blocksnap.repository.frame import FrameType
from blocksnap.repository.lookup import Location
from blocksnap.repository.pack import PackId
from blocksnap.repository.repository import Repository
from blocksnap.restore import engine, naming, plan
from blocksnap.restore.engine import (
    Losses,
    UnreadableChunkError,
    restore_runs,
    restore_to_stream,
    restore_to_target,
    verify_chunks,
)
from blocksnap.restore.file_target import ExistingFileTarget, FileTarget
from blocksnap.restore.plan import Window, plan_windows, planned_ahead
from blocksnap.restore.record import RestoreRecord
from blocksnap.restore.targets import TargetExistsError
from blocksnap.system import blockdev
from support.repositories import CHUNK, make_repository, open_repository, open_writer, store_bytes

GEOMETRY = Geometry(CHUNK * 600 + 123, CHUNK)
RECORD = RestoreRecord(repository="00" * 16, backup="1234567890abcdef" * 2, mode="whole")


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, MapRoot, bytes]:
    """Return a repository's place with a map of data, repeated data, zeros and holes, and what it holds."""
    folder = tmp_path_factory.mktemp("stored")
    repository = make_repository(folder / "r")
    dice = random.Random(8)
    blocks = [dice.randbytes(CHUNK) for _ in range(40)]
    content = bytearray()
    for number in range(GEOMETRY.count):
        kind = dice.randrange(6)
        content += bytes(CHUNK) if kind < 2 else dice.choice(blocks) if kind < 4 else dice.randbytes(CHUNK)
        if number == 300:
            content += bytes(CHUNK)
    content = content[: GEOMETRY.size]
    with open_writer(repository) as writer:
        ids = store_bytes(writer, bytes(content), folder)
        builder = MapWriter(MapReader(repository.load_node), None, GEOMETRY.count, writer.store_node)
        for number, id_ in enumerate(ids):
            builder.set(number, id_ or (HOLE if number % 2 else ZERO))
        root = builder.finish()
        writer.flush()
    return folder / "r", root, bytes(content)


def runs(
    repository: Repository, root: MapRoot, begin: int = 0, end: int = GEOMETRY.count
) -> Iterator[tuple[int, int, Entry]]:
    return MapReader(repository.load_node).runs(root, begin, end)


class Counter:
    total = largest = 0

    def __call__(self, done_bytes: int, /) -> None:
        self.total += done_bytes
        self.largest = max(self.largest, done_bytes)


def test_a_file_is_sparse_and_identical(stored: tuple[Path, MapRoot, bytes], tmp_path: Path) -> None:
    place, root, content = stored
    repository = open_repository(place)
    target, counter = FileTarget(str(tmp_path / "out"), GEOMETRY.size, RECORD), Counter()
    restore_to_target(repository, GEOMETRY, partial(runs, repository, root), target, counter)
    assert os.listdir(tmp_path) != ["out"]
    target.finish()
    target.close()
    assert os.listdir(tmp_path) == ["out"]
    assert (tmp_path / "out").read_bytes() == content
    assert (tmp_path / "out").stat().st_blocks * 512 < GEOMETRY.size * 0.8
    assert counter.total == GEOMETRY.size


@pytest.mark.parametrize("entry", [HOLE, ZERO])
def test_a_large_hole_is_told_as_it_goes(
    stored: tuple[Path, MapRoot, bytes], tmp_path: Path, entry: Entry
) -> None:
    """A disk that has to write all the zeros may need hours for one, in which nothing else is told."""
    repository = open_repository(stored[0])
    geometry = Geometry((5 * blockdev.PIECE_BYTES) // 2 + CHUNK, CHUNK)
    (tmp_path / "out").write_bytes(b"x" * CHUNK * 600)

    def empty(begin: int, end: int) -> Iterator[tuple[int, int, Entry]]:
        return iter([(begin, end - begin, entry)])

    target, counter = ExistingFileTarget(str(tmp_path / "out"), geometry.size, RECORD), Counter()
    restore_to_target(repository, geometry, empty, target, counter)
    target.finish()
    target.close()
    assert (counter.total, counter.largest) == (geometry.size, blockdev.PIECE_BYTES)
    assert (tmp_path / "out").stat().st_blocks * 512 < CHUNK * 600
    with (tmp_path / "out").open("rb") as file:
        assert file.read(CHUNK * 600) == bytes(CHUNK * 600)


def test_what_is_empty_counts_when_a_backup_is_proven(stored: tuple[Path, MapRoot, bytes]) -> None:
    place, root, _ = stored
    repository, counter = open_repository(place), Counter()
    found: list[UnreadableChunkError] = []
    verify_chunks(repository, GEOMETRY, runs(repository, root), counter, found.append)
    assert found == []
    assert counter.total == GEOMETRY.size


def test_a_stream_is_identical(stored: tuple[Path, MapRoot, bytes]) -> None:
    place, root, content = stored
    repository = open_repository(place)
    stream, counter = io.BytesIO(), Counter()
    restore_to_stream(repository, GEOMETRY, runs(repository, root), stream, counter)
    assert stream.getvalue() == content
    assert counter.total == GEOMETRY.size


def test_small_windows_fetch_the_same(stored: tuple[Path, MapRoot, bytes]) -> None:
    place, root, _ = stored
    repository = open_repository(place)

    def numbers(window: int) -> list[int]:
        windows = list(
            plan_windows(
                runs(repository, root), lambda id_: repository.locate(FrameType.DATA, id_), window=window
            )
        )
        assert [w.end for w in windows[:-1]] == [w.begin for w in windows[1:]]
        return sorted(n for w in windows for r in w.ranges for f in r.frames for n in f.numbers)

    assert numbers(1) == numbers(7) == numbers(100_000)


def test_a_map_of_small_holes_comes_in_windows_too() -> None:
    """The nodes of a map may be shared: it may be of any length, and little of it be stored."""
    count = 100_000
    alternating = ((number, 1, ZERO if number % 2 else HOLE) for number in range(count))
    windows = list(plan_windows(alternating, {}.__getitem__, window=100))
    assert (windows[0].begin, windows[-1].end) == (0, count)
    assert [each.end for each in windows[:-1]] == [each.begin for each in windows[1:]]
    assert max(len(each.holes) + len(each.zeros) for each in windows) <= 400
    assert sum(end - begin for each in windows for begin, end in each.holes + each.zeros) == count


def test_packs_come_in_the_order_of_the_volume() -> None:
    """Whatever the order of the ids is in."""
    ids = [random.Random(number).randbytes(32) for number in range(90)]
    places = {
        id_: Location(PackId(bytes(16), bytes([99 - number // 30]) * 32), number * 1000, 1000, FrameType.DATA)
        for number, id_ in enumerate(ids)
    }
    (window,) = plan_windows(((number, 1, id_) for number, id_ in enumerate(ids)), places.__getitem__)
    assert [fetch.frames[0].numbers for fetch in window.ranges] == [(0,), (30,), (60,)]


def test_what_plans_ahead_ends_with_its_reader(stored: tuple[Path, MapRoot, bytes]) -> None:
    def some() -> Iterator[Window]:
        yield Window(0, 1, (), (), ())
        raise MissingChunkError("chunk", bytes(32))

    windows = planned_ahead(some())
    assert next(windows).end == 1
    with pytest.raises(MissingChunkError):
        next(windows)
    early = planned_ahead(Window(n, n + 1, (), (), ()) for n in range(1000))
    next(early)
    early.close()
    assert not any(thread.name.startswith("blocksnap-plan") for thread in threading.enumerate())


def test_damage_is_named_and_not_restored(
    stored: tuple[Path, MapRoot, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place, root, content = stored
    repository = open_repository(place)
    reader = MapReader(repository.load_node)
    victim = next(n for n in range(50, 600) if len(reader.entry(root, n)) == 32)
    location = repository.locate(FrameType.DATA, reader.entry(root, victim))
    read = repository.backend.read_range_into

    def read_with_a_flipped_bit(name: str, offset: int, buffer: memoryview) -> None:
        read(name, offset, buffer)
        at = location.offset + 90 - offset
        if name == location.pack.name and 0 <= at < len(buffer):
            buffer[at] ^= 4

    monkeypatch.setattr(repository.backend, "read_range_into", read_with_a_flipped_bit)
    expected = [
        n * CHUNK for n in range(GEOMETRY.count) if reader.entry(root, n) == reader.entry(root, victim)
    ]
    found: list[UnreadableChunkError] = []
    verify_chunks(repository, GEOMETRY, runs(repository, root), Counter(), found.append)
    assert [err.offset for err in found] == expected[:1]
    target = FileTarget(str(tmp_path / "out"), GEOMETRY.size, RECORD)
    with pytest.raises(UnreadableChunkError, match=f"bytes {expected[0]} to"):
        restore_to_target(repository, GEOMETRY, partial(runs, repository, root), target, Counter())
    target.close()
    assert os.listdir(tmp_path) == []
    stream = io.BytesIO()
    with pytest.raises(DamageError):
        restore_to_stream(repository, GEOMETRY, runs(repository, root), stream, Counter())
    assert content.startswith(stream.getvalue())


def test_a_chunk_in_no_pack_is_named(stored: tuple[Path, MapRoot, bytes]) -> None:
    place, _, _ = stored
    repository = open_repository(place)
    missing = iter([(0, 1, b"\x07" * 32), (1, 1, ZERO)])
    found: list[UnreadableChunkError] = []
    verify_chunks(repository, Geometry(2 * CHUNK, CHUNK), missing, Counter(), found.append)
    assert [(err.offset, err.length) for err in found] == [(0, CHUNK)]


def test_what_is_lost_is_held_merged(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "_MOST_LOOSE", 1 << 12)
    losses, error = Losses(GEOMETRY), DamageError("lost")
    places = [*range(0, 25_000, 2), *range(25_001, 50_000)]
    tracemalloc.start()
    for place in random.Random(3).sample(places, len(places)):
        losses.note(place, place + 1, error)
    grown = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert grown < 2 << 20
    assert list(losses.chunks()) == [*((n, n + 1) for n in range(0, 25_000, 2)), (25_001, 50_000)]


def test_a_file_that_exists_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("mine")
    with pytest.raises(TargetError, match="exists already"):
        FileTarget(str(tmp_path / "out"), 10, RECORD)
    target = FileTarget(str(tmp_path / "late"), 10, RECORD)
    (tmp_path / "late").write_text("mine")
    with pytest.raises(TargetError, match="exists already"):
        target.finish()
    target.close()
    assert (tmp_path / "late").read_text() == "mine"
    assert (tmp_path / "out").read_text() == "mine"


def test_streaming_holds_bytes_and_not_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    large = 1 << 20
    repository = make_repository(tmp_path / "r", chunk_size=large)
    content = random.Random(3).randbytes(24 * large)
    with open_writer(repository) as writer:
        ids = store_bytes(writer, content, tmp_path, large)
        writer.flush()
    asked = []

    def plan(*arguments: Any, window: int) -> Iterator[Window]:
        asked.append(window)
        return plan_windows(*arguments, window=window)

    monkeypatch.setattr(engine, "plan_windows", plan)
    repository, stream = open_repository(tmp_path / "r"), io.BytesIO()
    every: Iterator[tuple[int, int, Entry]] = ((number, 1, id_ or ZERO) for number, id_ in enumerate(ids))
    restore_to_stream(repository, Geometry(len(content), large), every, stream, Counter())
    assert stream.getvalue() == content
    restore_to_stream(repository, Geometry(0, 8 << 20), iter([]), stream, Counter())
    assert asked == [4, 1]


class Waiting(FileTarget):
    """Its writes wait, as for room in a pool, until it is given up; with ``windows`` only the first does."""

    def __init__(self, path: Path, windows: int) -> None:
        super().__init__(str(path), GEOMETRY.size, RECORD)
        self._windows = windows
        self._first = -1
        self._given_up = threading.Event()
        self.is_waiting, self.is_ahead = threading.Event(), threading.Event()
        self.begun = self.vain = 0
        self.was_ahead: bool | None = None

    def expect(self, ranges: Iterable[tuple[int, int]]) -> None:
        ranges = list(ranges)
        super().expect(ranges)
        self._first = ranges[0][0] if self._first < 0 else self._first
        self.begun += 1
        if self.begun > self._windows:
            self.is_ahead.set()

    def give_up(self) -> None:
        self._given_up.set()

    def write(self, offset: int, data: bytes | memoryview) -> None:
        self.is_waiting.set()
        if not self._windows and not self._given_up.wait(20):
            self.vain += 1
        elif self._windows and offset == self._first:
            self.was_ahead = self.is_ahead.wait(1)
        super().write(offset, data)


def test_an_end_does_not_wait_for_what_waits(
    stored: tuple[Path, MapRoot, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan, "_FIRST_CHUNKS", 32)
    place, root, _ = stored
    repository, target = open_repository(place), Waiting(tmp_path / "out", 0)

    def interrupt(_: int) -> None:
        if target.begun and target.is_waiting.wait(20):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        restore_to_target(repository, GEOMETRY, partial(runs, repository, root), target, interrupt)
    target.close()
    assert target.vain == 0


def test_no_window_goes_far_ahead_of_one_that_is_slow(
    stored: tuple[Path, MapRoot, bytes], tmp_path: Path
) -> None:
    """Each of a tree's has its files open."""
    place, root, content = stored
    repository, target = open_repository(place), Waiting(tmp_path / "out", 9)
    restore_runs(repository, GEOMETRY, runs(repository, root), target, Counter(), window_chunks=8)
    assert target.was_ahead is False
    target.finish()
    target.close()
    assert (tmp_path / "out").read_bytes() == content


def refuse(monkeypatch: pytest.MonkeyPatch, module: object, name: str, code: int) -> None:
    def call(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(module, name, call)


@pytest.mark.parametrize("flags", [True, False])
@pytest.mark.parametrize("code", [errno.EPERM, errno.EOPNOTSUPP])
def test_where_there_are_no_hard_links(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, flags: bool
) -> None:
    refuse(monkeypatch, os, "link", code)
    if not flags:
        refuse(monkeypatch, naming, "_rename_new", errno.EINVAL)
    target = FileTarget(str(tmp_path / "out"), 3, RECORD)
    target.write(0, b"abc")
    target.finish()
    target.close()
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("out", b"abc")]
    late = FileTarget(str(tmp_path / "late"), 3, RECORD)
    late.write(0, b"abc")
    (tmp_path / "late").write_text("mine")
    with pytest.raises(TargetExistsError) as caught:
        late.finish()
    late.close()
    assert (tmp_path / "late").read_text() == "mine"
    (kept,) = tmp_path.glob(".late.*.partial")
    assert kept.read_bytes() == b"abc"
    assert str(kept) in str(caught.value.resolution)


def test_a_whole_file_that_gets_no_name_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = FileTarget(str(tmp_path / "out"), 3, RECORD)
    target.write(0, b"abc")
    refuse(monkeypatch, os, "link", errno.EIO)
    with pytest.raises(TargetError, match="cannot give the restored file the name") as caught:
        target.finish()
    target.close()
    (kept,) = tmp_path.iterdir()
    assert kept.read_bytes() == b"abc"
    assert str(kept) in str(caught.value.resolution)


def test_long_names(tmp_path: Path) -> None:
    longest = tmp_path / ("ü" * 127)
    target = FileTarget(str(longest), 3, RECORD)
    target.finish()
    target.close()
    assert list(tmp_path.iterdir()) == [longest]
    for wrong in (tmp_path / ("n" * 256), longest / "below"):
        with pytest.raises(TargetError, match="cannot write"):
            FileTarget(str(wrong), 3, RECORD)
