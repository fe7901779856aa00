"""What is in tests/vectors is read for ever, and written again where nothing in it is random."""

from __future__ import annotations

import io
import itertools
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from blake3 import blake3

from blocksnap.backends.local import LocalBackend
from blocksnap.operations.catalogue import map_root
from blocksnap.operations.mapped import load_mapped
from blocksnap.pipeline.flow import Geometry
from blocksnap.repository.blockmap import MapReader, decode_node, encode_node
from blocksnap.repository.check import Checker
from blocksnap.repository.frame import FrameType, Sealer
from blocksnap.repository.index import encode_segment
from blocksnap.repository.inode_map import InodeMap, InodeReader
from blocksnap.repository.inodes import decode_page, decode_xattrs, encode_page
from blocksnap.repository.keys import KeyRing, Role
from blocksnap.repository.pack import HEADER, MAGIC, PackId, SealedPack, read_footer
from blocksnap.repository.repository import Repository
from blocksnap.restore.engine import restore_to_stream
from support import independent_reader
from support.repositories import CHUNK, PASSPHRASE, open_repository
from vectors import generate

VECTORS = Path(generate.__file__).parent
EXPECTED = json.loads((VECTORS / "vectors.json").read_text())
PUBLIC = KeyRing.plain(bytes(16))


@pytest.fixture(params=["encrypted", "plain"])
def kind(request: pytest.FixtureRequest) -> str:
    found: str = request.param
    return found


@pytest.fixture
def repository(kind: str) -> Iterator[Repository]:
    found = open_repository(VECTORS / kind)
    yield found
    found.close()


def frames(kind: str) -> Iterator[tuple[str, dict[str, Any], bytes]]:
    """Yield the object, the description and the bytes of every frame."""
    for name, described in EXPECTED[kind]["objects"].items():
        stored = (VECTORS / kind / name).read_bytes()
        assert blake3(stored).hexdigest() == described["blake3"]
        for frame in described.get("frames", ()):
            yield name, frame, stored[frame["offset"] : frame["offset"] + frame["length"]]


def is_public(name: str) -> bool:
    return name.startswith(("config", "keys/"))


def test_there_is_one_of_each_sort(kind: str) -> None:
    sorts = {(frame["type"], frame["codec"], frame["cipher"]) for _, frame, _ in frames(kind)}
    assert {type_ for type_, _, _ in sorts} == {*FrameType} - ({FrameType.KEY} if kind == "plain" else set())
    assert {(codec, cipher > 0) for type_, codec, cipher in sorts if type_ == FrameType.DATA} == {
        (0, kind == "encrypted"),
        (1, kind == "encrypted"),
    }
    folders = {name.split("/")[0] for name in EXPECTED[kind]["objects"]}
    assert folders == {"config", "gc", "index", "manifests", "packs", "writers"} | (
        {"keys"} if kind == "encrypted" else set()
    )


def test_they_are_read_as_they_always_were(kind: str) -> None:
    assert generate.describe(VECTORS / kind) == EXPECTED[kind]


def test_the_backup_is_restored(kind: str, repository: Repository) -> None:
    stored, _ = repository.backups()
    backup, out = stored.backup, io.BytesIO()
    geometry = Geometry(backup.size, backup.chunk_size)
    runs = MapReader(repository.load_node).runs(map_root(backup.map), 0, geometry.count)
    restore_to_stream(repository, geometry, runs, out, lambda _: None)
    assert out.getvalue() == generate.content()
    assert blake3(out.getvalue()).hexdigest() == EXPECTED[kind]["content"]
    mapped = load_mapped(repository, backup.mapped)
    assert mapped
    assert (mapped.unit, mapped.length) == (generate.MAPPED.unit, generate.MAPPED.length)
    assert mapped.read(0, mapped.length) == generate.MAPPED.read(0, mapped.length)
    checker = Checker(repository, map_root, lambda _: None)
    checker.check_structure()
    checker.check_packs()
    assert checker.result.findings == []
    assert repository.damage == []


def test_the_independent_reader_agrees(kind: str, tmp_path: Path) -> None:
    reader = independent_reader.Repository(VECTORS / kind, PASSPHRASE)
    for name, expected in EXPECTED[kind]["keys"].items():
        held = {**reader.keys.held, "index_key": reader.keys.index_key}
        assert held.get(name, bytes.fromhex(expected)).hex() == expected, name
    public = independent_reader.Keys(bytes(16), None)
    count = 0
    for name, frame, stored in frames(kind):
        keys = public if is_public(name) else reader.keys
        plain = keys.open(stored, frame["type"], name, bytes.fromhex(frame["id"]))
        assert blake3(plain).hexdigest() == frame["plain_blake3"]
        count += name.startswith("packs/") and frame["type"] != FrameType.FOOTER
    assert reader.verify() == count
    backup, _ = reader.backups()
    reader.restore(backup, tmp_path / "out")
    assert (tmp_path / "out").read_bytes() == generate.content()
    assert reader.mapped(backup) == generate.MAPPED.read(0, generate.MAPPED.length)


def test_the_subvolume_is_read(kind: str, repository: Repository) -> None:
    _, stored = repository.backups()
    backup = stored.backup
    assert backup.inodes is not None
    found = InodeMap(map_root(backup.map), backup.inodes.pages, backup.inodes.count, backup.size)
    reader = InodeReader(repository, found)
    records = {record.number: record for record in reader.records()}
    assert sorted(records) == [256, *generate.TREE, 300, 5000]
    assert reader.listing(records[256]) == list(generate.NAMES)
    for number, content in generate.TREE.items():
        runs = reader.maps.runs(records[number].content, 0, -(-records[number].size // CHUNK))
        parts = (repository.load(FrameType.DATA, e) if len(e) == 32 else bytes(CHUNK) for *_, e in runs)
        assert b"".join(parts) == content
    assert tuple(decode_xattrs(reader.value(records[257].xattrs), kind)) == generate.XATTRS
    assert reader.value(records[257].detail) == generate.STATE
    assert reader.value(records[300].detail) == generate.TARGET
    assert records[5000] == generate.inode(5000, 0o060600, device=generate.DEVICE)


def test_the_independent_reader_reads_the_subvolume(kind: str) -> None:
    reader = independent_reader.Repository(VECTORS / kind, PASSPHRASE)
    _, backup = reader.backups()
    records = {record["number"]: record for record in reader.inodes(backup)}
    assert sorted(records) == [256, *generate.TREE, 300, 5000]
    names = [(entry.index, entry.inode, entry.kind, entry.name) for entry in generate.NAMES]
    assert reader.listing(records[256]) == names
    for number, content in generate.TREE.items():
        assert b"".join(reader.contents(backup, records[number])) == content
    assert tuple(records[257]["xattrs"]) == generate.XATTRS
    assert (records[257]["detail"], records[300]["detail"]) == (generate.STATE, generate.TARGET)
    expected = generate.inode(5000, 0o060600, device=generate.DEVICE)
    for name in (
        "mode",
        "uid",
        "gid",
        "nlink",
        "flags",
        "size",
        "device",
        "mtime",
        "atime",
        "ctime",
        "otime",
    ):
        assert records[5000][name] == getattr(expected, name), name


def test_pages_are_written_the_same(kind: str) -> None:
    pages = [bytes.fromhex(f["plain"]) for _, f, _ in frames(kind) if f["type"] == FrameType.INODES]
    assert len(pages) == 3
    for page in pages:
        assert encode_page(decode_page(page, 16, kind)) == page


@pytest.mark.parametrize("role", generate.PASSPHRASES)
def test_keys_of_every_role_open(role: Role) -> None:
    passphrase = generate.PASSPHRASES[role]
    repository = Repository.open(LocalBackend(str(VECTORS / "encrypted")), lambda: passphrase)
    assert repository.keys.role is role
    for name, key in repository.keys.held_by(role).items():
        assert key.hex() == EXPECTED["encrypted"]["keys"][name]
    assert len(repository.backups()) == 2
    if role is Role.RESTORE:
        reader = independent_reader.Repository(VECTORS / "encrypted", passphrase)
        assert reader.verify() > 0
    else:
        with pytest.raises(independent_reader.DamagedError, match="may not read"):
            independent_reader.Repository(VECTORS / "encrypted", passphrase)


def seal_again(keys: KeyRing, frame: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> bytes:
    salt = bytes.fromhex(frame["salt"])
    with monkeypatch.context() as patch:
        patch.setattr(os, "urandom", lambda _: salt[:16])
        sealer = Sealer(keys)
    sealer._salt_count = itertools.count(int.from_bytes(salt[16:], "little"))
    return sealer.seal(FrameType(frame["type"]), bytes.fromhex(frame["plain"]), compress=False)


def test_frames_are_sealed_the_same(
    kind: str, repository: Repository, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All that are not compressed: what zstd makes of something is not the same in each of its versions."""
    sealed = set()
    for name, frame, stored in frames(kind):
        if frame["codec"] == 0 and frame["cipher"] < 2 and "plain" in frame:
            keys = PUBLIC if is_public(name) else repository.keys
            assert seal_again(keys, frame, monkeypatch) == stored, name
            sealed.add(frame["type"])
    assert FrameType.NODE in sealed


def test_nodes_and_documents_are_written_the_same(kind: str) -> None:
    nodes = 0
    for name, frame, _ in frames(kind):
        if frame["type"] == FrameType.NODE:
            plain = bytes.fromhex(frame["plain"])
            assert encode_node(plain[0], decode_node(plain, level=plain[0], where=name)) == plain
            nodes += 1
    assert nodes == 9


def test_segments_and_pack_headers_are_written_the_same(kind: str, repository: Repository) -> None:
    listed = []
    for name in EXPECTED[kind]["objects"]:
        if name.startswith("packs/"):
            stored = (VECTORS / kind / name).read_bytes()
            pack = PackId.parse(name)
            rows = read_footer(repository.backend, repository.keys, name, len(stored))
            listed.append(SealedPack(pack, len(stored), rows))
            header = HEADER.pack(MAGIC, 1, 0, repository.keys.repository_id, pack.writer, stored[48:64])
            assert stored[:64] == header
    (segment,) = [name for name in EXPECTED[kind]["objects"] if name.startswith("index/")]
    order = [bytes.fromhex(pack["hash"]) for pack in EXPECTED[kind]["objects"][segment]["packs"]]
    listed.sort(key=lambda pack: order.index(pack.id.hash))
    assert encode_segment(listed, repository.keys.index_key) == (VECTORS / kind / segment).read_bytes()


def test_ids(kind: str, repository: Repository) -> None:
    for name, frame, _ in frames(kind):
        if "plain" in frame:
            keys = PUBLIC if is_public(name) else repository.keys
            assert keys.identify(frame["type"], bytes.fromhex(frame["plain"])).hex() == frame["id"]


@pytest.mark.parametrize("encrypted", [True, False])
def test_the_script_still_makes_them(tmp_path: Path, *, encrypted: bool) -> None:
    """What it makes now has the shape of what is committed; if not, the format has changed."""
    place = tmp_path / "made"
    generate.make(place, encrypted=encrypted)
    made, committed = generate.describe(place), EXPECTED["encrypted" if encrypted else "plain"]

    def shape(described: dict[str, Any]) -> object:
        objects = described["objects"].items()
        sorts = sorted(
            (name.split("/")[0], [(f["type"], f["cipher"], f["plain_length"]) for f in one.get("frames", ())])
            for name, one in objects
            if not name.startswith(("writers/", "config"))
        )
        return sorts, described["content"], described["mapped"], sorted(described["keys"])

    assert shape(made) == shape(committed)
