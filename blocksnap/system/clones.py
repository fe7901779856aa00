"""Clones of files (FICLONE), kept where nobody changes them, and what tells one from all others.

A clone shares its blocks with the file; whoever writes to the file afterwards writes elsewhere. It is made
under its own name at once: it is nobody's base before it is complete, and what a crash leaves is known by
that name. Then it is immutable (FS_IMMUTABLE_FL): not even root can write to it, rename or remove it until
that is taken away, which changes its ctime. (include/uapi/linux/fs.h; kernel: fs/remap_range.c)
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import stat
import struct
from dataclasses import dataclass

from blocksnap.errors import VolumeError

_FICLONE = 0x40049409
_FICLONERANGE = 0x4020940D
_GET_FLAGS = 0x80086601
_SET_FLAGS = 0x40086602
_GET_VERSION = 0x80087601
_IMMUTABLE = 0x10
_NOT_COPIED_ON_WRITE = 0x00800000
_FLAGS = struct.Struct("=Q")
_UINT = struct.Struct("=I")
_RANGE = struct.Struct("=qQQQ")
_BLOCK = 4096
_FOLDER_FLAGS = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
ATTEMPTS = 10
"""How often a folder is made again that others remove as soon as it is empty."""


class CloneError(VolumeError):
    """The filesystem made no clone of a file (exit code 14)."""

    def __init__(self, path: str, err: OSError) -> None:
        self.path = path
        super().__init__(
            f"no clone of {path} can be made: {os.strerror(err.errno or 0)}",
            resolution="the filesystem needs reflinks and room; see the kernel log (dmesg)",
        )


class CloneFolderError(VolumeError):
    """The folder for clones cannot be used (exit code 14)."""

    def __init__(self, path: str, problem: str) -> None:
        self.path = path
        super().__init__(
            f"clones cannot be kept in {path}: {problem}",
            resolution="it is made by blocksnap, for root alone; move what else has that name",
        )


@dataclass(frozen=True, slots=True)
class ClonedFile:
    """One file in one state.

    ``filesystem`` tells the filesystem, and the subvolume in it, from all others. ``generation`` is drawn
    anew each time an inode number is given away, so that ``inode`` and it are never those of another file.
    ``immutable``: nobody, not even root, can write to it, rename or remove it until the attribute is
    taken away, which changes ctime.
    """

    filesystem: str
    inode: int
    generation: int
    size: int
    modified_ns: int
    changed_ns: int
    immutable: bool


def look_at_file(fd: int, filesystem: str) -> ClonedFile:
    """Return what an open file of a filesystem is at this moment; raises OSError."""
    status = os.fstat(fd)
    version = bytearray(8)
    fcntl.ioctl(fd, _GET_VERSION, version)
    return ClonedFile(
        filesystem=filesystem,
        inode=status.st_ino,
        generation=_UINT.unpack_from(version)[0],
        size=status.st_size,
        modified_ns=status.st_mtime_ns,
        changed_ns=status.st_ctime_ns,
        immutable=bool(_flags_of(fd) & _IMMUTABLE),
    )


def can_clone(path: str) -> bool:
    """Try it with a file that has no name; False where the filesystem cannot, or cannot be written to."""
    with contextlib.ExitStack() as stack:
        try:
            source = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            stack.callback(os.close, source)
            folder = os.path.dirname(os.path.abspath(path))
            target = os.open(folder, os.O_RDWR | os.O_TMPFILE | os.O_CLOEXEC, 0o600)
            stack.callback(os.close, target)
            _copy_kind(source, target)
            # Only root may, and not in every container.
            _set_flags(target, _flags_of(target) | _IMMUTABLE)
            _set_flags(target, _flags_of(target) & ~_IMMUTABLE)
            whole = os.fstat(source).st_size <= _BLOCK
            fcntl.ioctl(target, _FICLONERANGE, _RANGE.pack(source, 0, 0 if whole else _BLOCK, 0))
        except OSError:
            return False
    return True


def open_folder(path: str, *, create: bool = False) -> int:
    """Open a folder that only we write to; raises CloneFolderError, FileNotFoundError where there is none."""
    try:
        fd = _make_folder(path) if create else os.open(path, _FOLDER_FLAGS)
    except OSError as err:
        if isinstance(err, FileNotFoundError) and not create:
            raise
        raise CloneFolderError(path, os.strerror(err.errno or 0)) from err
    status = os.fstat(fd)
    if status.st_uid != os.geteuid() or status.st_mode & 0o022:
        os.close(fd)
        raise CloneFolderError(path, "others can write to it")
    return fd


def _make_folder(path: str) -> int:
    """Make a folder unless it is there, and open it; raises OSError."""
    for _ in range(ATTEMPTS - 1):
        with contextlib.suppress(FileExistsError):
            os.mkdir(path, 0o700)
        # A run that has just removed the last clone in it removes the folder.
        with contextlib.suppress(FileNotFoundError):
            return os.open(path, _FOLDER_FLAGS)
    return os.open(path, _FOLDER_FLAGS)


def make_clone(source: int, folder: int, name: str) -> int:
    """Clone a file into a folder, make it immutable, and return a descriptor to read it; raises OSError.

    Dirty pages of the file are written out first; whoever writes to it waits meanwhile. When it fails nothing
    is left.
    """
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    target = os.open(name, flags, 0o600, dir_fd=folder)
    try:
        _copy_kind(source, target)
        fcntl.ioctl(target, _FICLONE, source)
        os.fchmod(target, 0o400)
        _set_flags(target, _flags_of(target) | _IMMUTABLE)
        return os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=folder)
    except BaseException:
        remove_clone(folder, name)
        raise
    finally:
        os.close(target)


def remove_clone(folder: int, name: str) -> bool:
    """Remove a clone; False when there was none. Raises OSError."""
    try:
        fd = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK, dir_fd=folder)
    except FileNotFoundError:
        return False
    try:
        if stat.S_ISREG(os.fstat(fd).st_mode):
            _set_flags(fd, _flags_of(fd) & ~_IMMUTABLE)
        os.unlink(name, dir_fd=folder)
    finally:
        os.close(fd)
    return True


def _copy_kind(source: int, target: int) -> None:
    """Let both have checksums or none (chattr +C): else btrfs lets them share no blocks."""
    if _flags_of(source) & _NOT_COPIED_ON_WRITE:
        _set_flags(target, _flags_of(target) | _NOT_COPIED_ON_WRITE)


def _flags_of(fd: int) -> int:
    flags = bytearray(_FLAGS.size)
    fcntl.ioctl(fd, _GET_FLAGS, flags)
    return int(_UINT.unpack_from(flags)[0])


def _set_flags(fd: int, flags: int) -> None:
    fcntl.ioctl(fd, _SET_FLAGS, _FLAGS.pack(flags))
