"""The tree that users see: a folder for each backup with its image and the files in it.

A volume with a filesystem has them in ``files``, one with a table of partitions in ``p1``, ``p2`` and so on,
and a text ``partitions`` that says what each is.

A process of its own serves it: it passes on what the private mounts have, which it reaches through
descriptors. A filesystem is mounted when somebody first looks into it. When the user
unmounts the tree the process ends, and so does all the rest; when the process that began it all dies, it
unmounts the tree.
"""

from __future__ import annotations

import errno
import itertools
import os
import signal
import socket
import stat
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import partial

from blocksnap.errors import BlocksnapError
from blocksnap.restore.contents import PARTITIONS
from blocksnap.restore.fuse import ENDED, FuseThread, Operations, serve
from blocksnap.restore.inside import NoFuseError, ask
from blocksnap.restore.tree_mount import MOUNTED, read_further_ahead, tell_end, tell_failure
from blocksnap.system import namespace, own_mount

IMAGE, FILES = "image", "files"
_END_SECONDS = 2.0


@dataclass(frozen=True, slots=True)
class Shown:
    """A backup in the tree: the name of its folder (nothing for the only one), its id and time in seconds."""

    folder: str
    backup: str
    taken_at: float


class Tree(Operations):  # type: ignore[misc] # mfusepy has no types
    """Passes on; all paths below are of the tree."""

    use_ns = True

    def __init__(
        self,
        shown: list[Shown],
        root: int,
        inner: socket.socket,
        ready: threading.Event,
        look_ahead: Callable[[], None],
    ) -> None:
        """``look_ahead`` is called before the first file is open: it can be before we know of the mount."""
        self._shown = {each.folder: each for each in shown}
        self._newest = max(shown, key=lambda each: each.taken_at).folder
        self._root = root
        self._inner = inner
        self._lock = threading.Lock()
        self._names: dict[str, list[str]] = {}
        self._inside: dict[tuple[str, str], int | OSError] = {}
        self._handles: dict[int, int] = {}
        self._numbers = itertools.count(1)
        self._ready = ready
        self._look_ahead = look_ahead

    def init(self, path: str) -> None:  # noqa: ARG002
        """It is mounted."""
        self._ready.set()

    def getattr(self, path: str, fh: int | None = None) -> dict[str, int]:
        """Pass stat(2) on."""
        if fh is not None and fh in self._handles:
            return _facts(os.fstat(self._handles[fh]))
        shown, rest = self._find(path)
        if shown is None:
            if rest == "latest" and len(self._shown) > 1:
                return {"st_mode": stat.S_IFLNK | 0o777, "st_nlink": 1}
            if rest:
                raise _missing(path)
            return {"st_mode": stat.S_IFDIR | 0o700, "st_nlink": 2}
        if not rest:
            when = int(shown.taken_at * 1e9)
            return {"st_mode": stat.S_IFDIR | 0o700, "st_nlink": 2, "st_mtime": when, "st_ctime": when}
        is_mounted = isinstance(self._inside.get((shown.backup, rest)), int)
        if not is_mounted and self._is_root_of_files(shown, rest):
            # Looking at the name alone mounts nothing.
            return {"st_mode": stat.S_IFDIR | 0o700, "st_nlink": 2, "st_mtime": int(shown.taken_at * 1e9)}
        folder, name = self._place(shown, rest)
        return _facts(os.stat(name, dir_fd=folder, follow_symlinks=False))

    def readdir(self, path: str, fh: int) -> Iterator[str]:  # noqa: ARG002
        """List."""
        shown, rest = self._find(path)
        names: list[str]
        if shown is None:
            names = [*self._shown, *(["latest"] if len(self._shown) > 1 else [])]
        elif not rest:
            names = [IMAGE, *self._inside_of(shown)]
        else:
            folder, name = self._place(shown, rest)
            fd = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=folder)
            try:
                names = os.listdir(fd)
            finally:
                os.close(fd)
        return iter([".", "..", *names])

    def readlink(self, path: str) -> str:
        """Tell where a link leads, in the image or to the newest backup."""
        shown, rest = self._find(path)
        if shown is None:
            return self._newest
        folder, name = self._place(shown, rest)
        return os.readlink(name, dir_fd=folder)

    def open(self, path: str, flags: int) -> int:
        """Open for reading."""
        if flags & os.O_ACCMODE != os.O_RDONLY:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))
        shown, rest = self._find(path)
        if shown is None or not rest:
            raise _missing(path)
        folder, name = self._place(shown, rest)
        fd = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=folder)
        number = next(self._numbers)
        if number == 1:
            self._look_ahead()
        self._handles[number] = fd
        return number

    def read(self, path: str, size: int, offset: int, fh: int) -> bytes:  # noqa: ARG002
        """Pass pread(2) on."""
        return os.pread(self._handles[fh], size, offset)

    def release(self, path: str, fh: int) -> int:  # noqa: ARG002
        """Close."""
        os.close(self._handles.pop(fh))
        return 0

    def getxattr(self, path: str, name: str, position: int = 0) -> bytes:  # noqa: ARG002
        """Return an attribute of a file in an image."""
        return os.getxattr(self._xattr_path(path), name, follow_symlinks=False)

    def listxattr(self, path: str) -> list[str]:
        """Name the attributes of a file in an image."""
        return os.listxattr(self._xattr_path(path), follow_symlinks=False)

    def statfs(self, path: str) -> dict[str, int]:  # noqa: ARG002
        """Tell of a filesystem without room."""
        return {"f_bsize": 4096, "f_frsize": 4096, "f_namemax": 255}

    def _xattr_path(self, path: str) -> str:
        shown, rest = self._find(path)
        if shown is None or "/" not in rest:
            raise OSError(errno.ENODATA, os.strerror(errno.ENODATA))
        folder, name = self._place(shown, rest)
        return f"/proc/self/fd/{folder}/{name}"

    def _find(self, path: str) -> tuple[Shown | None, str]:
        """Return the backup that a path is of, and the rest of it."""
        if "" in self._shown:
            return self._shown[""], path[1:]
        first, _, rest = path[1:].partition("/")
        found = self._shown.get(first)
        return (found, rest) if found is not None else (None, path[1:])

    def _place(self, shown: Shown, rest: str) -> tuple[int, str]:
        """Return the folder's descriptor and the name there that the rest of a path leads to."""
        if rest == IMAGE:
            return self._root, f"images/{shown.backup}"
        first, _, name = rest.partition("/")
        if first not in self._inside_of(shown):
            raise _missing(rest)
        if first == PARTITIONS:
            return self._root, f"files/{shown.backup}/{rest}"
        return self._open_inside(shown.backup, first), name or "."

    def _is_root_of_files(self, shown: Shown, rest: str) -> bool:
        return rest not in (IMAGE, PARTITIONS) and rest in self._inside_of(shown)

    def _inside_of(self, shown: Shown) -> list[str]:
        """Return the names of what is made of an image."""
        with self._lock:
            found = self._names.get(shown.backup)
            if found is None:
                try:
                    found = list(ask(self._inner, {"do": "look", "backup": shown.backup}))
                except BlocksnapError:
                    # Who looks into the files is told that they cannot be had.
                    found = []
                self._names[shown.backup] = found = found or [FILES]
        return found

    def _open_inside(self, backup: str, name: str) -> int:
        """Return the root of a filesystem in an image, mounted now at the latest; raises OSError."""
        partition = "" if name == FILES else name
        with self._lock:
            found = self._inside.get((backup, name))
            if found is None:
                try:
                    list(ask(self._inner, {"do": "mount", "backup": backup, "partition": partition}))
                    flags = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
                    found = os.open(f"files/{backup}/{partition}", flags, dir_fd=self._root)
                except BlocksnapError as err:
                    found = OSError(errno.EMEDIUMTYPE, err.brief)
                self._inside[backup, name] = found
        if isinstance(found, OSError):
            raise found
        return found


def serve_tree(
    folder: str, source: str, control: socket.socket, shown: list[Shown], root: int, inner: socket.socket
) -> bool:
    """Serve the tree until it is unmounted or ``control`` ends; tell whether it could be mounted."""
    signal.set_wakeup_fd(-1)
    ready, ended = threading.Event(), threading.Event()
    reasons: list[str] = []

    def end(reason: str) -> None:
        reasons.append(reason)
        ended.set()

    tree = Tree(shown, root, inner, ready, partial(read_further_ahead, "/proc/self/mountinfo", source))
    try:
        connection = namespace.mount_fuse(folder, source)
    except namespace.NotMountedError as err:
        tell_failure(control, os.strerror(err.errno or 0))
        return False
    try:
        # libfuse takes a connection that is mounted already by this name (fuse_session_mount), and leaves
        # it to us to unmount it.
        FuseThread(lambda: serve(tree, f"/dev/fd/{connection}"), ready, end).start()
    except NoFuseError as err:
        own_mount.unmount(source)
        tell_failure(control, err.reason)
        return False
    with suppress(OSError):
        control.sendall(MOUNTED)
    threading.Thread(target=_end_with, args=(control, source, ended, end), daemon=True).start()
    ended.wait()
    tell_end(control, source, reasons[0] if reasons[0] != ENDED else "")
    return True


def _end_with(
    control: socket.socket, source: str, ended: threading.Event, end: Callable[[str], None]
) -> None:
    # It is an error when the other one has ended before it was told that this is mounted.
    with suppress(OSError):
        control.recv(1)
    own_mount.unmount(source)
    if not ended.wait(_END_SECONDS):
        # Whoever still has a file open there, or is in it, keeps the connection: it ends with this process.
        end(ENDED)


def _facts(status: os.stat_result) -> dict[str, int]:
    return {
        "st_mode": status.st_mode,
        "st_nlink": status.st_nlink,
        "st_size": status.st_size,
        "st_blocks": status.st_blocks,
        "st_uid": status.st_uid,
        "st_gid": status.st_gid,
        "st_rdev": status.st_rdev,
        "st_mtime": status.st_mtime_ns,
        "st_ctime": status.st_ctime_ns,
        "st_atime": status.st_atime_ns,
    }


def _missing(path: str) -> OSError:
    return OSError(errno.ENOENT, os.strerror(errno.ENOENT), path)
