"""The local cache of the index: it answers as the segments do, whatever happens to it."""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Container
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from blocksnap.backends.errors import ObjectMissingError
from blocksnap.errors import BlocksnapError
from blocksnap.repository import cache as caching
from blocksnap.repository import lookup
from blocksnap.repository.cache import LocalCache, scratch_table
from blocksnap.repository.frame import FrameType
from blocksnap.repository.index import Segment, encode_segment
from blocksnap.repository.keys import KeyRing
from blocksnap.repository.lookup import Index, choose_merge
from blocksnap.repository.merging import Merge
from blocksnap.repository.pack import PackId, PackRow, SealedPack
from blocksnap.repository.table import BLOCK, Table, TornTableError
from support.repositories import make_repository, open_repository, open_writer

KEYS = KeyRing.from_master(b"m" * 32, repository_id=b"r" * 16)


class Segments:
    """A repository that has nothing but index segments."""

    def __init__(self, keys: KeyRing = KEYS) -> None:
        self.keys = keys
        self.stored: dict[str, bytes] = {}
        self.fetched: list[str] = []
        self.truth: dict[str, dict[bytes, PackId]] = {}

    def put(self, number: int, ids: list[bytes], *, size: int = 1000) -> tuple[str, PackId]:
        name = f"index/00000000-{number:032x}-000000"
        pack = PackId(number.to_bytes(16, "big"), random.Random(number).randbytes(32))
        rows = tuple(PackRow(id_, 64 + n, 100, 90, FrameType.DATA) for n, id_ in enumerate(ids))
        self.stored[name] = encode_segment([SealedPack(pack, size, rows)], self.keys.index_key)
        self.truth[name] = dict.fromkeys(ids, pack)
        return name, pack

    def remove(self, name: str) -> None:
        del self.stored[name], self.truth[name]

    def segment_names(self) -> list[str]:
        return list(self.stored)

    def open_segment(self, name: str) -> Segment:
        self.fetched.append(name)
        if name not in self.stored:
            raise ObjectMissingError(name)
        return Segment(memoryview(self.stored[name]), name=name, index_key=self.keys.index_key)

    def salvage(self, listed: Container[PackId]) -> Segment:
        raise NotImplementedError

    def note(self, err: BlocksnapError) -> None:
        raise err

    def places(self, id_: bytes) -> set[PackId]:
        return {rows[id_] for rows in self.truth.values() if id_ in rows}


def some_ids(seed: int, count: int) -> list[bytes]:
    luck = random.Random(seed)
    return [luck.randbytes(32) for _ in range(count)]


def open_index(segments: Segments, root: Path | None) -> Index:
    segments.fetched.clear()
    index = Index(segments, segments.keys, LocalCache(str(root), segments.keys) if root else None)
    index.refresh()
    return index


def require_true(index: Index, segments: Segments, ids: list[bytes]) -> None:
    for id_ in ids:
        assert {location.pack for location in index.find_all(id_)} == segments.places(id_)


def tables_of(root: Path) -> list[Path]:
    return sorted((root / KEYS.repository_id.hex()).glob("index-*"))


@pytest.fixture
def segments() -> Segments:
    segments = Segments()
    for number in range(5):
        segments.put(number, some_ids(number, 200))
    return segments


ALL = [id_ for number in range(5) for id_ in some_ids(number, 200)] + some_ids(99, 50)


def test_a_second_start_fetches_nothing(segments: Segments, tmp_path: Path) -> None:
    require_true(open_index(segments, tmp_path), segments, ALL)
    assert len(segments.fetched) == 5
    index = open_index(segments, tmp_path)
    assert segments.fetched == []
    require_true(index, segments, ALL)
    segments.put(7, some_ids(7, 10))
    require_true(open_index(segments, tmp_path), segments, ALL + some_ids(7, 10))
    assert len(segments.fetched) == 1
    assert len(tables_of(tmp_path)) == 1


def test_a_removed_segment_is_not_believed(segments: Segments, tmp_path: Path) -> None:
    open_index(segments, tmp_path)
    for name in list(segments.stored)[:4]:
        segments.remove(name)
        require_true(open_index(segments, tmp_path), segments, ALL)
    # What is mostly dead is made anew.
    (table,) = open_index(segments, tmp_path).tables
    assert len(table) <= 400


def test_it_may_be_removed_at_any_time(segments: Segments, tmp_path: Path) -> None:
    index = open_index(segments, tmp_path)
    shutil.rmtree(tmp_path)
    require_true(index, segments, ALL)
    segments.put(8, some_ids(8, 10))
    index.refresh()
    require_true(index, segments, ALL + some_ids(8, 10))
    require_true(open_index(segments, tmp_path), segments, ALL)


def test_whatever_byte_is_torn_it_is_noticed(segments: Segments, tmp_path: Path) -> None:
    open_index(segments, tmp_path / "whole")
    (whole,) = tables_of(tmp_path / "whole")
    content = whole.read_bytes()
    luck = random.Random(0)
    for place in [*luck.sample(range(len(content)), 25), *range(len(content) - 120, len(content), 7)]:
        shutil.rmtree(tmp_path / "torn", ignore_errors=True)
        shutil.copytree(tmp_path / "whole", tmp_path / "torn")
        (torn,) = tables_of(tmp_path / "torn")
        torn.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        require_true(open_index(segments, tmp_path / "torn"), segments, ALL)
        assert torn not in tables_of(tmp_path / "torn")


@pytest.mark.parametrize("size", [0, 1, 111, BLOCK, 3 * BLOCK + 5])
def test_a_table_that_is_cut_short(segments: Segments, tmp_path: Path, size: int) -> None:
    open_index(segments, tmp_path)
    (table,) = tables_of(tmp_path)
    os.truncate(table, size)
    require_true(open_index(segments, tmp_path), segments, ALL)


def test_it_is_torn_while_it_is_in_use(segments: Segments, tmp_path: Path) -> None:
    index = open_index(segments, tmp_path)
    index.pass_over(
        frozenset(), {location.pack.name: 1000 for id_ in ALL for location in index.find_all(id_)}
    )
    (table,) = tables_of(tmp_path)
    table.write_bytes(bytes(table.stat().st_size))
    require_true(index, segments, ALL)
    assert all(index.stays(id_) for id_ in ALL[:-50])
    segments.put(6, some_ids(6, 3))
    index.add(segments.open_segment(list(segments.stored)[-1]))
    assert index.stays(some_ids(6, 3)[0])


def test_blocks_cannot_change_places(segments: Segments, tmp_path: Path) -> None:
    open_index(segments, tmp_path)
    (table,) = tables_of(tmp_path)
    content = bytearray(table.read_bytes())
    content[:BLOCK], content[BLOCK : 2 * BLOCK] = content[BLOCK : 2 * BLOCK], content[:BLOCK]
    table.write_bytes(content)
    with pytest.raises(TornTableError):
        list(Table(os.open(table, os.O_RDONLY), KEYS).pieces())
    require_true(open_index(segments, tmp_path), segments, ALL)


def test_a_row_that_was_made_up_is_not_believed(segments: Segments, tmp_path: Path) -> None:
    """Somebody without the key claims that a chunk is stored, in the name of a segment that there is."""
    open_index(segments, tmp_path)
    stranger = KeyRing.from_master(b"x" * 32, repository_id=KEYS.repository_id)
    forged = Segments(stranger)
    name, _ = forged.put(0, some_ids(50, 10))
    merge = Merge(stranger)
    merge.add_segment(forged.open_segment(name))
    (old,) = tables_of(tmp_path)
    kept = LocalCache(str(tmp_path), stranger).keep(merge)
    assert kept
    old.unlink()
    index = open_index(segments, tmp_path)
    require_true(index, segments, ALL + some_ids(50, 10))
    assert not index.stays(some_ids(50, 1)[0])


def test_an_older_cache_of_the_same_repository_is_no_harm(segments: Segments, tmp_path: Path) -> None:
    open_index(segments, tmp_path / "now")
    shutil.copytree(tmp_path / "now", tmp_path / "then")
    segments.remove(next(iter(segments.stored)))
    segments.put(9, some_ids(9, 20))
    require_true(open_index(segments, tmp_path / "then"), segments, ALL + some_ids(9, 20))


def test_a_cache_of_another_repository_is_none(segments: Segments, tmp_path: Path) -> None:
    others = Segments(KeyRing.from_master(b"m" * 32, repository_id=b"o" * 16))
    others.put(0, some_ids(0, 10))
    open_index(others, tmp_path)
    (tmp_path / (b"o" * 16).hex()).rename(tmp_path / KEYS.repository_id.hex())
    require_true(open_index(segments, tmp_path), segments, ALL)
    assert len(segments.fetched) == 5


def test_what_a_crash_left_is_removed(segments: Segments, tmp_path: Path) -> None:
    folder = tmp_path / KEYS.repository_id.hex()
    folder.mkdir(mode=0o700)
    (folder / "new-0123456789abcdef").write_bytes(b"half a table")
    (folder / "index-0123456789abcdef").write_bytes(b"")
    require_true(open_index(segments, tmp_path), segments, ALL)
    assert sorted(path.name[:5] for path in folder.iterdir()) == ["index", "lock"]
    assert len(tables_of(tmp_path)) == 1


def test_two_at_once(segments: Segments, tmp_path: Path) -> None:
    cache = LocalCache(str(tmp_path), KEYS)
    with cache._lock() as held:
        assert held
        require_true(open_index(segments, tmp_path), segments, ALL)
        assert tables_of(tmp_path) == []
    # Two that found nothing made a table each; one is enough.
    merge = Merge(KEYS)
    for name in segments.stored:
        merge.add_segment(segments.open_segment(name))
    assert cache.keep(merge)
    assert cache.keep(merge)
    index = open_index(segments, tmp_path)
    require_true(index, segments, ALL)
    assert len(index.tables) == len(tables_of(tmp_path)) == 1


@pytest.mark.parametrize("trouble", ["a file", "no place", "others may write", "a link"])
def test_a_folder_that_cannot_be_used(segments: Segments, tmp_path: Path, trouble: str) -> None:
    root = tmp_path / "cache"
    folder = root / KEYS.repository_id.hex()
    if trouble == "a file":
        root.touch()
    elif trouble == "no place":
        root = Path("/proc/blocksnap")
    elif trouble == "others may write":
        folder.mkdir(parents=True)
        folder.chmod(0o770)
    else:
        (tmp_path / "elsewhere").mkdir()
        root.mkdir()
        folder.symlink_to(tmp_path / "elsewhere")
    require_true(open_index(segments, root), segments, ALL)
    assert not list(tmp_path.rglob("index-*"))


def test_old_caches_of_other_repositories_go(
    segments: Segments, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(caching, "OTHERS_BYTES", 2500)
    for number, days in ((1, 1), (2, 2), (3, 3), (4, 100)):
        folder = tmp_path / f"{number:032x}"
        folder.mkdir()
        (folder / "index-0123456789abcdef").write_bytes(bytes(1000 if days < 100 else 1))
        os.utime(folder, (0, os.stat(tmp_path).st_mtime - days * 86400))
    (tmp_path / "something else").mkdir()
    open_index(segments, tmp_path)
    left = sorted(path.name for path in tmp_path.iterdir())
    assert left == sorted([f"{1:032x}", f"{2:032x}", KEYS.repository_id.hex(), "something else"])


def test_what_this_run_stored_stays(tmp_path: Path) -> None:
    make_repository(tmp_path / "r")
    repository = open_repository(tmp_path / "r")
    with open_writer(repository) as writer:
        id_ = writer.store_blob(FrameType.DATA, b"once")
        writer.flush()
        assert not writer.claim(id_)
        assert bytes(repository.load(FrameType.DATA, id_)) == b"once"


def test_what_others_store_later_is_found_but_not_relied_on(segments: Segments, tmp_path: Path) -> None:
    index = open_index(segments, tmp_path)
    _, pack = segments.put(7, some_ids(7, 3))
    index.pass_over(frozenset(), {pack.name: 1000})
    index.refresh()
    assert index.find(some_ids(7, 1)[0])
    assert not index.stays(some_ids(7, 1)[0])


def test_packs_that_go_or_are_gone(segments: Segments, tmp_path: Path) -> None:
    index = open_index(segments, tmp_path)
    packs = [next(iter(segments.places(some_ids(number, 1)[0]))) for number in range(3)]
    index.pass_over(frozenset({packs[1].name}), {packs[0].name: 1000, packs[1].name: 1000, packs[2].name: 7})
    ids = [some_ids(number, 1)[0] for number in range(4)]
    assert [bool(index.find(id_)) for id_ in ids] == [True, True, False, False]
    assert [index.stays(id_) for id_ in ids] == [True, False, False, False]


def test_ids_that_begin_alike() -> None:
    """A real repository has none; where there are, they are found too."""
    segments = Segments()
    ids = [b"\x00" * 8 + n.to_bytes(24, "big") for n in range(300)] + [b"\xff" * 32, b"\x00" * 32]
    segments.put(0, ids)
    segments.put(1, ids)
    require_true(open_index(segments, None), segments, ids)


def test_a_merge_that_lacks_a_row_is_refused(segments: Segments) -> None:
    merge = Merge(KEYS)
    segment = segments.open_segment(next(iter(segments.stored)))
    merge.add_segment(segment)
    segment._count -= 1
    with pytest.raises(TornTableError, match="1 rows are missing"):
        scratch_table(merge, KEYS)


def test_what_is_merged() -> None:
    assert choose_merge([], 10) == []
    assert choose_merge([(1_000_000, 1_000_000)], 0) == [False]
    assert choose_merge([(1_000_000, 1_000_000), (10, 10)], 5) == [False, True]
    assert choose_merge([(1_000_000, 1_000_000), (300_000, 300_000)], 80_000) == [True, True]
    assert choose_merge([(1_000_000, 1_000_000), (330_000, 330_000)], 80_000) == [False, False]
    assert choose_merge([(400_000, 1_000_000), (2_000_000, 2_000_000)], 0) == [True, False]


def test_tables_stay_few() -> None:
    tables: list[int] = []
    copied = 0
    for _ in range(2000):
        fate = choose_merge([(rows, rows) for rows in tables], 21_700)
        merged = 21_700 + sum(rows for rows, goes in zip(tables, fate, strict=True) if goes)
        tables = [*(rows for rows, goes in zip(tables, fate, strict=True) if not goes), merged]
        copied += merged
        assert len(tables) <= 5
    assert copied < 20 * sum(tables)


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lookup, "SMALL_ROWS", 4)
    monkeypatch.setattr(lookup, "_AT_ONCE", 30)


_STEP = st.one_of(
    st.tuples(st.just("put"), st.lists(st.integers(0, 60), min_size=1, max_size=12, unique=True)),
    st.tuples(st.just("own"), st.lists(st.integers(0, 60), min_size=1, max_size=12, unique=True)),
    st.tuples(st.sampled_from(["remove", "open", "refresh", "forget"]), st.integers(0, 1000)),
)


@pytest.mark.usefixtures("tiny")
@given(st.lists(_STEP, max_size=25))
@settings(max_examples=60)
def test_it_answers_as_the_segments_do(tmp_path_factory: pytest.TempPathFactory, steps: list[object]) -> None:
    root = tmp_path_factory.mktemp("cache")
    ids = some_ids(1, 61)
    segments = Segments()
    index = open_index(segments, root)
    for number, (what, detail) in enumerate(steps):  # type: ignore[misc]
        if what in {"put", "own"}:
            name, _ = segments.put(number, [ids[n] for n in detail])
            if what == "own":
                index.add(segments.open_segment(name))
                continue
        elif what == "remove" and segments.stored:
            segments.remove(sorted(segments.stored)[detail % len(segments.stored)])
        elif what == "forget":
            shutil.rmtree(root)
            root.mkdir()
        elif what == "open":
            index = open_index(segments, root)
        index.refresh()
        require_true(index, segments, ids)
