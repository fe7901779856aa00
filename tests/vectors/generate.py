"""Makes the test vectors: two small repositories with objects of every kind, and what is in them.

    cd tests && ../.venv/bin/python -m vectors.generate

writes ``encrypted/``, ``plain/`` and ``vectors.json`` beside this file anew. While the format is unreleased
that is right after every change of it. Afterwards never: then the vectors are what old repositories look
like, and a new version of the format gets vectors of its own. Keys, salts and ids are new each time.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import struct
import tempfile
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from blake3 import blake3

from blocksnap.backends.local import LocalBackend
from blocksnap.extents.mapped_set import MappedSet
from blocksnap.operations.catalogue import root_document
from blocksnap.operations.mapped import store_mapped
from blocksnap.repository.blockmap import HOLE, ZERO, MapReader, MapRoot, MapWriter
from blocksnap.repository.documents import (
    Backup,
    Condemned,
    Done,
    Fence,
    Forgotten,
    Inodes,
    Manifest,
    Statistics,
    Sweep,
    VolumeRecord,
)
from blocksnap.repository.epochs import create_forgotten, create_part
from blocksnap.repository.frame import FrameType, Opener, Sealer
from blocksnap.repository.index import HEADER as SEGMENT_HEADER
from blocksnap.repository.index import PACK, ROW
from blocksnap.repository.inode_map import (
    InodeMap,
    InodeMapWriter,
    store_listing,
    store_map,
    store_value,
)
from blocksnap.repository.inodes import InodeRecord, encode_xattrs
from blocksnap.repository.key_objects import create_key
from blocksnap.repository.keys import MINIMUM_COST, KeyRing, Role
from blocksnap.repository.listings import DirectoryEntry
from blocksnap.repository.pack import PackId
from blocksnap.repository.repository import Repository
from blocksnap.repository.writer import Author, RepositoryWriter
from support.repositories import CHUNK, make_repository, open_repository, store_bytes

HERE = Path(__file__).parent
FRAME = struct.Struct("<4sBBBBII32s24s")
PUBLIC = KeyRing.plain(bytes(16))
WHEN = datetime(2026, 11, 26, tzinfo=UTC)
TEXT = (b"The quick brown fox jumps over the lazy dog.\n" * 400)[:CHUNK]
HOLES = 70
"""So many that the map has two levels."""
TAIL = bytes(blake3(b"not compressible").digest(length=99))
MAPPED = MappedSet.of(65536, b"\x03" + bytes(4096) + b"\x80")
MOST_HEX = 1000
PASSPHRASES = {role: f"correct {role}".encode() for role in Role if role is not Role.ADMIN}
"""Of the other keys; that of the admin's is what the tests use everywhere."""


NAMES = tuple(DirectoryEntry(f"file {n:030}".encode(), 257 + n % 3, 1, 2 + n * 5) for n in range(80))
"""So many that the listing has blocks of its own."""
XATTRS = ((b"security.capability", bytes(range(20))), (b"user.note", b"long " * 300))
STATE = bytes.fromhex("010c000001020102 0d00201280400300 01010402020101".replace(" ", ""))
"""That of docs/design.md, 4.5."""
TREE = {257: TEXT + bytes(CHUNK) + TAIL, 258: TAIL, 259: b""}
"""The files of the subvolume, by their inodes."""
TARGET = b"../somewhere else"
DEVICE = (259, 65_536)


def content() -> bytes:
    """Return what the backup holds: a chunk of text, zeros, holes, the text again, and a short last chunk."""
    return TEXT + bytes(CHUNK) + bytes(CHUNK * HOLES) + TEXT + TAIL


def inode(number: int, mode: int, **parts: Any) -> InodeRecord:
    """Return a record with times before and after the epoch, to the nanosecond."""
    facts: dict[str, Any] = {"size": 0, "device": (0, 0), "nlink": 1, **parts}
    return InodeRecord(
        number=number, generation=7, mode=mode, uid=1000, gid=100, flags=1 << 11,
        mtime=1_764_115_200_123_456_789, atime=1_764_115_200_000_000_000, ctime=1_764_115_201_000_000_000,
        otime=-1, **facts,
    )  # fmt: skip


def store_tree(writer: RepositoryWriter, text: bytes, tail: bytes) -> InodeMap:
    """Store a subvolume: a directory, files of three, one and no chunks, a link, a device node."""
    tree = InodeMapWriter(writer, None, None)
    tree.put(inode(256, 0o040755, detail=store_listing(writer, NAMES), nlink=1))
    contents = {
        257: store_map(writer, [(0, text), (1, ZERO), (2, tail)], 3),
        258: store_map(writer, [(0, tail)], 1),
        259: MapRoot(0, HOLE),
    }
    for number, plain in TREE.items():
        xattrs = store_value(writer, encode_xattrs(XATTRS if number == 257 else ()))
        state = store_value(writer, STATE if number == 257 else b"")
        tree.put(
            inode(number, 0o100644, size=len(plain), xattrs=xattrs, detail=state, content=contents[number])
        )
    tree.put(inode(300, 0o120777, size=len(TARGET), detail=store_value(writer, TARGET)))
    tree.put(inode(5000, 0o060600, device=DEVICE))
    return tree.finish()


def make(place: Path, *, encrypted: bool) -> None:
    """Store backups of a volume and a subvolume, a fence in the place of another, and keys of each role."""
    repository = make_repository(place, encrypted=encrypted)
    digest = blake3(repository.backend.read("config")).hexdigest()
    for role, words in PASSPHRASES.items() if encrypted else ():
        create_key(repository.backend, repository.keys, role, words, config=digest, cost=MINIMUM_COST)
    with RepositoryWriter(repository, Author("0" * 32, "host.example")) as writer:
        with tempfile.TemporaryDirectory() as folder:
            text, tail = store_bytes(writer, TEXT + TAIL, Path(folder))
        entries = [text, ZERO, *[HOLE] * HOLES, text, tail]
        builder = MapWriter(MapReader(repository.load_node), None, len(entries), writer.store_node)
        for number, entry in enumerate(entries):
            builder.set(number, entry or HOLE)
        root = root_document(builder.finish())
        mapped = store_mapped(repository, writer, MAPPED, None)
        if text is None or tail is None:
            raise ValueError("chunks that are not zeros have ids")
        tree = store_tree(writer, text, tail)

        def compose(_: RepositoryWriter) -> Manifest:
            backup = Backup(
                id=blake3(writer.id + bytes(4)).hexdigest()[:32],
                volume=VolumeRecord(name="vg0/data", key="lvm:vg0:data", kind="thin"),
                time=WHEN,
                kind="full",
                parent=None,
                method="compare",
                reason="first backup",
                size=len(content()),
                chunk_size=CHUNK,
                map=root,
                mapped=mapped,
                source={"vg": "vg0", "lv": "data", "time": 7, "healthy": True, "origin": None},
                statistics=Statistics(
                    changed_bytes=len(content()), read_bytes=len(content()), new_bytes=0, stored_bytes=0,
                    metadata_bytes=0, new_chunks=2, freeze_ms=1.5, skew_ms=0, seconds=0.25,
                ),
            )  # fmt: skip
            subvolume = backup.model_copy(
                update={
                    "id": blake3(writer.id + (1).to_bytes(4, "little")).hexdigest()[:32],
                    "volume": VolumeRecord(name="/srv/data", key="btrfs:f/s", kind="subvolume"),
                    "time": WHEN + timedelta(seconds=1),
                    "size": tree.file_bytes,
                    "map": root_document(tree.root),
                    "mapped": None,
                    "inodes": Inodes(pages=tree.pages, count=tree.count),
                }
            )
            return Manifest(
                writer=writer.id.hex(), time=WHEN, host="0" * 32, hostname="host.example",
                program="blocksnap", tags={"job": "night"}, backups=(backup, subvolume),
            )  # fmt: skip

        writer.commit(compose)
    fence = Fence(writer=os.urandom(16).hex(), time=WHEN, fenced=True)
    stored = Sealer(repository.keys).seal(FrameType.MANIFEST, fence.model_dump_json().encode())
    repository.backend.put(f"manifests/{fence.writer}", stored)
    collect(repository, os.urandom(16).hex())


def collect(repository: Repository, run: str) -> None:
    """Store what a collection leaves that had a forgotten backup to remove."""
    gone, manifest = os.urandom(16).hex(), os.urandom(16).hex()
    pack = PackId(os.urandom(16), os.urandom(32)).name
    create_forgotten(repository, Forgotten(run=run, time=WHEN, backups=(gone,)))
    condemned = Condemned(epoch=1, run=run, time=WHEN, packs=(pack,), marked=(manifest,), forgotten=(gone,))
    create_part(repository, "condemned", condemned)
    create_part(repository, "sweep", Sweep(epoch=1, run=run, time=WHEN, packs=(pack,), manifests=(manifest,)))
    create_part(repository, "done", Done(epoch=1, run=run, time=WHEN))


def describe(place: Path) -> dict[str, Any]:
    """Return what lies in a repository, down to each frame, as this version of blocksnap reads it."""
    repository = open_repository(place)
    backend = LocalBackend(str(place))
    secrets = {
        one.name: value.hex()
        for one in dataclasses.fields(repository.keys)
        if isinstance(value := getattr(repository.keys, one.name), bytes)
    }
    names = sorted(info.name for info in backend.list(""))
    return {
        "keys": {**secrets, "index_key": repository.keys.index_key.hex()},
        "content": blake3(content()).hexdigest(),
        "mapped": {"unit": MAPPED.unit, "bitmap": blake3(MAPPED.read(0, MAPPED.length)).hexdigest()},
        "objects": {name: describe_object(repository, name, backend.read(name)) for name in names},
    }


def describe_object(repository: Repository, name: str, stored: bytes) -> dict[str, Any]:
    """Return the parts of one object."""
    found: dict[str, Any] = {"size": len(stored), "blake3": blake3(stored).hexdigest()}
    if name.startswith("index/"):
        _, version, rows, packs, _, _ = SEGMENT_HEADER.unpack_from(stored)
        table = SEGMENT_HEADER.size + rows * ROW.size
        found["version"] = version
        found["rows"] = [
            {
                "id": id_.hex(),
                "pack": pack,
                "offset": offset,
                "length": packed & 0xFFFFFF,
                "type": packed >> 24,
            }
            for id_, pack, offset, packed in ROW.iter_unpack(stored[SEGMENT_HEADER.size : table])
        ]
        found["packs"] = [
            {"writer": writer.hex(), "hash": hash_.hex(), "size": size}
            for writer, hash_, size in PACK.iter_unpack(stored[table : table + packs * PACK.size])
        ]
        return found
    keys = PUBLIC if name == "config" or name.startswith("keys/") else repository.keys
    begin, end = (64, len(stored) - 16) if name.startswith("packs/") else (0, len(stored))
    found["frames"] = []
    while begin < end:
        frame = describe_frame(keys, stored, begin)
        found["frames"].append(frame)
        begin += frame["length"]
    return found


def describe_frame(keys: KeyRing, stored: bytes, offset: int) -> dict[str, Any]:
    """Return the header of a frame and, if it is short, its plaintext."""
    _, type_, codec, cipher, _, payload, _, id_, salt = FRAME.unpack_from(stored, offset)
    length = 72 + payload + 16
    plain = bytes(Opener(keys).open(memoryview(stored)[offset : offset + length], where="vector"))
    found = {"offset": offset, "length": length, "type": type_, "codec": codec, "cipher": cipher}
    found |= {"id": id_.hex(), "salt": salt.hex(), "plain_length": len(plain)}
    found["plain_blake3"] = blake3(plain).hexdigest()
    if len(plain) <= MOST_HEX:
        found["plain"] = plain.hex()
    return found


def main() -> None:
    described = {}
    for kind in ("encrypted", "plain"):
        shutil.rmtree(HERE / kind, ignore_errors=True)
        make(HERE / kind, encrypted=kind == "encrypted")
        described[kind] = describe(HERE / kind)
    (HERE / "vectors.json").write_text(json.dumps(described, indent=1) + "\n")


if __name__ == "__main__":
    main()
