"""Compare the backup of a subvolume with a snapshot of it that is taken now: every inode, every byte."""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from dataclasses import dataclass

from blocksnap.controller.settings import LimitSettings
from blocksnap.errors import BlocksnapError
from blocksnap.extents.btrfs_changes import Change, InodeChange
from blocksnap.operations.backup import open_session
from blocksnap.operations.compare import Naming
from blocksnap.operations.guarding import guarded
from blocksnap.operations.reporting import Reporter, phase
from blocksnap.operations.tree_records import make_record
from blocksnap.operations.tree_storing import inode_map, select_chunks
from blocksnap.pipeline.files import FilesFlow
from blocksnap.pipeline.flow import ChunkResult
from blocksnap.repository.blockmap import ZERO, MapReader, MapRoot
from blocksnap.repository.documents import Backup
from blocksnap.repository.frame import FrameType
from blocksnap.repository.inode_map import ContentWriter, InodeReader
from blocksnap.repository.keys import Right
from blocksnap.repository.repository import Repository
from blocksnap.volumes.base import TreeSnapshot, Volume, is_tree
from blocksnap.volumes.errors import SnapshotLostError

_MOST_TOLD = 100
_ATTRIBUTES = ("mode", "uid", "gid", "nlink", "flags", "size", "device", "mtime", "otime", "xattrs")
"""What has to be the same. A read changes atime, and whatever moves blocks the state of a file."""


class InodeDiffersError(BlocksnapError):
    """An inode of a live subvolume is not that of the backup."""

    def __init__(self, volume: str, inode: int, what: str) -> None:
        self.inode = inode
        super().__init__(f"{volume}, inode {inode}: {what} differs from the backup")


class MoreInodesDifferError(BlocksnapError):
    """A live subvolume differs in more inodes than anybody wants to read."""

    def __init__(self, volume: str, inodes: int) -> None:
        self.inodes = inodes
        super().__init__(f"{volume} differs from the backup in {inodes} more inodes")


def verify_live_tree(
    repository: Repository,
    backup: Backup,
    volume: Volume,
    state_directory: str,
    limits: LimitSettings,
    report: Reporter,
) -> list[BlocksnapError]:
    """Return the inodes that differ. It needs no right to read: content is compared by its id."""
    repository.keys.require(Right.IDENTIFY)
    with (
        open_session([volume], secrets.token_hex(16), state_directory, report) as session,
        guarded(session, limits, report),
    ):
        snapshot = session.snapshots[0]
        if not is_tree(snapshot):
            raise SnapshotLostError(volume.name, "it is no tree of files, as the backup is")
        comparing = _Comparing(repository, backup)
        with phase(report, f"comparing {volume.name}", backup.size):
            differing = list(comparing.run(snapshot, report))
        snapshot.check()
    problems: list[BlocksnapError] = [
        InodeDiffersError(volume.name, inode, what) for inode, what in sorted(differing)[:_MOST_TOLD]
    ]
    if len(differing) > _MOST_TOLD:
        problems.append(MoreInodesDifferError(volume.name, len(differing) - _MOST_TOLD))
    return problems


@dataclass(frozen=True, slots=True)
class _Item:
    change: Change
    ranges: tuple[tuple[int, int], ...] = ()

    @property
    def inode(self) -> int:
        return self.change.number

    @property
    def size(self) -> int:
        return self.change.attributes.size if isinstance(self.change, InodeChange) else 0


class _Ids:
    """Names blobs instead of storing them, and keeps the nodes of one file."""

    def __init__(self, repository: Repository) -> None:
        self._repository = repository
        self.nodes: dict[bytes, bytes] = {}

    def store_blob(self, kind: FrameType, plain: bytes) -> bytes:
        id_ = self._repository.keys.identify(kind, plain)
        if kind == FrameType.NODE:
            self.nodes[id_] = plain
        return id_

    def load_node(self, id_: bytes) -> bytes:
        return self.nodes.get(id_) or self._repository.load_node(id_)


class _Comparing:
    def __init__(self, repository: Repository, backup: Backup) -> None:
        self._repository = repository
        self._chunk_size = backup.chunk_size
        self._reader = InodeReader(repository, inode_map(backup))
        self._seen: set[int] = set()

    def run(self, snapshot: TreeSnapshot, report: Reporter) -> Iterator[tuple[int, str]]:
        """Yield inodes that differ, with what of them."""
        changes = snapshot.find_tree_changes(None)
        chunk_size, sink = self._chunk_size, Naming(self._repository)
        items = (_item(change, chunk_size) for change in changes.walk)
        with FilesFlow(items, snapshot.open_file, chunk_size, sink) as flow:
            for item, results in flow.walked():
                if isinstance(item.change, InodeChange):
                    self._seen.add(item.inode)
                    what = self._difference(item.change, results, report)
                    if what:
                        yield item.inode, what
        for record in self._reader.records():
            if record.number not in self._seen:
                yield record.number, "that it is gone"

    def _difference(self, change: InodeChange, results: Iterator[ChunkResult], report: Reporter) -> str:
        ids = _Ids(self._repository)
        maps = MapReader(ids.load_node)
        places = -(-change.attributes.size // self._chunk_size) if change.is_file else 0
        content = ContentWriter(maps, ids, None, places)
        for result in results:
            content.set(result.number, ZERO if result.id is None else result.id)
            report.advance(result.length)
        root = content.finish()
        before = self._reader.find(change.number)
        if before is None or before.generation != change.generation:
            return "that it is new"
        now = make_record(ids, change, root)
        differing = [name for name in _ATTRIBUTES if getattr(now, name) != getattr(before, name)]
        if change.is_file and now.size == before.size and _differ(maps, now.content, before.content, places):
            differing.append("content")
        if not change.is_file and now.detail != before.detail:
            differing.append("names" if change.is_directory else "target")
        return ", ".join(differing)


def _item(change: Change, chunk_size: int) -> _Item:
    if not isinstance(change, InodeChange) or not change.is_file:
        return _Item(change)
    return _Item(change, select_chunks(change, None, chunk_size)[0])


def _differ(maps: MapReader, one: MapRoot, other: MapRoot, places: int) -> bool:
    return next(maps.differences(one, other, places), None) is not None
