"""Maps in which few nodes stand in very many places: what a stolen key can sign."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

from blocksnap.operations.catalogue import root_document
from blocksnap.repository.blockmap import FANOUT, Entry, MapRoot, encode_node
from blocksnap.repository.documents import Backup, Inodes, Manifest, Mapped, VolumeRecord
from blocksnap.repository.frame import FrameType
from blocksnap.repository.numbered import NumberedIndex
from blocksnap.repository.writer import RepositoryWriter
from support.inode_trees import NOTHING
from support.repositories import CHUNK, open_repository


def store_shared_map(run: RepositoryWriter, entries: list[Entry], levels: int) -> MapRoot:
    """Store a map of one node on each level: every entry leads to the only node of the level below."""
    id_ = run.store_node(encode_node(0, entries))
    for level in range(1, levels):
        id_ = run.store_node(encode_node(level, [id_] * FANOUT))
    return MapRoot(levels, id_)


def commit_map(
    run: RepositoryWriter,
    root: MapRoot,
    name: str,
    *,
    chunks: int | None = None,
    inodes: Inodes | None = None,
    mapped: MapRoot | None = None,
) -> str:
    """Commit a backup of a volume, or subvolume, as large as its map or so many chunks; return its id."""
    size = (root.capacity if chunks is None else chunks) * CHUNK
    told = None if mapped is None else Mapped(unit=CHUNK, length=1, map=root_document(mapped))
    now = datetime.now(UTC)
    backup = Backup(
        id=run.backup_id(0), volume=VolumeRecord(name=name, key=name, kind="file"), time=now, kind="full",
        parent=None, method="compare", reason="test", size=size, chunk_size=CHUNK,
        map=root_document(root), mapped=told, inodes=inodes, source={}, statistics=NOTHING,
    )  # fmt: skip
    manifest = Manifest(writer=run.id.hex(), time=now, host="h", hostname="h", program="p", backups=(backup,))
    return run.commit(lambda _: manifest)[0].backups[0].id


def lose_data(path: Path) -> None:
    """Take the one pack of data away."""
    repository = open_repository(path)
    repository.refresh_index()
    index = NumberedIndex(repository.index.views)
    (pack,) = {row[2] for row in index.entries() if row[5] == FrameType.DATA}
    (path / index.packs[pack].name).unlink()
