"""Backups of subvolumes as users see them: each a tree of files, in a FUSE filesystem that can only be read.

Records and chunks are fetched when somebody asks for them. What cannot be proven is an I/O error and told;
everything that the kernel asks for by a name comes with it, so an error is of that name alone.
"""

from __future__ import annotations

import errno
import itertools
import os
import stat
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Self

from blocksnap.errors import BlocksnapError, DamageError
from blocksnap.repository.inode_map import InodeMap
from blocksnap.repository.inodes import InodeRecord
from blocksnap.repository.listings import SUBVOLUME
from blocksnap.repository.repository import Repository
from blocksnap.restore.engine import UnreadableRangeError
from blocksnap.restore.fuse import FuseThread, Operations, serve
from blocksnap.restore.images import Image, ImageReader
from blocksnap.restore.naming import printable
from blocksnap.restore.tree import ENTRY_KINDS, TOP, UnreadableFileError
from blocksnap.restore.tree_names import Name, Names
from blocksnap.restore.tree_places import Places
from blocksnap.restore.tree_view import STUB, TreeView, blocks_of

LATEST = "latest"
_VIEWS = 3
"""How many backups have what they need in memory: somebody compares two, or goes through all."""
_NUMBER_BITS = 48
"""Inode numbers of a backup; btrfs gives them out one by one. Above them is which backup it is: files of two
backups must not look like one."""
_ROOT, _LATEST_LINK = 1, 2
_DOTS = (".", "..")
_FOLDER_KIND, _LINK_KIND = 2, 7
_BLOCK = 4096
_KEPT_SECONDS = 3600
"""How long the kernel may go by what it was told: nothing changes."""
_END_SECONDS = 2.0


@dataclass(frozen=True, slots=True)
class ShownTree:
    """A backup: the name of its folder (nothing for the only one), its inodes, its time in nanoseconds."""

    folder: str
    inodes: InodeMap
    chunk_size: int
    taken_ns: int


class UnshownPathError(DamageError):
    """What a path leads to cannot be read from the repository."""

    def __init__(self, path: bytes, err: DamageError) -> None:
        self.path = path
        super().__init__(
            f"{printable(path)} cannot be shown: {err.brief}",
            resolution="run: blocksnap check --read-data, and repair; an older backup may have it unharmed",
        )


@dataclass(frozen=True, slots=True)
class _Listing:
    """An open directory: its number, its names, and what makes text, kind and inode number of one."""

    number: int
    describe: Callable[[Name], tuple[str, int, int]]
    names: Names | list[Name]


class ServedTrees:
    """A context in which backups are shown through a FUSE connection, which belongs to it from then on.

    ``when_ended`` is called, by another thread, when nothing is served any more, with the reason as
    ``restore.fuse`` gives it.
    """

    def __init__(
        self,
        repository: Repository,
        shown: Sequence[ShownTree],
        connection: int,
        tell: Callable[[BlocksnapError], None],
        when_ended: Callable[[str], None],
    ) -> None:
        self._reader = ImageReader(repository)
        self._connection = connection
        self._operations = Trees(repository, self._reader, shown, tell)
        self._thread = FuseThread(self._serve, self._operations.ready, when_ended)

    def __enter__(self) -> Self:
        """Serve; raises NoFuseError."""
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Read nothing any more."""
        self._thread.join(_END_SECONDS)
        self._reader.close()

    def _serve(self) -> str:
        # libfuse takes a connection that is mounted already by this name (fuse_session_mount).
        return serve(self._operations, f"/dev/fd/{self._connection}", kept_seconds=_KEPT_SECONDS)


class Trees(Operations):  # type: ignore[misc] # mfusepy has no types
    """What is in the filesystem; paths begin with a slash."""

    use_ns = True

    def __init__(
        self,
        repository: Repository,
        reader: ImageReader,
        shown: Sequence[ShownTree],
        tell: Callable[[BlocksnapError], None],
    ) -> None:
        self._repository = repository
        self._reader = reader
        self._shown = {each.folder: each for each in shown}
        # The only one has its own inode numbers.
        self._ordinals = {each.folder: at if each.folder else 0 for at, each in enumerate(shown, 1)}
        self._newest = max(shown, key=lambda each: each.taken_ns)
        self._tell = tell
        self._views: OrderedDict[str, TreeView] = OrderedDict()
        # Of all backups, and for as long as they are shown: views come and go.
        self._places = Places()
        self._lock = threading.Lock()
        self._handles: dict[int, Image] = {}
        self._listings: dict[int, _Listing] = {}
        self._numbers = itertools.count(1)
        self.ready = threading.Event()

    def init(self, path: str) -> None:  # noqa: ARG002
        """The kernel has answered: it is mounted."""
        self.ready.set()

    def getattr(self, path: str, fh: int | None = None) -> dict[str, int]:  # noqa: ARG002
        """Describe what a path leads to."""
        shown, rest = self._split(path)
        if shown is None:
            return self._outside(path)
        with self._errors(path):
            view = self._view(shown)
            return self._facts(shown, view, view.find(rest))

    def opendir(self, path: str) -> int:
        """Open a directory, whose names are held until it is closed."""
        shown, rest = self._split(path)
        if shown is None:
            self._outside(path)
            listing = self._list_backups()
        else:
            with self._errors(path):
                view = self._view(shown)
                folder = view.find(rest)
                listing = _Listing(
                    self._number(shown, folder.number), partial(self._list, shown), view.names(folder)
                )
        number = next(self._numbers)
        self._listings[number] = listing
        return number

    def readdir_with_offset(
        self,
        path: str,  # noqa: ARG002
        offset: int,
        fh: int,
    ) -> Iterator[tuple[str, dict[str, int], int]]:
        """List a directory from a place on, with the numbers and kinds of what is in it.

        With places libfuse takes no more than it passes on at a time, and does not hold all.
        """
        listing = self._listings[fh]
        for place in range(offset, len(listing.names) + len(_DOTS)):
            if place < len(_DOTS):
                name, mode, number = _DOTS[place], stat.S_IFDIR, listing.number
            else:
                name, mode, number = listing.describe(listing.names[place - len(_DOTS)])
            yield name, {"st_mode": mode, "st_ino": number}, place + 1

    def releasedir(self, path: str, fh: int) -> int:  # noqa: ARG002
        """Forget a directory."""
        self._listings.pop(fh, None)
        return 0

    def readlink(self, path: str) -> str:
        """Tell where a link leads: as it did, or to the newest backup."""
        shown, rest = self._split(path)
        if shown is None:
            return self._newest.folder
        with self._errors(path):
            view = self._view(shown)
            return view.target(view.find(rest)).decode("utf-8", "surrogateescape")

    def open(self, path: str, flags: int) -> int:
        """Open a file for reading."""
        if flags & os.O_ACCMODE != os.O_RDONLY:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))
        shown, rest = self._split(path)
        if shown is None:
            raise OSError(errno.EISDIR, os.strerror(errno.EISDIR))
        with self._errors(path):
            view = self._view(shown)
            record = view.find(rest)
            number = next(self._numbers)
            self._handles[number] = Image(view.geometry(record), record.content)
            return number

    def read(self, path: str, size: int, offset: int, fh: int) -> bytes:
        """Read; what cannot be had is an I/O error, and never other bytes."""
        with self._errors(path):
            return self._reader.read(self._handles[fh], offset, size)

    def release(self, path: str, fh: int) -> int:  # noqa: ARG002
        """Forget a reader."""
        self._handles.pop(fh, None)
        return 0

    def getxattr(self, path: str, name: str, position: int = 0) -> bytes:  # noqa: ARG002
        """Return an extended attribute."""
        found = self._xattrs(path).get(name.encode("utf-8", "surrogateescape"))
        if found is None:
            raise OSError(errno.ENODATA, os.strerror(errno.ENODATA))
        return found

    def listxattr(self, path: str) -> list[str]:
        """Name the extended attributes."""
        return [name.decode("utf-8", "surrogateescape") for name in self._xattrs(path)]

    def statfs(self, path: str) -> dict[str, int]:
        """Tell how much is in a backup, or in the newest; there is no room for more."""
        shown, _ = self._split(path)
        inodes = (shown or self._newest).inodes
        return {
            "f_bsize": _BLOCK, "f_frsize": _BLOCK, "f_blocks": -(-inodes.file_bytes // _BLOCK),
            "f_files": inodes.count, "f_namemax": 255,
        }  # fmt: skip

    def _xattrs(self, path: str) -> dict[bytes, bytes]:
        shown, rest = self._split(path)
        if shown is None:
            return {}
        with self._errors(path):
            view = self._view(shown)
            return view.xattrs(view.find(rest))

    def _split(self, path: str) -> tuple[ShownTree | None, bytes]:
        """Return the backup that a path is of, and the path in it."""
        if "" in self._shown:
            return self._shown[""], path[1:].encode("utf-8", "surrogateescape")
        first, _, rest = path[1:].partition("/")
        return self._shown.get(first), rest.encode("utf-8", "surrogateescape")

    def _outside(self, path: str) -> dict[str, int]:
        """Describe what is in no backup: the folder of all, and the link to the newest."""
        when = self._newest.taken_ns
        times = {"st_mtime": when, "st_ctime": when, "st_atime": when}
        if path == "/":
            return {"st_mode": stat.S_IFDIR | 0o700, "st_nlink": 2, "st_ino": _ROOT, **times}
        if path == f"/{LATEST}" and len(self._shown) > 1:
            size = len(self._newest.folder)
            return {
                "st_mode": stat.S_IFLNK | 0o777, "st_nlink": 1, "st_ino": _LATEST_LINK, "st_size": size,
                **times,
            }  # fmt: skip
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)

    def _list_backups(self) -> _Listing:
        names = [Name(name.encode(), TOP, _FOLDER_KIND) for name in self._shown]
        if len(names) > 1:
            names.append(Name(LATEST.encode(), _LATEST_LINK, _LINK_KIND))

        def describe(name: Name) -> tuple[str, int, int]:
            shown = self._shown.get(name.name.decode())
            number = name.inode if shown is None else self._number(shown, name.inode)
            return name.name.decode(), ENTRY_KINDS[name.kind], number

        return _Listing(_ROOT, describe, names)

    def _list(self, shown: ShownTree, found: Name) -> tuple[str, int, int]:
        name = found.name.decode("utf-8", "surrogateescape")
        if found.kind == SUBVOLUME:
            return name, stat.S_IFDIR, self._number(shown, STUB)
        return name, ENTRY_KINDS.get(found.kind, 0), self._number(shown, found.inode)

    def _facts(self, shown: ShownTree, view: TreeView, record: InodeRecord) -> dict[str, int]:
        return {
            "st_ino": self._number(shown, record.number),
            "st_mode": record.mode,
            "st_nlink": record.nlink,
            "st_uid": record.uid,
            "st_gid": record.gid,
            "st_size": record.size,
            "st_blocks": blocks_of(view.room(record)),
            "st_rdev": os.makedev(*record.device),
            "st_mtime": record.mtime,
            "st_ctime": record.ctime,
            "st_atime": record.atime,
        }

    def _number(self, shown: ShownTree, inode: int) -> int:
        return self._ordinals[shown.folder] << _NUMBER_BITS | inode % (1 << _NUMBER_BITS)

    def _view(self, shown: ShownTree) -> TreeView:
        with self._lock:
            found = self._views.get(shown.folder)
            if found is None:
                ordinal = self._ordinals[shown.folder]
                found = TreeView(
                    self._repository, shown.inodes, shown.chunk_size, shown.taken_ns, self._places, ordinal
                )
                self._views[shown.folder] = found
                if len(self._views) > _VIEWS:
                    self._views.popitem(last=False)
            self._views.move_to_end(shown.folder)
            return found

    @contextmanager
    def _errors(self, path: str) -> Iterator[None]:
        """Tell of what cannot be had, and make an I/O error of it."""
        try:
            yield
        except BlocksnapError as err:
            name = path[1:].encode("utf-8", "surrogateescape")
            if isinstance(err, UnreadableRangeError):
                self._tell(UnreadableFileError(name, err.offset, err.length, err))
            elif isinstance(err, DamageError):
                self._tell(UnshownPathError(name, err))
            else:
                self._tell(err)
            raise OSError(errno.EIO, os.strerror(errno.EIO), path) from err
