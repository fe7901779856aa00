"""Images (disks of virtual machines, and the like) on a filesystem with reflinks: cloned, and the clone read.

The clone is made beside the image, since it has to be on the same filesystem, in a folder that only root sees
into. It goes when it was read. Where the job keeps a base (``base = "keep"`` or ``"auto"``: one costs only
the room of what is overwritten) it stays until the next is committed, and the two are compared: by where
their bytes lie on XFS, by their extents on btrfs. Whose base one is stands in a file of its own beside it, as
anything written to the clone itself would make it another one.

What is in the image does not matter: a qcow2 file is backed up as the bytes that it is.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import stat
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from hashlib import blake2b
from typing import Literal

from blocksnap.errors import BlocksnapError
from blocksnap.extents.changes import BASE_KEPT, BaseDecision, BasePolicy, Binding, Changes, Parent
from blocksnap.extents.clone_identity import CloneIdentity, CloneSource
from blocksnap.system import clones
from blocksnap.system.clones import ClonedFile, CloneError, CloneFolderError
from blocksnap.system.handles import handle_of, open_directory
from blocksnap.system.host import host_id
from blocksnap.system.mounts import mount_under, read_mounts
from blocksnap.volumes.base import Ledger, Level, SnapshotTiming, Trace, VolumeKind
from blocksnap.volumes.errors import NoSuchVolumeError, SnapshotLostError

FOLDER = ".blocksnap"
TRACE = "clone"
"""Kind of the traces that a run leaves in the journal."""
_PREFIX = "clone-"
_MARK = ".base"
_MARK_BYTES = 64 * 1024
_SOURCES: Mapping[str, CloneSource] = {"xfs": "xfs-clone", "btrfs": "btrfs-clone"}
BASE_FREE_PERCENT = 10.0
"""How much of the filesystem has to be free for a base to stay: what is overwritten takes room twice."""
Left = Literal["removed", "nothing"]


def source_of(path: str) -> CloneSource | None:
    """Return how clones of a file are compared; None where none can be made, or compared."""
    mount = mount_under(path)
    source = _SOURCES.get(mount.filesystem) if mount else None
    return source if source is not None and clones.can_clone(path) else None


class ImageVolume:
    """A file of which clones can be made."""

    kind: VolumeKind = "image"

    def __init__(self, path: str, source: CloneSource) -> None:
        self._path = os.path.realpath(path)
        self._source = source
        status = os.stat(self._path)
        self._size = status.st_size
        self._device = status.st_dev
        self._handle = handle_of(os.path.dirname(self._path))

    @property
    def name(self) -> str:
        """The path."""
        return self._path

    @property
    def key(self) -> str:
        """The path, on this host, as for any file."""
        return f"{host_id()}:{self._path}"

    @property
    def size(self) -> int:
        """Size when the volume was looked up."""
        return self._size

    @property
    def snapshot_device(self) -> int | None:
        """The device of its filesystem: what is mounted from images on it can be frozen."""
        return self._device

    def trace(self, run: str) -> Trace | None:
        """Return the name that the clone of a run will have, and how its directory is found if renamed."""
        return {
            "kind": TRACE,
            "folder": _folder_of(self._path),
            "name": clone_name(run, self._path),
            "path": self._path,
            "run": run,
            **({"handle": self._handle} if self._handle else {}),
        }

    def prepare(self) -> None:
        """Make the folder, and write out what is dirty, for which the clone would have to wait."""
        os.close(clones.open_folder(_folder_of(self._path), create=True))
        fd = self._open()
        try:
            os.fdatasync(fd)
        except OSError as err:
            raise CloneError(self._path, err) from err
        finally:
            os.close(fd)

    def take_snapshot(self, run: str, ledger: Ledger) -> ImageSnapshot:  # noqa: ARG002 - protocol
        """Clone it; whoever writes to it waits meanwhile."""
        with ExitStack() as stack:
            fd = self._open()
            stack.callback(os.close, fd)
            clone, timing = _make_clone(fd, self._path, clone_name(run, self._path))
        return ImageSnapshot(self._path, self._source, clone, self.trace(run) or {}, timing)

    def _open(self) -> int:
        try:
            return os.open(self._path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError as err:
            raise NoSuchVolumeError(self._path, os.strerror(err.errno or 0)) from err


class ImageSnapshot:
    """An immutable clone of an image, held open."""

    def __init__(self, path: str, source: CloneSource, fd: int, trace: Trace, timing: SnapshotTiming) -> None:
        self._path = path
        self._source = source
        self._fd = fd
        self._trace = trace
        self._name = trace["name"]
        self._run = trace["run"]
        self._timing = timing
        self._state: ClonedFile | None = None
        self._stays = self._dropped = False
        self._lock = threading.Lock()
        room = os.fstatvfs(fd)
        self._free = room.f_bavail * room.f_frsize

    @property
    def size(self) -> int:
        """Size in bytes."""
        return self._known().size

    @property
    def timing(self) -> SnapshotTiming:
        """When it was taken and how long writers waited."""
        return self._timing

    @property
    def binding(self) -> Binding:
        """Identity of the clone, which may be the base of the next."""
        identity = CloneIdentity.of(self._known(), self._source)
        return {**identity.to_binding(), "path": self._path, "run": self._run}

    def find_changes(self, parent: Parent | None) -> Changes:
        """Compare the clone with the parent's, if that was kept."""
        with _open_base(self._path, parent) as base:
            if self._source == "xfs-clone":
                from blocksnap.extents.fiemap import find_fiemap_changes

                return find_fiemap_changes(base, self._fd, parent)
            from blocksnap.extents.btrfs_clones import find_btrfs_clone_changes

            return find_btrfs_clone_changes(base, self._fd, parent)

    @contextmanager
    def open_reader(self) -> Iterator[int]:
        """Yield the clone's descriptor; reads go through the page cache."""
        os.posix_fadvise(self._fd, 0, 0, os.POSIX_FADV_SEQUENTIAL)
        yield self._fd

    def levels(self) -> tuple[Level, ...]:
        """Return how much is used of the room that was free: what is overwritten takes room twice."""
        with self._lock:
            if self._dropped:
                return ()
            room = os.fstatvfs(self._fd)
        used = self._free - room.f_bavail * room.f_frsize
        return (Level(f"the filesystem of {self._path}", "filesystem", max(used, 0), self._free),)

    def drop(self) -> None:
        """Remove the clone, though it may be being read: its room is given back when reads have ended."""
        with self._lock:
            if self._fd >= 0 and not self._dropped:
                self._dropped = True
                nothing = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
                os.dup2(nothing, self._fd, inheritable=False)
                os.close(nothing)
        self._remove()

    def check(self) -> None:
        """Make sure that it is still there, and as it was."""
        if self._dropped or not os.fstat(self._fd).st_nlink:
            raise SnapshotLostError(self._path, "its clone is gone")
        if self._look() != self._known():
            raise SnapshotLostError(self._path, "its clone was changed")

    def decide_base(self, policy: BasePolicy) -> BaseDecision:
        """Stay where the job asks for it and the filesystem has room."""
        if policy == "none":
            return BaseDecision(stays=False, reason="nothing is to stay beside the image")
        if self._dropped:
            return BaseDecision(stays=False, reason="the clone was removed before the filesystem is full")
        room = os.fstatvfs(self._fd)
        free = 100 * room.f_bavail / room.f_blocks if room.f_blocks else 0.0
        if free < BASE_FREE_PERCENT:
            reason = f"{free:.1f} % of the filesystem are free, and a base needs {BASE_FREE_PERCENT:g} %"
            return BaseDecision(stays=False, reason=reason)
        try:
            # The manifest will say that it is there, and in this state.
            os.fsync(self._fd)
        except OSError as err:
            reason = f"the clone cannot be written out: {os.strerror(err.errno or 0)}"
            return BaseDecision(stays=False, reason=reason)
        reason = "as asked for" if policy == "keep" else "without it the whole image would be read"
        return BaseDecision(stays=True, reason=reason)

    def settle(self, owner: str, *, stays: bool) -> None:
        """Become a base, or not, and remove the bases before."""
        settle_base(self._path, self._name, self._run, owner, stays=stays)
        self._stays = stays

    def remove(self) -> None:
        """Remove the clone, and the folder if nothing else is in it."""
        if not self._stays:
            self._remove()
        with self._lock:
            if self._fd >= 0:
                os.close(self._fd)
                self._fd = -1

    def _remove(self) -> None:
        remove_trace(self._trace)

    def _known(self) -> ClonedFile:
        if self._state is None:
            self._state = self._look()
        return self._state

    def _look(self) -> ClonedFile:
        if self._source == "xfs-clone":
            from blocksnap.system.xfs import look_at

            return look_at(self._fd)
        from blocksnap.extents.btrfs_clones import look_at as look_at_btrfs

        return look_at_btrfs(self._fd)


def clone_name(run: str, path: str) -> str:
    """Return the name of the clone that a run makes of an image: short, and of no other run or image."""
    digest = blake2b(f"{run}\0{path}".encode(), digest_size=8).hexdigest()
    prefix = "".join(letter for letter in run if letter.isalnum())[:12]
    return f"{_PREFIX}{prefix}-{digest}"


def bases_of(path: str) -> tuple[str, ...]:
    """Return the paths of the clones of an image that were kept as bases."""
    return tuple(os.path.join(_folder_of(path), name) for name in sorted(_bases(path)))


def settle_base(path: str, name: str, run: str, owner: str, *, stays: bool) -> list[str]:
    """Make the clone of a committed run the owner's base of an image, or not, and remove those before.

    Return the names of these. Raises CloneError.
    """
    folder = _folder_of(path)
    if stays:
        _write_mark(folder, name, {"owner": owner, "path": path, "run": run})
    removed = []
    for each, mark in _bases(path).items():
        if each != name and mark.get("owner") == owner and remove_clone(folder, each) == "removed":
            removed.append(each)
    return removed


def finish_rotation(path: str, name: str, run: str, owner: str) -> bool:
    """Make the clone of a committed run the base it was to be, if it is there and is not yet.

    Bases before it go in any case; one that a later run has put in its place stays. Raises CloneError.
    """
    folder = _folder_of(path)
    if not os.path.lexists(os.path.join(folder, name)):
        return False
    is_new = name not in _bases(path)
    settle_base(path, name, run, owner, stays=True)
    return is_new


def remove_trace(trace: Mapping[str, str]) -> Left:
    """Remove the clone that a trace in the journal announced, unless it became a base; raises CloneError.

    It is found, too, where the directory of the image was renamed since.
    """
    folder, name = trace["folder"], trace["name"]
    if not name.startswith(_PREFIX) or name in _bases(trace["path"]):
        return "nothing"
    if remove_clone(folder, name) == "removed":
        return "removed"
    with ExitStack() as stack:
        for moved in _moved_folders(trace.get("handle"), stack):
            is_there = os.path.lexists(f"{moved}/{name}") and not os.path.lexists(f"{moved}/{name}{_MARK}")
            if is_there and remove_clone(moved, name) == "removed":
                return "removed"
    return "nothing"


def _moved_folders(handle: str | None, stack: ExitStack) -> Iterator[str]:
    """Yield paths of the folder in the directory with a handle, wherever that is on what is mounted here.

    A directory of another filesystem may be among them; names of clones are of one run alone.
    """
    mounts = {each.device: each.point for each in read_mounts() if each.filesystem in _SOURCES}
    for point in mounts.values() if handle else ():
        try:
            mount = os.open(point, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            stack.callback(os.close, mount)
            fd = open_directory(mount, handle or "")
        except OSError:
            continue
        stack.callback(os.close, fd)
        yield f"/proc/self/fd/{fd}/{FOLDER}"


def remove_clone(folder: str, name: str) -> Left:
    """Remove a clone with its mark, and the folder if nothing else is in it; raises CloneError."""
    try:
        fd = clones.open_folder(folder)
    except FileNotFoundError:
        return "nothing"
    try:
        removed = clones.remove_clone(fd, name)
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name + _MARK, dir_fd=fd)
    except OSError as err:
        raise CloneError(f"{folder}/{name}", err) from err
    finally:
        os.close(fd)
    with contextlib.suppress(OSError):
        os.rmdir(folder)
    return "removed" if removed else "nothing"


def _make_clone(fd: int, path: str, name: str) -> tuple[int, SnapshotTiming]:
    """Clone an image into its folder, anew where another run removed that in between."""
    attempts_left = clones.ATTEMPTS
    while True:
        attempts_left -= 1
        folder = clones.open_folder(_folder_of(path), create=True)
        try:
            at, began = time.time(), time.monotonic()
            clone = clones.make_clone(fd, folder, name)
            return clone, SnapshotTiming(taken_at=at, freeze_seconds=time.monotonic() - began)
        except OSError as err:
            is_removed = err.errno == errno.ENOENT and not os.fstat(folder).st_nlink
            if not is_removed or not attempts_left:
                raise CloneError(path, err) from err
        finally:
            os.close(folder)


def _folder_of(path: str) -> str:
    return os.path.join(os.path.dirname(path), FOLDER)


@contextmanager
def _open_base(path: str, parent: Parent | None) -> Iterator[int | None]:
    """Open the clone that the parent's run left of an image; None when it left none, or it is gone."""
    run = parent.binding.get("run") if parent else None
    if parent is None or not isinstance(run, str) or parent.binding.get(BASE_KEPT) is not True:
        yield None
        return
    with ExitStack() as stack:
        try:
            folder = clones.open_folder(_folder_of(path))
            stack.callback(os.close, folder)
            flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
            base = os.open(clone_name(run, path), flags, dir_fd=folder)
            stack.callback(os.close, base)
        except (OSError, BlocksnapError):
            base = None
        yield base


def _bases(path: str) -> dict[str, dict[str, str]]:
    """Return the names of the clones of an image that are bases, with their marks."""
    found = {}
    with ExitStack() as stack:
        try:
            folder = clones.open_folder(_folder_of(path))
            stack.callback(os.close, folder)
            names = os.listdir(folder)
        except (CloneFolderError, OSError):
            return {}
        for name in names:
            mark = _read_mark(folder, name) if name.endswith(_MARK) else None
            if isinstance(mark, dict) and mark.get("path") == path:
                found[name.removesuffix(_MARK)] = {str(key): str(value) for key, value in mark.items()}
    return found


def _read_mark(folder: int, name: str) -> object:
    """Return what a mark says; None where it is no file, or says nothing that can be read."""
    try:
        # The directory of an image is its owner's, who may put a pipe there, or a link to /dev/zero.
        fd = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=folder)
    except OSError:
        return None
    try:
        is_file = stat.S_ISREG(os.fstat(fd).st_mode)
        return json.loads(os.read(fd, _MARK_BYTES)) if is_file else None
    except (OSError, ValueError, RecursionError):
        return None
    finally:
        os.close(fd)


def _write_mark(folder: str, name: str, mark: Mapping[str, str]) -> None:
    with ExitStack() as stack:
        try:
            fd = clones.open_folder(folder)
            stack.callback(os.close, fd)
            os.stat(name, dir_fd=fd, follow_symlinks=False)
            flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC
            with os.fdopen(os.open(name + _MARK, flags, 0o600, dir_fd=fd), "w", encoding="utf-8") as file:
                json.dump(mark, file)
                file.flush()
                os.fsync(file.fileno())
            os.fsync(fd)
        except OSError as err:
            raise CloneError(f"{folder}/{name}", err) from err
