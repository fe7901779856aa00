"""Restore the backup of a subvolume as a tree of files.

What the records say is not believed more than it has to be: names are names (``repository.listings``), no
directory is entered twice, and everything is made new, by descriptor, in a directory that nobody else may
enter until it is complete. So no record can lead outside, and what was restored in part is no tree under the
name that was asked for.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Generator, Iterable, Iterator
from dataclasses import dataclass

from blocksnap.errors import DamageError
from blocksnap.pipeline.flow import Geometry
from blocksnap.repository.blockmap import Entry
from blocksnap.repository.errors import DamagedObjectError
from blocksnap.repository.inode_map import InodeReader
from blocksnap.repository.inodes import InodeRecord, levels_of
from blocksnap.repository.listings import SUBVOLUME, DirectoryEntry
from blocksnap.repository.repository import Repository
from blocksnap.restore import inode_attributes
from blocksnap.restore.descent import Descent, identity_of
from blocksnap.restore.engine import Losses, UnreadableRangeError, restore_runs
from blocksnap.restore.inode_values import LARGEST_VALUE, link_target, state_of, xattrs_of
from blocksnap.restore.naming import printable
from blocksnap.restore.targets import Progress, TargetFailedError
from blocksnap.restore.tree_files import OpenFile, TreeFiles
from blocksnap.restore.unkept import Unkept

TOP = 256
"""Inode number of the top directory of every subvolume."""
_WINDOW_CHUNKS = 64
"""Windows are small, because each of their files is open: up to ten are on their way at a time."""
_NODATACOW = 2
_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_NEW_FILE = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_NODES = (stat.S_IFCHR, stat.S_IFBLK, stat.S_IFIFO, stat.S_IFSOCK)
ENTRY_KINDS = {
    1: stat.S_IFREG, 2: stat.S_IFDIR, 3: stat.S_IFCHR, 4: stat.S_IFBLK, 5: stat.S_IFIFO, 6: stat.S_IFSOCK,
    7: stat.S_IFLNK,
}  # fmt: skip
_PRIVATE, _STUB = 0o700, 0o755


@dataclass(frozen=True, slots=True)
class TreeResult:
    """What was restored: inodes by their names, bytes of files, bytes shared between files."""

    inodes: int
    file_bytes: int
    shared_bytes: int


class UnreadableFileError(DamageError):
    """A range of a file cannot be read from the repository."""

    def __init__(self, path: bytes, offset: int, length: int, err: DamageError) -> None:
        self.path, self.offset, self.length = path, offset, length
        super().__init__(
            f"bytes {offset} to {offset + length} of {printable(path)} cannot be restored: {err.brief}",
            resolution="run: blocksnap repair; to have the rest, with zeros there: restore --missing=zero",
        )


@dataclass(frozen=True, slots=True)
class MissingRange:
    """A range of a file that holds zeros because the repository has lost it."""

    path: str
    offset: int
    length: int


class _FileLosses(Losses):
    def __init__(self, geometry: Geometry, files: TreeFiles) -> None:
        super().__init__(geometry)
        self._files = files

    def note(self, begin: int, end: int, _: DamageError) -> None:
        self._files.lose(begin, end)


@dataclass(frozen=True, slots=True)
class Part:
    """Some of the names in one directory of a backup, with all that is below them."""

    folder: InodeRecord
    names: tuple[DirectoryEntry, ...]


@dataclass(frozen=True, slots=True)
class _Folder:
    record: InodeRecord
    entries: Iterator[DirectoryEntry]


@dataclass(frozen=True, slots=True)
class _Final:
    """Something that forbids its own changes, which it cannot yet."""

    path: bytes
    record: InodeRecord
    identity: tuple[int, int]


class TreeRestore:
    """One restore into an empty directory that is ours alone.

    ``unkept`` takes what the filesystem cannot keep, ``nested`` the paths of nested subvolumes, which are
    empty directories here. Of a ``part`` the names come into the directory, to be renamed from there.
    """

    def __init__(
        self,
        repository: Repository,
        reader: InodeReader,
        top_fd: int,
        name: str,
        chunk_size: int,
        part: Part | None = None,
    ) -> None:
        self._repository = repository
        self._reader = reader
        self._top_fd = top_fd
        self._name = name
        self._chunk_size = chunk_size
        self.unkept = Unkept()
        self.nested: list[bytes] = []
        self._files = TreeFiles(name, chunk_size, self.open_path, self._finish_file)
        self._linked: dict[int, bytes] = {}
        self._entered: set[int] = set()
        self._final: list[_Final] = []
        self._losses: _FileLosses | None = None
        self._top: InodeRecord | None = None
        self._part = part
        self._inodes = self._file_bytes = 0

    def run(self, progress: Progress, missing: list[MissingRange] | None = None) -> TreeResult:
        """Restore everything but the attributes of the top directory.

        What the repository has lost of files ends it, or becomes zeros and is added to ``missing``. Raises
        DamageError, TargetFailedError, UnreadableFileError.
        """
        geometry = self._files.geometry()
        self._losses = None if missing is None else _FileLosses(geometry, self._files)
        try:
            restore_runs(
                self._repository, geometry, self._walk(), self._files, progress, self._losses,
                window_chunks=_WINDOW_CHUNKS,
            )  # fmt: skip
            self._files.finish()
            if missing is not None:
                found = self._files.lost()
                missing += [MissingRange(printable(each.path), each.offset, each.length) for each in found]
            if self._part is None:
                self._seal(self._top_fd)
        except UnreadableRangeError as err:
            path, offset = self._files.place(err.offset // self._chunk_size)
            raise UnreadableFileError(path, offset, err.length, err) from err
        except OSError as err:
            raise TargetFailedError(self._name, err) from err
        finally:
            self._files.close()
        return TreeResult(self._inodes, self._file_bytes, self._files.shared_bytes)

    def finish_top(self) -> None:
        """Give the top directory its attributes: until then nobody else may enter it."""
        if self._top is not None:
            xattrs = self._xattrs(self._top)
            inode_attributes.finish_open(
                self._top_fd, self._top, xattrs, b"", self.unkept, may_be_final=False
            )

    def seal_part(self, folder_fd: int) -> None:
        """Forbid changes of what forbade them, when the part is in its place; raises OSError.

        ESTALE where something else is there by then: whoever owns the directory may have put it there.
        """
        self._seal(folder_fd)

    def seal_top(self) -> None:
        """Make the top directory immutable, if it was; it has its name then."""
        if self._top is not None:
            inode_attributes.set_final(self._top_fd, self._top, b"", self.unkept)

    def open_path(self, path: bytes, flags: int) -> int:
        """Open something below the top, step by step, so that no symbolic link is followed."""
        return _open_below(self._top_fd, path, flags)

    def _seal(self, top_fd: int) -> None:
        for each in self._final:
            fd = _open_below(top_fd, each.path, os.O_RDONLY | os.O_NONBLOCK)
            try:
                if identity_of(fd) != each.identity:
                    raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
                inode_attributes.set_final(fd, each.record, each.path, self.unkept)
            finally:
                os.close(fd)

    def _walk(self) -> Iterator[tuple[int, int, Entry]]:
        """Make everything; yield the chunks that are to be fetched."""
        stack, path = [self._begin()], b""
        descent = Descent(os.dup(self._top_fd))
        try:
            while True:
                entry = next(stack[-1].entries, None)
                if entry is not None:
                    here = path + b"/" + entry.name if path else entry.name
                    below = yield from self._make(descent, entry, here)
                    if below is not None:
                        stack.append(below)
                        path = here
                    continue
                done = stack.pop()
                if not stack:
                    return
                self._finish_folder(descent.fd, done.record, path)
                descent.leave()
                path = path.rpartition(b"/")[0]
        finally:
            descent.close()

    def _begin(self) -> _Folder:
        if self._part is not None:
            self._entered.add(self._part.folder.number)
            return _Folder(self._part.folder, iter(self._part.names))
        self._top = self._find(TOP, b"")
        if not self._top.is_directory:
            raise DamagedObjectError("the top directory", "it is no directory")
        return self._enter(self._top, b"")

    def _make(
        self, descent: Descent, entry: DirectoryEntry, path: bytes
    ) -> Generator[tuple[int, int, Entry], None, _Folder | None]:
        """Make what a name leads to; enter it and return it, if it is a directory."""
        folder = descent.fd
        try:
            if entry.kind == SUBVOLUME:
                os.mkdir(entry.name, _STUB, dir_fd=folder)
                self.nested.append(path)
                return None
            record = self._find(entry.inode, path)
            kind = stat.S_IFMT(record.mode)
            if ENTRY_KINDS.get(entry.kind, kind) != kind:
                raise DamagedObjectError(printable(path), "its name and its inode are not of the same kind")
            if kind != stat.S_IFDIR and self._link(folder, entry, path, record):
                return None
            self._inodes += 1
            if kind == stat.S_IFDIR:
                below = self._enter(record, path)
                os.mkdir(entry.name, _PRIVATE, dir_fd=folder)
                descent.enter(os.open(entry.name, _FOLDER, dir_fd=folder))
                return below
            if kind == stat.S_IFREG:
                yield from self._make_file(folder, entry, path, record)
            else:
                self._make_node(folder, entry.name, kind, path, record)
        except OSError as err:
            raise TargetFailedError(os.path.join(self._name, printable(path)), err) from err
        return None

    def _find(self, number: int, path: bytes) -> InodeRecord:
        record = self._reader.find(number)
        if record is None:
            raise DamagedObjectError(printable(path), f"there is no inode {number}")
        return record

    def _enter(self, record: InodeRecord, path: bytes) -> _Folder:
        if record.number in self._entered:
            raise DamagedObjectError(printable(path), f"directory {record.number} is in two places")
        self._entered.add(record.number)
        return _Folder(record, iter(self._reader.listing(record)))

    def _link(self, folder: int, entry: DirectoryEntry, path: bytes, record: InodeRecord) -> bool:
        """Give an inode that is there a further name."""
        if record.nlink < 2:
            return False
        known = self._linked.get(record.number)
        if known is None:
            self._linked[record.number] = path
            return False
        parent, _, name = known.rpartition(b"/")
        source = self.open_path(parent, _FOLDER) if parent else os.dup(self._top_fd)
        try:
            os.link(name, entry.name, src_dir_fd=source, dst_dir_fd=folder, follow_symlinks=False)
        except FileNotFoundError:
            # It could not be made, which was noted.
            self.unkept.note("hard link", path)
        finally:
            os.close(source)
        return True

    def _make_file(
        self, folder: int, entry: DirectoryEntry, path: bytes, record: InodeRecord
    ) -> Iterator[tuple[int, int, Entry]]:
        places = -(-record.size // self._chunk_size)
        if record.content.levels != levels_of(places):
            raise DamagedObjectError(printable(path), "its content does not fit its size")
        state = b""
        if record.detail.length <= LARGEST_VALUE:
            state = state_of(self._reader, record)
        else:
            self.unkept.note("holes and shared extents, of which there are too many", path)
        fd = os.open(entry.name, _NEW_FILE, 0o600, dir_fd=folder)
        file = OpenFile(record, path, fd, state, 0, places)
        try:
            inode_attributes.prepare_file(fd, record, self._xattrs(record), path, self.unkept)
            os.ftruncate(fd, record.size)
        except BaseException:
            os.close(fd)
            raise
        self._file_bytes += record.size

        def lose(begin: int, end: int, err: DamageError) -> None:
            if self._losses is None:
                offset = begin * self._chunk_size
                length = min(end * self._chunk_size, record.size) - offset
                raise UnreadableFileError(path, offset, length, err) from err
            self._losses.note(file.first + begin, file.first + end, err)

        runs = self._reader.maps.runs(record.content, 0, places, lose)
        yield from self._files.add(file, runs, may_share=not record.flags & _NODATACOW)

    def _make_node(self, folder: int, name: bytes, kind: int, path: bytes, record: InodeRecord) -> None:
        if kind == stat.S_IFLNK:
            target = link_target(self._reader, record)
            if not target or b"\0" in target:
                raise DamagedObjectError(printable(path), "it is no target of a symbolic link")
            try:
                os.symlink(target, name, dir_fd=folder)
            except OSError as err:
                # XFS has room for 1,023 bytes.
                if err.errno not in (errno.ENAMETOOLONG, errno.EPERM, errno.EOPNOTSUPP):
                    raise
                self.unkept.note("symbolic link", path)
                return
        elif kind in _NODES:
            try:
                os.mknod(name, kind | 0o600, os.makedev(*record.device), dir_fd=folder)
            except OSError as err:
                if err.errno not in (errno.EPERM, errno.EOPNOTSUPP):
                    raise
                self.unkept.note("device node, fifo or socket", path)
                return
        else:
            raise DamagedObjectError(printable(path), f"it is of an unknown kind, {kind:o}")
        inode_attributes.finish_by_name(folder, name, record, self._xattrs(record), path, self.unkept)

    def _finish_file(self, file: OpenFile) -> None:
        record, path = file.record, file.path
        may_be_final = record.nlink < 2 and not self._is_renamed(path)
        xattrs = self._xattrs(record)
        try:
            inode_attributes.finish_open(
                file.fd, record, xattrs, path, self.unkept, may_be_final=may_be_final
            )
        except OSError as err:
            raise TargetFailedError(os.path.join(self._name, printable(path)), err) from err
        if not may_be_final and record.flags & inode_attributes.FINAL:
            self._final.append(_Final(path, record, identity_of(file.fd)))

    def _finish_folder(self, fd: int, record: InodeRecord, path: bytes) -> None:
        may_be_final = not self._is_renamed(path)
        inode_attributes.finish_open(
            fd, record, self._xattrs(record), path, self.unkept, may_be_final=may_be_final
        )
        if not may_be_final and record.flags & inode_attributes.FINAL:
            self._final.append(_Final(path, record, identity_of(fd)))

    def _is_renamed(self, path: bytes) -> bool:
        """Tell whether it gets another name when all is there, which what forbids changes would forbid."""
        return self._part is not None and b"/" not in path

    def _xattrs(self, record: InodeRecord) -> Iterable[tuple[bytes, bytes]]:
        return xattrs_of(self._reader, record)


def _open_below(top_fd: int, path: bytes, flags: int) -> int:
    *folders, name = path.split(b"/")
    fd = os.dup(top_fd)
    try:
        for each in folders:
            below = os.open(each, _FOLDER, dir_fd=fd)
            os.close(fd)
            fd = below
        return os.open(name, flags | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=fd)
    finally:
        os.close(fd)
