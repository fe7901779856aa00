"""Backups of subvolumes made by hand: a few inodes whose records refer to whatever a record can refer to."""

from __future__ import annotations

import random
import stat
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cache
from pathlib import Path

from blocksnap.operations.catalogue import map_root, newest_of, root_document
from blocksnap.repository.blockmap import MapRoot
from blocksnap.repository.documents import Backup, Inodes, Manifest, Statistics, VolumeRecord
from blocksnap.repository.frame import FrameType
from blocksnap.repository.inode_map import (
    ContentWriter,
    InodeMap,
    InodeMapWriter,
    InodeReader,
    store_listing,
    store_value,
)
from blocksnap.repository.inodes import InodeRecord, decode_xattrs, encode_xattrs
from blocksnap.repository.listings import DirectoryEntry
from blocksnap.repository.repository import Repository
from blocksnap.repository.writer import RepositoryWriter
from support.repositories import CHUNK, open_repository

NOTHING = Statistics(
    changed_bytes=0, read_bytes=0, new_bytes=0, stored_bytes=0, metadata_bytes=0, new_chunks=0,
    freeze_ms=0, skew_ms=0, seconds=0,
)  # fmt: skip


@dataclass(frozen=True)
class Node:
    """One inode: a file of chunks made from seeds, a directory, a link."""

    chunks: Mapping[int, int] = field(default_factory=dict)
    places: int = 0
    names: tuple[DirectoryEntry, ...] = ()
    xattrs: tuple[tuple[bytes, bytes], ...] = ()
    detail: bytes = b""
    kind: int = stat.S_IFREG
    mtime: int = 0


@cache
def chunk(seed: int) -> bytes:
    return random.Random(seed).randbytes(CHUNK)


def inode_map(backup: Backup) -> InodeMap:
    assert backup.inodes is not None
    return InodeMap(map_root(backup.map), backup.inodes.pages, backup.inodes.count, backup.size)


def record(run: RepositoryWriter, reader: InodeReader | None, number: int, node: Node) -> InodeRecord:
    before = reader.find(number) if reader else None
    builder = ContentWriter(
        reader.maps if reader else InodeReader(_Nowhere(), InodeMap(MapRoot(1, b"\0"), 1, 0, 0)).maps,
        run,
        before.content if before is not None and before.is_file else None,
        node.places,
    )
    for place in range(node.places):
        if place in node.chunks:
            builder.set(place, run.store_blob(FrameType.DATA, chunk(node.chunks[place])))
        else:
            builder.fill(place, place + 1)
    is_directory = stat.S_ISDIR(node.kind)
    return InodeRecord(
        number=number, generation=7, mode=node.kind | 0o644, uid=1000, gid=100, nlink=1, flags=0,
        size=node.places * CHUNK, device=(8, 1) if stat.S_ISBLK(node.kind) else (0, 0), mtime=node.mtime,
        atime=-5, ctime=10**18, otime=1 << 70, xattrs=store_value(run, encode_xattrs(node.xattrs)),
        detail=store_listing(run, node.names) if is_directory else store_value(run, node.detail),
        content=builder.finish() if stat.S_ISREG(node.kind) else MapRoot(0, b"\0"),
    )  # fmt: skip


class _Nowhere:
    def load(self, kind: FrameType, id_: bytes) -> bytes:
        raise AssertionError((kind, id_))


def store_tree(
    run: RepositoryWriter, repository: Repository, changes: Mapping[int, Node | None]
) -> Callable[[], str]:
    """Store changed inodes on top of the newest backup; what is returned commits it."""
    parent = newest_of(repository.backups(), "tree")
    known = inode_map(parent) if parent else None
    reader = InodeReader(repository, known) if known else None
    writer = InodeMapWriter(run, reader, known)
    for number, node in sorted(changes.items()):
        if node is None:
            writer.remove(number)
        else:
            writer.put(record(run, reader, number, node))
    found = writer.finish()
    return lambda: run.commit(lambda _: _manifest(run, found, parent))[0].backups[0].id


def _manifest(run: RepositoryWriter, found: InodeMap, parent: Backup | None) -> Manifest:
    now = datetime.now(UTC)
    backup = Backup(
        id=run.backup_id(0), volume=VolumeRecord(name="tree", key="tree", kind="subvolume"), time=now,
        kind="incremental" if parent else "full", parent=parent.id if parent else None, method="btrfs-tree",
        reason="test", size=found.file_bytes, chunk_size=CHUNK, map=root_document(found.root),
        inodes=Inodes(pages=found.pages, count=found.count), source={}, statistics=NOTHING,
    )  # fmt: skip
    return Manifest(writer=run.id.hex(), time=now, host="h", hostname="h", program="p", backups=(backup,))


def read_tree(path: Path, id_: str) -> dict[int, Node]:
    """Read everything that a backup has, with every chunk and block."""
    repository = open_repository(path)
    backup = next(each.backup for each in repository.backups() if each.backup.id == id_)
    return read_nodes(repository, inode_map(backup))


def read_nodes(repository: Repository, found: InodeMap) -> dict[int, Node]:
    reader, nodes = InodeReader(repository, found), {}
    seeds = {chunk(seed): seed for seed in range(64)}
    for each in reader.records():
        places = each.size // CHUNK
        runs = reader.maps.runs(each.content, 0, places)
        chunks = {
            number: seeds[repository.load(FrameType.DATA, entry)]
            for number, _, entry in runs
            if len(entry) == 32
        }
        nodes[each.number] = Node(
            chunks=chunks,
            places=places,
            names=tuple(reader.listing(each)) if each.is_directory else (),
            xattrs=tuple(decode_xattrs(reader.value(each.xattrs), "test")),
            detail=b"" if each.is_directory else reader.value(each.detail),
            kind=stat.S_IFMT(each.mode),
            mtime=each.mtime,
        )
    assert len(nodes) == found.count
    assert sum(node.places * CHUNK for node in nodes.values()) == found.file_bytes
    return nodes
