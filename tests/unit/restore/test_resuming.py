"""What was interrupted is never taken for whole, and goes on where it was."""

from __future__ import annotations

import fcntl
import os
import random
from collections.abc import Callable, Iterator
from functools import partial
from itertools import count
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from blocksnap.errors import StorageError, TargetError
from blocksnap.pipeline.flow import Geometry
from blocksnap.repository.blockmap import HOLE, Entry
from blocksnap.repository.repository import Repository
from blocksnap.restore import engine, place, plan
from blocksnap.restore.engine import restore_to_target
from blocksnap.restore.file_target import ExistingFileTarget, FileTarget
from blocksnap.restore.outstanding import Outstanding
from blocksnap.restore.record import HEAD_BYTES, RestoreRecord, decode_record, encode_record
from blocksnap.restore.targets import NameTakenError, Progress
from support.repositories import CHUNK, make_repository, open_repository, open_writer, store_bytes

RECORD = RestoreRecord(repository="00" * 16, backup="1234567890abcdef" * 2, mode="whole")
COUNT = 300
GEOMETRY = Geometry(CHUNK * COUNT - 77, CHUNK)


@pytest.fixture(scope="module")
def content() -> bytes:
    dice = random.Random(11)
    blocks = [bytes(CHUNK) if dice.random() < 0.3 else dice.randbytes(CHUNK) for _ in range(COUNT)]
    return b"".join(blocks)[: GEOMETRY.size]


@pytest.fixture(scope="module")
def stored(content: bytes, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Entry]]:
    folder = tmp_path_factory.mktemp("stored")
    with open_writer(make_repository(folder / "r")) as writer:
        ids = [id_ or HOLE for id_ in store_bytes(writer, content, folder)]
        writer.flush()
    return folder / "r", ids


@pytest.fixture(autouse=True)
def _small_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    # With one thread it is sure what is written when a read fails.
    monkeypatch.setattr(engine, "WORKERS", 1)
    monkeypatch.setattr(place, "_RECORD_SECONDS", 0.0)
    monkeypatch.setattr(plan, "_FIRST_CHUNKS", 16)
    monkeypatch.setattr(plan, "MAX_RANGE", 4 * CHUNK)


def read_map(ids: list[Entry], begin: int, end: int) -> Iterator[tuple[int, int, Entry]]:
    return ((number, 1, ids[number]) for number in range(begin, end))


class Reads:
    """Counts the bytes that are read, and fails from one read on."""

    def __init__(self, repository: Repository, *, fails_after: int = 1 << 60) -> None:
        self._read = repository.backend.read_range_into
        self._left = count(fails_after, -1)
        self.total = 0

    def __call__(self, name: str, offset: int, buffer: memoryview) -> None:
        if next(self._left) <= 0:
            raise StorageError("the line is cut")
        self.total += len(buffer)
        self._read(name, offset, buffer)


def restore(
    stored: tuple[Path, list[Entry]], target: FileTarget | ExistingFileTarget, *, fails_after: int = 1 << 60
) -> int:
    place_, ids = stored
    repository = open_repository(place_)
    _ = repository.index
    reads = Reads(repository, fails_after=fails_after)
    repository.backend.read_range_into = reads  # type: ignore[method-assign]
    restore_to_target(repository, GEOMETRY, partial(read_map, ids), target, lambda _: None)
    return reads.total


def new_file(folder: Path) -> FileTarget:
    return FileTarget(str(folder / "out"), GEOMETRY.size, RECORD)


@pytest.mark.parametrize("fails_after", [0, 3, 20, 40])
def test_it_goes_on_where_it_was(
    stored: tuple[Path, list[Entry]], content: bytes, tmp_path: Path, fails_after: int
) -> None:
    target = new_file(tmp_path)
    with pytest.raises(StorageError):
        restore(stored, target, fails_after=fails_after)
    kept = target.close(keep=True)
    assert kept == (fails_after > 0)
    assert [path.name for path in tmp_path.iterdir()] == ([".out.12345678.partial"] if kept else [])
    if kept:
        head = (tmp_path / ".out.12345678.partial").read_bytes()[:HEAD_BYTES]
        assert decode_record(head[:512]) is not None
        assert not any(head[512:])
    again = new_file(tmp_path)
    read = restore(stored, again)
    again.finish()
    again.close()
    assert (tmp_path / "out").read_bytes() == content
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    whole = sum(len(entry) == 32 for entry in stored[1]) * CHUNK
    assert read < whole * (1 - fails_after / 200) if kept else read >= whole


@pytest.mark.parametrize("end", ["whole", "dropped", "kept", "taken"])
def test_the_directory_above_may_be_renamed(
    stored: tuple[Path, list[Entry]], content: bytes, tmp_path: Path, end: str
) -> None:
    """The file gets its name where the directory is by then, and one that fails is removed from there."""
    before, after = tmp_path / "before", tmp_path / "after"
    before.mkdir()
    target = new_file(before)
    restore(stored, target)
    before.rename(after)
    # Somebody else's of the same name is none of ours.
    before.mkdir()
    (before / ".out.12345678.partial").write_text("not ours")
    if end == "taken":
        (after / "out").write_text("somebody else's")
        with pytest.raises(NameTakenError) as caught:
            target.finish()
        assert Path(caught.value.complete).read_bytes() == content
    elif end == "whole":
        target.finish()
    kept = target.close(keep=end == "kept")
    assert kept == (end == "kept")
    left = {"whole": {"out"}, "dropped": set(), "kept": {".out.12345678.partial"}}
    assert set(os.listdir(after)) == left.get(end, {"out", ".out.12345678.partial"})
    assert end != "whole" or (after / "out").read_bytes() == content
    assert [path.read_text() for path in before.iterdir()] == ["not ours"]


def test_what_another_restore_left_is_thrown_away(
    stored: tuple[Path, list[Entry]], content: bytes, tmp_path: Path
) -> None:
    other = RECORD.model_copy(update={"repository": "ff" * 16, "reached": GEOMETRY.size})
    for left in (encode_record(other) + b"x" * GEOMETRY.size, b"y" * 3, b"z" * (GEOMETRY.size + 9)):
        hidden = tmp_path / ".out.12345678.partial"
        hidden.write_bytes(left)
        hidden.chmod(0o600)
        target = new_file(tmp_path)
        restore(stored, target)
        target.finish()
        target.close()
        assert (tmp_path / "out").read_bytes() == content
        (tmp_path / "out").unlink()


def test_a_hidden_file_that_others_may_read_is_left_alone(tmp_path: Path) -> None:
    hidden = tmp_path / ".out.12345678.partial"
    hidden.write_bytes(b"theirs")
    hidden.chmod(0o644)
    target = new_file(tmp_path)
    target.close()
    assert hidden.read_bytes() == b"theirs"
    assert list(tmp_path.iterdir()) == [hidden]


def test_killed_between_its_two_names(tmp_path: Path) -> None:
    hidden = tmp_path / ".out.12345678.partial"
    hidden.write_bytes(b"whole")
    os.link(hidden, tmp_path / "out")
    with pytest.raises(TargetError, match="exists already"):
        new_file(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_two_at_once(tmp_path: Path) -> None:
    target = new_file(tmp_path)
    try:
        with pytest.raises(TargetError, match="in use by another restore"):
            new_file(tmp_path)
    finally:
        target.close()
    locked = tmp_path / "there"
    locked.write_bytes(bytes(100))
    with locked.open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(TargetError, match="has locked it"):
            ExistingFileTarget(str(locked), 100, RECORD)
    with locked.open("r+b"), pytest.raises(TargetError, match="open for writing"):
        ExistingFileTarget(str(locked), 100, RECORD)


def test_another_ends_while_this_one_begins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it has just given its name is not written to by who opened it under the hidden one."""
    hidden = tmp_path / ".out.12345678.partial"
    hidden.write_bytes(b"complete")
    hidden.chmod(0o600)
    lock = fcntl.flock

    def late(fd: int, operation: int) -> None:
        hidden.rename(tmp_path / "out")
        lock(fd, operation)

    monkeypatch.setattr(fcntl, "flock", late)
    with pytest.raises(TargetError, match="has just ended"):
        new_file(tmp_path)
    assert (tmp_path / "out").read_bytes() == b"complete"


@pytest.mark.parametrize("length", [0, 5, GEOMETRY.size, GEOMETRY.size + 5000])
def test_a_file_that_is_there(
    stored: tuple[Path, list[Entry]], content: bytes, tmp_path: Path, length: int
) -> None:
    (tmp_path / "out").write_bytes(b"before" * (length // 6) + b"." * (length % 6))
    target = ExistingFileTarget(str(tmp_path / "out"), GEOMETRY.size, RECORD)
    restore(stored, target)
    target.finish()
    target.close()
    assert (tmp_path / "out").read_bytes() == content


def test_the_beginning_comes_last(
    stored: tuple[Path, list[Entry]], content: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wherever it is cut off, what is there begins with zeros or with a record."""
    steps: list[Callable[[], bool]] = []
    target = new_file(tmp_path)
    hidden = tmp_path / ".out.12345678.partial"
    write = target.write

    def looking(offset: int, data: bytes | memoryview) -> None:
        write(offset, data)
        head = hidden.read_bytes()[: min(HEAD_BYTES, GEOMETRY.size)]
        steps.append(lambda: decode_record(head[:512]) is not None and not any(head[512:]))

    monkeypatch.setattr(target, "write", looking)
    restore(stored, target)
    target.close()
    heads = -(-HEAD_BYTES // CHUNK)
    assert len(steps) > 20
    assert all(step() for step in steps[:-heads])
    assert not os.listdir(tmp_path)
    assert any(content[:HEAD_BYTES])


def test_what_turns_out_wrong_at_the_end_begins_as_unfinished(
    stored: tuple[Path, list[Entry]], tmp_path: Path
) -> None:
    """The beginning is there when the rest is read back, which can fail or be interrupted."""
    (tmp_path / "there").write_bytes(b"before")
    over = ExistingFileTarget(str(tmp_path / "there"), GEOMETRY.size, RECORD)
    restore(stored, over)
    assert over.close()
    new = new_file(tmp_path)
    restore(stored, new)
    assert new.close(keep=True)
    for path, reached in ((tmp_path / "there", 0), (tmp_path / ".out.12345678.partial", HEAD_BYTES + 1)):
        head = path.read_bytes()[:HEAD_BYTES]
        record = decode_record(head[:512])
        assert record is not None, path
        assert record.reached == 0 if not reached else record.reached >= reached
        assert not any(head[512:]), path


@given(st.binary(max_size=600))
@settings(max_examples=200)
def test_no_other_bytes_are_a_record(data: bytes) -> None:
    assert decode_record(data) is None
    good = bytearray(
        encode_record(RECORD.model_copy(update={"reached": 1 << 60, "way_back": "g/" + "v" * 120}))
    )
    assert len(good) == 512
    assert decode_record(bytes(good)) is not None
    if data:
        good[len(data) % 200] ^= data[0] or 1
        assert decode_record(bytes(good)) is None


class Watched:
    """A target that takes note of what is written, and judges each word about how far that has come."""

    def __init__(self, content: bytes) -> None:
        self._content = content
        self.name = "watched"
        self._is_written = bytearray(GEOMETRY.size)
        self.steps: list[int] = []
        self._head_is_due = False

    def begin(self) -> int:
        return 0

    def expect(self, ranges: object) -> None:
        pass

    def write(self, offset: int, data: bytes | memoryview) -> None:
        assert self._content[offset : offset + len(data)] == data
        self._is_written[offset : offset + len(data)] = b"x" * len(data)

    def clear(self, offset: int, length: int, *, hole: bool, progress: Progress) -> None:
        self._is_written[offset : offset + length] = b"x" * length
        progress(length)

    def reached(self, offset: int) -> None:
        if self._head_is_due:
            return
        head = engine.head_bytes(GEOMETRY)
        assert b"\0" not in self._is_written[head:offset]
        assert not self.steps or offset > self.steps[-1]
        self.steps.append(offset)

    def flush(self) -> None:
        self._head_is_due = True
        assert b"\0" not in self._is_written[engine.head_bytes(GEOMETRY) :]


@pytest.mark.parametrize("workers", [1, 4])
def test_what_is_reached_moves_on_within_a_window_and_is_always_there(
    stored: tuple[Path, list[Entry]], content: bytes, monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    monkeypatch.setattr(engine, "WORKERS", workers)
    monkeypatch.setattr(plan, "_FIRST_CHUNKS", COUNT)
    folder, ids = stored
    target = Watched(content)
    read = partial(read_map, ids)
    restore_to_target(open_repository(folder), GEOMETRY, read, target, lambda _: None)  # type: ignore[arg-type]
    assert len(target.steps) >= (2 if workers == 1 else 1)


@given(st.permutations(range(12)), st.lists(st.integers(0, 100), min_size=12, max_size=12))
def test_all_below_what_is_reached_is_written(order: list[int], firsts: list[int]) -> None:
    outstanding = Outstanding(firsts, 200)
    for done, number in enumerate(order, 1):
        outstanding.written(number)
        left = [firsts[each] for each in order[done:]]
        assert outstanding.reached == min(left, default=200)
        assert outstanding.is_whole == (not left)
