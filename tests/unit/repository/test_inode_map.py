"""The map of a subvolume: what is written is read, what is unchanged shared, what is hostile refused."""

from __future__ import annotations

import stat
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from blocksnap.repository.blockmap import HOLE, ZERO, MapRoot, encode_node
from blocksnap.repository.compact import fold, read_number, unfold, write_number
from blocksnap.repository.errors import DamagedObjectError, NewerFormatError
from blocksnap.repository.frame import FrameType
from blocksnap.repository.inode_map import (
    InodeMap,
    InodeMapWriter,
    InodeReader,
    store_listing,
    store_value,
)
from blocksnap.repository.inodes import (
    PAGE_INODES,
    InodeRecord,
    Value,
    decode_page,
    decode_xattrs,
    encode_page,
    encode_xattrs,
    page_references,
)
from blocksnap.repository.listings import DirectoryEntry, decode_listing, encode_listing

NONE: InodeMap | None = None


class Blobs:
    """Blobs in memory, each with the type it was stored as."""

    def __init__(self) -> None:
        self.kept: dict[tuple[FrameType, bytes], bytes] = {}
        self.loaded = 0

    def store_blob(self, kind: FrameType, plain: bytes) -> bytes:
        from blake3 import blake3

        id_ = blake3(bytes([kind]) + plain).digest()
        self.kept[kind, id_] = plain
        return id_

    def load(self, kind: FrameType, id_: bytes) -> bytes:
        self.loaded += 1
        if (kind, id_) not in self.kept:
            raise DamagedObjectError(id_.hex(), "it is missing")
        return self.kept[kind, id_]


def inode(number: int, size: int = 0, mode: int = stat.S_IFREG | 0o600, **other: object) -> InodeRecord:
    facts: dict[str, object] = {
        "generation": 3, "uid": 0, "gid": 0, "nlink": 1, "flags": 0, "device": (0, 0), "mtime": 5, "atime": 5,
        "ctime": 5, "otime": 5,
    }  # fmt: skip
    return InodeRecord(number=number, mode=mode, size=size, **{**facts, **other})  # type: ignore[arg-type]


numbers = st.integers(256, 300) | st.integers(1000, 1100) | st.sampled_from([70_000, 5_000_000, 1 << 40])
trees = st.dictionaries(numbers, st.integers(0, 1 << 40), max_size=30)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.dictionaries(numbers, st.none() | st.integers(0, 1 << 40), max_size=20), max_size=4))
def test_what_is_written_is_read(rounds: list[dict[int, int | None]]) -> None:
    blobs, found, model = Blobs(), NONE, dict[int, int]()
    for changes in rounds:
        reader = InodeReader(blobs, found) if found else None
        writer = InodeMapWriter(blobs, reader, found)
        for number, size in sorted(changes.items()):
            if size is None:
                writer.remove(number)
                model.pop(number, None)
            else:
                writer.put(inode(number, size))
                model[number] = size
        found = writer.finish()
        read = InodeReader(blobs, found)
        assert {record.number: record.size for record in read.records()} == model
        assert (found.count, found.file_bytes) == (len(model), sum(model.values()))
        assert all(read.find(number) is not None for number in model)
        assert read.find(999) is None
        assert 64**found.root.levels >= found.pages


def test_one_touched_inode_writes_its_page_and_the_path_to_it() -> None:
    blobs = Blobs()
    writer = InodeMapWriter(blobs, None, None)
    for number in range(256, 20_256):
        writer.put(inode(number, number))
    full = writer.finish()
    assert sum(kind == FrameType.INODES for kind, _ in blobs.kept) == 1250
    before = set(blobs.kept)
    reader = InodeReader(blobs, full)
    blobs.loaded = 0
    writer = InodeMapWriter(blobs, reader, full)
    writer.put(inode(15_000, 1))
    found = writer.finish()
    new = [kind for kind, _ in blobs.kept.keys() - before]
    assert sorted(new) == [FrameType.NODE] * 2 + [FrameType.INODES]
    assert blobs.loaded <= 8
    assert found.count == full.count
    again = InodeMapWriter(blobs, InodeReader(blobs, found), found)
    again.put(inode(15_000, 15_000))
    assert again.finish() == full


@pytest.mark.parametrize("length", [0, 1, 1024, 1025, 65_536, 65_537, 300_000])
def test_values_of_any_length(length: int) -> None:
    blobs = Blobs()
    data = bytes(number * 7 % 251 for number in range(length))
    value = store_value(blobs, data)
    reader = InodeReader(blobs, InodeMap(MapRoot(1, b"\0"), 1, 0, 0))
    assert reader.value(value) == data
    assert value.is_inline == (length <= 1024)
    page = encode_page([inode(256, xattrs=value, detail=value)])
    assert decode_page(page, 16, "here")[0].xattrs == value
    if length:
        cut = Value(length + 1, value.inline + b"x", value.places, value.root)
        with pytest.raises(DamagedObjectError):
            reader.value(cut) if not cut.is_inline else decode_page(page[:-1], 16, "here")
    if not value.is_inline:
        # Nothing is read of more blocks than the length has room for.
        with pytest.raises(DamagedObjectError, match=f"{length} bytes in {1 << 40} blocks"):
            reader.value(Value(length, b"", 1 << 40, value.root))


def names(count: int, step: int = 1) -> list[DirectoryEntry]:
    return [
        DirectoryEntry(f"name-{number}".encode(), 1000 - number % 7, 1, 2 + number * step)
        for number in range(count)
    ]


@pytest.mark.parametrize(("count", "step"), [(0, 1), (1, 1), (60, 1), (5000, 1), (200, 100_000)])
def test_listings_of_any_length(count: int, step: int) -> None:
    blobs = Blobs()
    reader = InodeReader(blobs, InodeMap(MapRoot(1, b"\0"), 1, 0, 0))
    listed = names(count, step)
    value = store_listing(blobs, listed)
    assert reader.listing(inode(256, mode=stat.S_IFDIR, detail=value)) == listed
    before = set(blobs.kept)
    if count > 100:
        store_listing(blobs, listed[:50] + listed[51:])
        blocks = [kind for kind, _ in blobs.kept.keys() - before if kind == FrameType.ATTACHMENT]
        assert len(blocks) <= 1, "one name less is one block"


def test_a_name_is_one_name_and_comes_once() -> None:
    for name in (b"..", b".", b"a/b", b"a\0b", b"/"):
        with pytest.raises(DamagedObjectError):
            list(decode_listing(encode_listing([DirectoryEntry(name, 300, 1, 2)]), "here"))
    step = (1 << 63) - 1
    far = [DirectoryEntry(bytes((97 + at,)), step * (at + 1), 1, 2 + at) for at in range(3)]
    with pytest.raises(DamagedObjectError):
        list(decode_listing(encode_listing(far), "here"))
    assert len(list(decode_listing(encode_listing(far[:2]), "here"))) == 2
    twice = [DirectoryEntry(b"a", 300, 1, 2), DirectoryEntry(b"a", 301, 1, 3)]
    reader = InodeReader(Blobs(), InodeMap(MapRoot(1, b"\0"), 1, 0, 0))
    with pytest.raises(DamagedObjectError, match="twice"):
        reader.listing(inode(256, mode=stat.S_IFDIR, detail=Value.short(encode_listing(twice))))


def test_a_name_of_an_attribute_ends_nowhere_else() -> None:
    assert decode_xattrs(encode_xattrs([(b"user.a", b"\0")]), "here") == [(b"user.a", b"\0")]
    with pytest.raises(DamagedObjectError):
        decode_xattrs(encode_xattrs([(b"user.a\0b", b"")]), "here")


@given(st.binary(max_size=200))
def test_hostile_pages_are_refused(data: bytes) -> None:
    for read in (lambda: decode_page(b"\1" + data, 16, "here"), lambda: page_references(data, "here")):
        try:
            read()
        except (DamagedObjectError, NewerFormatError):
            continue


@given(st.binary(max_size=100))
def test_hostile_listings_are_refused(data: bytes) -> None:
    try:
        entries = list(decode_listing(b"\x81" + data, "here"))
    except DamagedObjectError:
        return
    assert all(b"/" not in entry.name for entry in entries)


@pytest.mark.parametrize(
    "facts",
    [
        *({name: 1 << 32} for name in ("uid", "gid", "nlink")),
        *({"device": numbers} for numbers in ((1 << 31, 0), (0, 1 << 31))),
    ],
)
def test_numbers_that_no_kernel_has_are_refused(facts: dict[str, object]) -> None:
    def page(facts: dict[str, object]) -> bytes:
        return encode_page([inode(257, mode=stat.S_IFBLK | 0o600, **facts)])

    least = {name: (0, 0) if name == "device" else 0 for name in facts}
    assert decode_page(page(least), 257 // PAGE_INODES, "here")
    with pytest.raises(DamagedObjectError):
        decode_page(page(facts), 257 // PAGE_INODES, "here")


def test_a_later_version_is_no_damage() -> None:
    with pytest.raises(NewerFormatError):
        decode_page(b"\2\1\0\0", 16, "here")
    with pytest.raises(NewerFormatError):
        page_references(b"\2\1\0\0", "here")


@given(st.integers(-(1 << 90), 1 << 90))
def test_numbers(value: int) -> None:
    coded = write_number(fold(value))
    found, end = read_number(coded, 0, 100)
    assert (unfold(found), end) == (value, len(coded))
    if abs(value) > 1 << 66:
        with pytest.raises(ValueError, match="64 bits"):
            read_number(coded, 0)


ROOT = MapRoot(2, b"\7" * 32)


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda: inode(256, 1 << 20, content=ROOT), [FrameType.DATA]),
        (lambda: inode(256, 5, content=MapRoot(0, b"\7" * 32)), [FrameType.DATA]),
        (lambda: inode(256, 5, content=MapRoot(0, b"\1")), []),
        (lambda: inode(256, xattrs=Value(1 << 20, b"", 100, ROOT)), [FrameType.ATTACHMENT]),
        (lambda: inode(256, mode=stat.S_IFDIR, detail=Value(2000, b"", 100, ROOT)), [FrameType.ATTACHMENT]),
        (lambda: inode(256, mode=stat.S_IFLNK, detail=Value(2000, b"", 100, ROOT)), [FrameType.ATTACHMENT]),
    ],
)
def test_whatever_a_record_refers_to_is_named(
    make: Callable[[], InodeRecord], expected: list[FrameType]
) -> None:
    record = make()
    found = page_references(encode_page([record]), "here")
    assert [each.leaf for each in found] == expected
    assert all(each.root in (ROOT, record.content) for each in found)


@pytest.mark.parametrize("what", ["holes", "holes and zeros", "empty blocks"])
def test_a_listing_that_leads_to_nothing_has_an_end(what: str) -> None:
    """One node of each level stands in the place of all: 64^9 blocks, and not a name in them."""
    blobs = Blobs()
    empty = blobs.store_blob(FrameType.ATTACHMENT, encode_listing([]))
    leaves = {"holes": [HOLE] * 64, "holes and zeros": [HOLE, ZERO] * 32, "empty blocks": [empty] * 64}
    entry = blobs.store_blob(FrameType.NODE, encode_node(0, leaves[what]))
    for level in range(1, 9):
        entry = blobs.store_blob(FrameType.NODE, encode_node(level, [entry] * 64))
    value = Value(1 << 40, b"", 64**9, MapRoot(9, entry))
    reader = InodeReader(blobs, InodeMap(MapRoot(9, entry), 64**9, 1, 0))
    with pytest.raises(DamagedObjectError, match=r"nodes that lead to nothing|block without names"):
        reader.listing(inode(256, mode=stat.S_IFDIR, detail=value))
    if what != "empty blocks":
        with pytest.raises(DamagedObjectError, match="nodes that lead to nothing"):
            list(reader.pages(lambda *_: None))
        with pytest.raises(DamagedObjectError, match="nodes that lead to nothing"):
            list(reader.records())


def test_no_more_inodes_are_read_than_there_are_said_to_be() -> None:
    blobs = Blobs()
    entry = blobs.store_blob(FrameType.INODES, encode_page([inode(1)]))
    for level in range(9):
        entry = blobs.store_blob(FrameType.NODE, encode_node(level, [entry] * 64))
    reader = InodeReader(blobs, InodeMap(MapRoot(9, entry), 64**9, 100, 0))
    with pytest.raises(DamagedObjectError, match="more than 100"):
        list(reader.records())


def test_names_far_apart_are_listed() -> None:
    """Between them are as many holes as there can be: at the end of each node, and at the beginning."""
    blobs, at = Blobs(), [2, *(256 * 64**level for level in range(5)), 256 * 64**5 - 1, 256 * 64**9 + 1]
    entries = [DirectoryEntry(b"n" * 200 + b"%d" % index, 257, 1, index) for index in sorted(at)]
    value = store_listing(blobs, entries)
    assert not value.is_inline
    reader = InodeReader(blobs, InodeMap(MapRoot(1, HOLE), 1, 0, 0))
    assert reader.listing(inode(256, mode=stat.S_IFDIR, detail=value)) == entries
