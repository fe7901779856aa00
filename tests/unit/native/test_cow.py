"""cow_scan gives what an independent builder put into a store, or refuses."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import textwrap
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from blocksnap import _native
from blocksnap.extents.model import ExtentList
from support.cow_store import CowStore, area_chunk, in_memory, read_entries
from support.require import require

ORIGIN_CHUNKS = 5000
Answer = tuple[ExtentList, int, int, int, int]


@contextmanager
def filled(content: bytes) -> Iterator[int]:
    fd = os.memfd_create("device")
    try:
        os.write(fd, content)
        yield fd
    finally:
        os.close(fd)


def ask(fd: int, *, origin_size: int = 0, settled: int = 0) -> Answer:
    changed, chunk_size, exceptions, areas, allocated = _native.cow_scan(fd, origin_size, settled)
    return ExtentList(changed), chunk_size, exceptions, areas, allocated


def scan(store: CowStore, *, origin_size: int = 0, settled: int = 0) -> Answer:
    with in_memory(store) as fd:
        return ask(fd, origin_size=origin_size, settled=settled)


def expected(store: CowStore, origin_size: int = 0) -> Answer:
    size = store.chunk_size
    changed = ExtentList.of((chunk * size, size) for chunk in store.changed)
    if origin_size:
        changed = changed.clip(origin_size)
    return changed, size, len(store.changed), store.areas, store.allocated


def refusal(fd: int, *, origin_size: int = 0, settled: int = 0) -> str:
    with pytest.raises(ValueError, match="exception store, block ") as caught:
        ask(fd, origin_size=origin_size, settled=settled)
    return str(caught.value)


def refusal_of(store: CowStore, *, origin_size: int = 0, settled: int = 0) -> str:
    with in_memory(store) as fd:
        return refusal(fd, origin_size=origin_size, settled=settled)


@st.composite
def changes(draw: st.DrawFn) -> list[int]:
    """Chunks of an origin in the order of their first write: runs, up and down, and single ones."""
    order: dict[int, None] = {}
    runs = st.tuples(st.integers(0, ORIGIN_CHUNKS - 1), st.integers(1, 300) | st.just(1), st.booleans())
    for first, length, down in draw(st.lists(runs, max_size=25)):
        run = list(range(first, min(first + length, ORIGIN_CHUNKS)))
        order.update(dict.fromkeys(reversed(run) if down else run))
    return list(order)


@settings(max_examples=80, deadline=None)
@given(
    changed=changes(),
    chunk_size=st.sampled_from([4096, 4096, 8192, 65536]),
    stale=st.sampled_from([b"\0", b"\xff", b"\1\0\0\0\0\0\0\0\3\0\0\0\0\0\0\0"]),
    cut=st.integers(0, 4095),
    data=st.data(),
)
def test_any_list_equals_the_model(
    changed: list[int], chunk_size: int, stale: bytes, cut: int, data: st.DataObject
) -> None:
    """Whatever the device held before, however many areas are known to be full, wherever the origin ends."""
    store = CowStore(changed, chunk_size, stale=stale)
    origin_size = ORIGIN_CHUNKS * chunk_size - cut
    settled = data.draw(st.integers(0, store.areas - 1))
    assert scan(store, origin_size=origin_size, settled=settled) == expected(store, origin_size)
    assert scan(store, settled=settled) == expected(store)
    with in_memory(store) as fd:
        assert [old for old, _ in read_entries(fd)] == changed


@settings(max_examples=40, deadline=None)
@given(changed=changes(), chance=st.randoms())
def test_the_places_in_the_store_do_not_matter(changed: list[int], chance: random.Random) -> None:
    """Exceptions may be committed in another order than that of their places, and leave some unused."""
    places = [chunk for chunk in range(2, 2 * len(changed) + 60) if chunk % 257 != 1]
    chance.shuffle(places)
    store = CowStore(changed, places=places, chunks=20000)
    assert scan(store) == expected(store)


@pytest.mark.parametrize("chunk_size", [4096 << n for n in range(8)])
def test_every_chunk_size_with_more_than_one_area(chunk_size: int) -> None:
    count = chunk_size // 16 + 5
    store = CowStore([n * 7919 % 1000003 for n in range(count)], chunk_size)
    for settled in (0, 1):
        assert scan(store, settled=settled) == expected(store)


def test_a_list_that_fills_its_device_exactly() -> None:
    store = CowStore(range(512), chunks=area_chunk(2, 4096) + 1)
    assert scan(store) == expected(store)
    with in_memory(store) as fd:
        os.truncate(fd, store.size - 512)
        assert "ends before the list" in refusal(fd)


HEADERS = [
    ({"magic": 0}, "never initialised"),
    ({"magic": 0x50416E53}, "not the exception store"),
    ({"valid": 0}, "has invalidated the snapshot"),
    ({"valid": 7}, "neither valid nor invalid"),
    ({"version": 2}, "unknown version"),
    ({"chunk_size": 2048}, "chunk size"),
    ({"chunk_size": 12288}, "chunk size"),
    ({"chunk_size": 1 << 20}, "chunk size"),
]


@pytest.mark.parametrize(("header", "reason"), HEADERS)
def test_every_header_that_is_refused_has_its_own_reason(header: dict[str, int], reason: str) -> None:
    assert reason in refusal_of(CowStore([1, 2], **header))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "too small"),
        (bytes(4095), "too small"),
        (bytes(4096), "never initialised"),
        (b"\xff" * 8192, "not the exception store"),
        (CowStore([]).get(0, 4096), "ends before the list"),
    ],
)
def test_devices_that_are_no_store(content: bytes, reason: str) -> None:
    with filled(content) as fd:
        assert reason in refusal(fd)


ENTRIES = [
    (5, 258, "at the list itself"),
    (5, 1, "at the list itself"),
    (5, 100000, "beyond the end of the device"),
    (5, (1 << 64) - 1, "beyond the end of the device"),
    (5000, 5, "beyond the end of the origin"),
    ((1 << 64) - 1, 5, "beyond the end of the origin"),
    (8, 5, "block 8: the list has this chunk of the origin twice"),
    (5, 0, "block 258: an area of the list was written in part"),
]


@pytest.mark.parametrize(("old", "new", "reason"), ENTRIES)
def test_an_entry_that_cannot_be(old: int, new: int, reason: str) -> None:
    store = CowStore(range(300))
    store.set_entry(290, old, new)
    assert reason in refusal_of(store, origin_size=5000 * 4096)


@pytest.mark.parametrize("index", [0, 1, 100, 254, 256, 290])
def test_a_gap_in_the_list_is_refused(index: int) -> None:
    store = CowStore(range(300))
    store.set_entry(index, 0, 0)
    assert "written in part" in refusal_of(store)


@pytest.mark.parametrize("arrived", range(256))
def test_a_torn_write_loses_nothing_that_was_there_before(arrived: int) -> None:
    """Of the eight sectors of an area any may be old, and any new: 40 entries were there, 250 were to be."""
    before, torn = CowStore(range(40)), CowStore(range(250))
    for sector in range(8):
        if not arrived >> sector & 1:
            at = 4096 + 512 * sector
            torn.put(at, before.get(at, 512))
    with in_memory(torn) as fd:
        try:
            exceptions = ask(fd)[2]
        except ValueError as err:
            assert "written in part" in str(err)
        else:
            assert exceptions >= 40


def test_settled_areas_have_to_be_full() -> None:
    store = CowStore(range(600))
    assert scan(store, settled=2) == expected(store)
    assert "shorter than the kernel has said" in refusal_of(store, settled=3)
    assert "shorter than the kernel has said" in refusal_of(CowStore([]), settled=1)


def test_impossible_arguments() -> None:
    with in_memory(CowStore([1])) as fd:
        with pytest.raises(ValueError, match="larger than"):
            _native.cow_scan(fd, 1 << 63, 0)
        for arguments in [(-1, 0), (0, -1), (1 << 64, 0), (0, 1 << 64)]:
            with pytest.raises(OverflowError):
                _native.cow_scan(fd, *arguments)


@settings(max_examples=200, deadline=None)
@given(index=st.integers(0, 298), byte=st.integers(0, 15), flip=st.integers(1, 255))
def test_an_overwritten_entry_hides_no_other(index: int, byte: int, flip: int) -> None:
    """All others are in the answer, or it is refused.

    Only where the list is cut right at its end, or at that of an area, it looks like one that ends there:
    that is what the kernel's own count is compared for.
    """
    store = CowStore([n * 3 for n in range(300)])
    at = store.entry_offset(index) + byte
    store.put(at, bytes([store.get(at, 1)[0] ^ flip]))
    with in_memory(store) as fd:
        try:
            changed = ask(fd, settled=1)[0]
        except ValueError:
            return
    found = {begin // 4096 + n for begin, length in changed.pairs() for n in range(length // 4096)}
    assert {n * 3 for n in range(300)} - {index * 3} <= found


def test_direct_io_gives_the_same(tmp_path: Path) -> None:
    image = tmp_path / "store"
    store = CowStore([n * 7919 % 100003 for n in range(3000)])
    with image.open("wb") as file:
        store.write(file.fileno())
    try:
        fd = os.open(image, os.O_RDONLY | os.O_DIRECT | os.O_CLOEXEC)
    except OSError:
        require("direct-io", available=False, reason="the filesystem of the temporary folder has no O_DIRECT")
    try:
        assert ask(fd, settled=5) == ask(fd) == expected(store)
    finally:
        os.close(fd)


def test_errors_name_the_call() -> None:
    with pytest.raises(OSError, match="fstat: Bad file descriptor"):
        _native.cow_scan(-1, 0, 0)
    fd = os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC)
    try:
        with pytest.raises(OSError, match="fstat: Block device required"):
            _native.cow_scan(fd, 0, 0)
    finally:
        os.close(fd)


def test_a_list_that_grows_while_it_is_read() -> None:
    """A thread appends as the kernel does: a scan has all that was there before it, and nothing else."""
    count = 3000
    store = CowStore(range(count))
    with in_memory(CowStore([], chunks=store.size // 4096, stale=b"\xee")) as fd:
        for area in range(1, store.areas + 1):
            os.pwrite(fd, b"\xee" * 4096, area_chunk(area, 4096) * 4096)
        written, done = [0], threading.Event()

        def write() -> None:
            for index in range(count):
                if index % 256 == 255:
                    os.pwrite(fd, bytes(4096), area_chunk(index // 256 + 1, 4096) * 4096)
                at = store.entry_offset(index)
                os.pwrite(fd, store.get(at, 16), at)
                written[0] = index + 1
            done.set()

        writer = threading.Thread(target=write)
        writer.start()
        scans = 0
        while not done.is_set() or not scans:
            before = written[0]
            exceptions = ask(fd, settled=before // 256)[2]
            assert before <= exceptions <= written[0] + 1
            scans += 1
        writer.join()


def test_a_signal_stops_a_scan(tmp_path: Path) -> None:
    """The handler's exception ends the scan of a long list early."""
    script = textwrap.dedent(
        """
        import os, signal, sys
        from blocksnap import _native

        def stop(*_):
            raise InterruptedError("stopped")

        fd = os.open(sys.argv[1], os.O_RDONLY)
        signal.signal(signal.SIGALRM, stop)
        signal.setitimer(signal.ITIMER_REAL, 0.2)
        try:
            while True:
                _native.cow_scan(fd, 0, 0)
        except InterruptedError:
            print("stopped")
        """
    )
    path = tmp_path / "store"
    with path.open("wb") as file:
        CowStore(range(100000)).write(file.fileno())
    done = subprocess.run(
        [sys.executable, "-c", script, path], capture_output=True, text=True, timeout=120, check=False
    )
    assert (done.stdout, done.returncode) == ("stopped\n", 0), done.stderr
