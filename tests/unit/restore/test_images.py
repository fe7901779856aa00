"""Ranges of images read from several threads: right bytes, bounded memory, damage kept to its chunk."""

from __future__ import annotations

import random
import threading
from pathlib import Path

import pytest

from blocksnap.errors import DamageError, StorageError
from blocksnap.pipeline.flow import Geometry
from blocksnap.repository.blockmap import HOLE, MapReader, MapRoot, MapWriter
from blocksnap.restore import images
from blocksnap.restore.filesystems import HEAD_BYTES, recognise
from blocksnap.restore.images import Image, ImageReader
from support.repositories import CHUNK, make_repository, open_repository, open_writer, store_bytes

COUNT = 200
GEOMETRY = Geometry(CHUNK * COUNT - 55, CHUNK)


@pytest.fixture(scope="module")
def content() -> bytes:
    dice = random.Random(21)
    blocks = [bytes(CHUNK) if dice.random() < 0.3 else dice.randbytes(CHUNK) for _ in range(COUNT)]
    return b"".join(blocks)[: GEOMETRY.size]


@pytest.fixture(scope="module")
def stored(content: bytes, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, MapRoot]:
    folder = tmp_path_factory.mktemp("stored")
    repository = make_repository(folder / "r")
    with open_writer(repository) as writer:
        ids = store_bytes(writer, content, folder)
        builder = MapWriter(MapReader(repository.load_node), None, COUNT, writer.store_node)
        for number, id_ in enumerate(ids):
            builder.set(number, id_ or HOLE)
        root = builder.finish()
        writer.flush()
    return folder / "r", root


def test_many_threads_and_little_memory(
    stored: tuple[Path, MapRoot], content: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(images, "_CACHE_BYTES", 10 * CHUNK)
    reader, wrong = ImageReader(open_repository(stored[0])), []

    def read(seed: int) -> None:
        dice, image, at = random.Random(seed), Image(GEOMETRY, stored[1]), 0
        for _ in range(80):
            length = dice.randrange(1, 6 * CHUNK)
            if reader.read(image, at, length) != content[at : at + length]:
                wrong.append((at, length))
            # Sometimes on from there, sometimes elsewhere, sometimes beyond the end.
            at = at + length if dice.random() < 0.5 else dice.randrange(GEOMETRY.size + CHUNK)

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    reader.close()
    assert wrong == []
    assert sum(len(chunk) for chunk in reader._chunks.values()) <= 10 * CHUNK
    assert reader._coming == {}


def test_one_reader_goes_through_each_chunk_once(stored: tuple[Path, MapRoot], content: bytes) -> None:
    repository = open_repository(stored[0])
    reader, image, read = ImageReader(repository), Image(GEOMETRY, stored[1]), []
    original = repository.backend.read_range_into

    def counting(name: str, offset: int, buffer: memoryview) -> None:
        read.append(len(buffer))
        original(name, offset, buffer)

    _ = repository.index
    repository.backend.read_range_into = counting  # type: ignore[method-assign]
    parts = [reader.read(image, at, 100_000) for at in range(0, GEOMETRY.size, 100_000)]
    reader.close()
    assert b"".join(parts) == content
    assert sum(read) < GEOMETRY.size * 1.1


def test_a_damaged_chunk_costs_itself(stored: tuple[Path, MapRoot], content: bytes) -> None:
    repository = open_repository(stored[0])
    maps = MapReader(repository.load_node)
    victim = next(n for n in range(50, COUNT) if len(maps.entry(stored[1], n)) == 32)
    id_ = maps.entry(stored[1], victim)
    (location,) = repository.index.find_all(id_)
    original = repository.backend.read_range_into

    def flipping(name: str, offset: int, buffer: memoryview) -> None:
        original(name, offset, buffer)
        at = location.offset + 100 - offset
        if name == location.pack.name and 0 <= at < len(buffer):
            buffer[at] ^= 1

    repository.backend.read_range_into = flipping  # type: ignore[method-assign]
    reader, image = ImageReader(repository), Image(GEOMETRY, stored[1])
    failed = []
    for number in range(COUNT):
        at = number * CHUNK
        try:
            assert reader.read(image, at, CHUNK) == content[at : at + CHUNK]
        except DamageError as err:
            failed.append(number)
            assert f"bytes {at} to" in err.brief
    reader.close()
    assert failed == [victim]


def test_a_damaged_node_ahead_harms_nobody_who_does_not_read_there(
    stored: tuple[Path, MapRoot], content: bytes
) -> None:
    repository = open_repository(stored[0])
    load, begun = repository.load_node, 64 * CHUNK
    loaded: list[bytes] = []

    def damaged(id_: bytes) -> bytes:
        loaded.append(id_)
        # The root and the first leaf, which has 64 chunks, are whole.
        if len(set(loaded)) > 2:
            raise DamageError("a node is damaged")
        return load(id_)

    repository.load_node = damaged  # type: ignore[method-assign]
    reader, image = ImageReader(repository), Image(GEOMETRY, stored[1])
    for at in range(0, begun, CHUNK):
        assert reader.read(image, at, CHUNK) == content[at : at + CHUNK]
    assert len(set(loaded)) > 2
    with pytest.raises(DamageError):
        reader.read(image, begun, CHUNK)
    reader.close()


def test_the_same_chunk_in_another_place_is_told_as_there(stored: tuple[Path, MapRoot]) -> None:
    """Whoever waits for what another one fetches is told of its own range, not of the other's."""
    repository = open_repository(stored[0])
    maps = MapReader(repository.load_node)
    victim = next(n for n in range(50, COUNT) if len(maps.entry(stored[1], n)) == 32)
    entry = maps.entry(stored[1], victim)
    (location,) = repository.index.find_all(entry)
    original = repository.backend.read_range_into
    asked, go_on = threading.Event(), threading.Event()

    def failing(name: str, offset: int, buffer: memoryview) -> None:
        if name == location.pack.name and offset <= location.offset < offset + len(buffer):
            asked.set()
            go_on.wait(30)
            raise DamageError("it is lost")
        original(name, offset, buffer)

    repository.backend.read_range_into = failing  # type: ignore[method-assign]
    reader, said = ImageReader(repository), list[str]()

    def read(image: Image, at: int) -> None:
        with pytest.raises(DamageError) as failed:
            reader.read(image, at, 10)
        said.append(failed.value.brief)

    first = threading.Thread(target=read, args=(Image(GEOMETRY, stored[1]), victim * CHUNK))
    first.start()
    assert asked.wait(30)
    second = threading.Thread(target=read, args=(Image(Geometry(CHUNK, CHUNK), MapRoot(0, entry)), 0))
    second.start()
    # Until it waits, most likely; if not it finds out for itself.
    second.join(0.1)
    go_on.set()
    for thread in (first, second):
        thread.join()
    reader.close()
    assert sorted(brief.split(" cannot")[0] for brief in said) == [
        f"bytes 0 to {CHUNK}",
        f"bytes {victim * CHUNK} to {(victim + 1) * CHUNK}",
    ]


def test_what_is_closed_says_so(stored: tuple[Path, MapRoot]) -> None:
    reader = ImageReader(open_repository(stored[0]))
    reader.close()
    with pytest.raises(StorageError, match="not served any more"):
        reader.read(Image(GEOMETRY, stored[1]), 0, GEOMETRY.size)


@pytest.mark.parametrize(
    ("offset", "magic", "kind"),
    [(1080, b"\x53\xef", "ext4"), (0, b"XFSB", "xfs"), (65600, b"_BHRfS_M", "btrfs")],
)
def test_filesystems_are_told_by_their_first_bytes(offset: int, magic: bytes, kind: str) -> None:
    head = bytearray(HEAD_BYTES)
    head[offset : offset + len(magic)] = magic
    found = recognise(bytes(head))
    assert found is not None
    assert found.filesystem == kind
    assert recognise(bytes(head[:offset])) is None
    assert recognise(bytes(HEAD_BYTES)) is None
