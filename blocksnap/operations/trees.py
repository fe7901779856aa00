"""Look into backups of subvolumes without restoring them: shown as trees, or single files copied out.

They are read from the map of inodes as they are asked for; there is no image, so nothing of them is mounted
but the tree that users see.
"""

from __future__ import annotations

import fnmatch
import os
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from blocksnap.errors import BlocksnapError
from blocksnap.operations.reporting import Reporter, each_once, phase
from blocksnap.operations.tree_storing import inode_map
from blocksnap.repository.documents import Backup
from blocksnap.repository.inode_map import InodeReader
from blocksnap.repository.inodes import InodeRecord
from blocksnap.repository.keys import Right
from blocksnap.repository.listings import DirectoryEntry
from blocksnap.repository.repository import Repository
from blocksnap.restore.contents import kind_of
from blocksnap.restore.naming import flush_open_folder, printable
from blocksnap.restore.private_folder import PrivateFolder, private_folder
from blocksnap.restore.targets import TargetFailedError
from blocksnap.restore.tree import Part, TreeRestore
from blocksnap.restore.tree_mount import TreeEnd, take_connection
from blocksnap.restore.tree_names import Name
from blocksnap.restore.tree_places import Places
from blocksnap.restore.tree_view import TreeView
from blocksnap.system.files import flush_filesystem_of

_MODE = 0o7777


class NoSuchPathError(BlocksnapError):
    """A path does not lead to anything in a backup."""

    def __init__(self, brief: str) -> None:
        super().__init__(brief, resolution="see what there is: blocksnap files BACKUP")


class PathExistsError(BlocksnapError):
    """Something exists already where a copy would go."""

    def __init__(self, path: str) -> None:
        self.path = path
        super().__init__(f"{path} exists already", resolution="name another directory, or remove it first")


@contextmanager
def served_trees(
    repository: Repository,
    shown: Mapping[str, Backup],
    control: socket.socket,
    folder: str,
    end: TreeEnd,
    report: Reporter,
) -> Iterator[None]:
    """Show backups, by the names of their folders, through what the process behind ``control`` mounts.

    That process has been told; ``end`` is told when nothing is served any more. Raises NoTreeError,
    NoFuseError, MissingRightError.
    """
    from blocksnap.restore.fuse import ENDED
    from blocksnap.restore.tree_serving import ServedTrees, ShownTree

    repository.keys.require(Right.READ)
    # Loaded now, so that the threads that read find it.
    _ = repository.index
    trees = [
        ShownTree(name, inode_map(backup), backup.chunk_size, int(backup.time.timestamp() * 1e9))
        for name, backup in shown.items()
    ]

    def ended(reason: str) -> None:
        if reason == ENDED:
            end.severed()
        else:
            end.because(reason)

    connection = take_connection(control, folder)
    with ServedTrees(repository, trees, connection, each_once(report), ended):
        yield


class FilesOfTree:
    """The files in the backup of a subvolume."""

    def __init__(self, repository: Repository, backup: Backup, report: Reporter) -> None:
        """Raises MissingRightError."""
        repository.keys.require(Right.READ)
        self.backup = backup
        self._repository = repository
        self._report = report
        taken_ns = int(backup.time.timestamp() * 1e9)
        self._view = TreeView(repository, inode_map(backup), backup.chunk_size, taken_ns, Places())

    def entries(self, path: str, *, recursive: bool, find: str | None) -> Iterator[dict[str, Any]]:
        """Yield what is in a directory, or the entry that a path names; all below it if asked, by names.

        Raises NoSuchPathError, DamageError.
        """
        name, record = self._follow(path)
        if not record.is_directory:
            yield self._entry(name, record)
            return
        waiting = [(name, record)]
        while waiting:
            above, folder = waiting.pop()
            below = []
            for each in sorted(self._view.names(folder)):
                here = above + b"/" + each.name if above else each.name
                found = self._view.child(each, here)
                if not find or fnmatch.fnmatchcase(os.fsdecode(each.name), find):
                    yield self._entry(here, found)
                if (recursive or find) and found.is_directory:
                    below.append((here, found))
            waiting += reversed(below)

    def copy(self, path: str, folder: str) -> list[str]:
        """Copy a path, with all below it, into a directory; return what was made.

        It gets its name when all of it is there and durable, and what it has is what a restore gives it; what
        cannot be kept is a warning. Raises NoSuchPathError, PathExistsError, TargetFailedError, DamageError.
        """
        folder = os.path.realpath(folder)
        part = self._part(path)
        names = [entry.name for entry in part.names]
        for name in names:
            if os.path.lexists(os.path.join(os.fsencode(folder), name)):
                raise PathExistsError(os.path.join(folder, os.fsdecode(name)))
        try:
            with private_folder(folder) as private:
                return self._bring(part, private, folder)
        except OSError as err:
            raise TargetFailedError(folder, err) from err

    def _bring(self, part: Part, private: PrivateFolder, folder: str) -> list[str]:
        reader = InodeReader(self._repository, inode_map(self.backup))
        tree = TreeRestore(self._repository, reader, private.fd, private.path, self.backup.chunk_size, part)
        with phase(self._report, f"copying from {self.backup.volume.name}", 0):
            tree.run(self._report.advance)
        # By what was open before the first write: it is told of one that was lost.
        flush_filesystem_of(private.fd)
        # What could not be made was noted.
        wanted = [os.fsdecode(entry.name) for entry in part.names]
        there = set(private.names())
        made = [name for name in wanted if name in there]
        for name in made:
            try:
                private.take_out(name)
            except FileExistsError as err:
                raise PathExistsError(os.path.join(folder, name)) from err
        tree.seal_part(private.parent)
        flush_open_folder(private.parent)
        for line in tree.unkept.lines():
            self._report.warn(f"not kept: {line}")
        return [os.path.join(folder, name) for name in made]

    def _part(self, path: str) -> Part:
        name, record = self._follow(path)
        above, _, last = name.rpartition(b"/")
        folder = self._view.find(above) if last else record
        names = self._view.names(folder)
        if not last:
            return Part(folder, tuple(_entry_of(each) for each in names))
        found = names.find(last)
        if found is None:
            raise NoSuchPathError(f"there is no {printable(name)} in this backup")
        return Part(folder, (_entry_of(found),))

    def _follow(self, path: str) -> tuple[bytes, InodeRecord]:
        """Return where a path leads, in this backup only: a symbolic link on the way is refused."""
        parts = [part for part in os.fsencode(path).split(b"/") if part not in (b"", b".")]
        if b".." in parts:
            raise NoSuchPathError(f"{path}: .. leads out of the backup")
        record = self._view.find(b"")
        for number in range(1, len(parts) + 1):
            here = b"/".join(parts[:number])
            if kind_of(record.mode) == "link":
                target = printable(self._view.target(record))
                link = printable(b"/".join(parts[: number - 1]))
                raise NoSuchPathError(f"{link} is a symbolic link to {target}: name the file by that")
            try:
                record = self._view.find(here)
            except FileNotFoundError as err:
                raise NoSuchPathError(f"there is no {printable(here)} in this backup") from err
            except NotADirectoryError as err:
                above = printable(b"/".join(parts[: number - 1]))
                raise NoSuchPathError(f"{above} is no directory") from err
        return b"/".join(parts), record

    def _entry(self, name: bytes, record: InodeRecord) -> dict[str, Any]:
        kind = kind_of(record.mode)
        return {
            "path": os.fsdecode(name),
            "kind": kind,
            "size": record.size,
            "mode": record.mode & _MODE,
            "uid": record.uid,
            "gid": record.gid,
            "modified": record.mtime / 1e9,
            "target": os.fsdecode(self._view.target(record)) if kind == "link" else None,
        }


def _entry_of(found: Name) -> DirectoryEntry:
    return DirectoryEntry(found.name, found.inode, found.kind, 0)
