"""The folder of this host in which what is derived is kept between runs. Nothing in it is needed.

Whoever writes holds the lock of the repository's folder, and does without the folder when another process
has it. Files are complete when they get their names; what a crash tears is found when it is opened or
read, and thrown away. So nothing is flushed.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import secrets
import stat
import tempfile
import time
import weakref
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from blocksnap.repository.keys import KeyRing
from blocksnap.repository.merging import Merge
from blocksnap.repository.table import Table, TornTableError

OTHERS_BYTES = 4 << 30
"""What the caches of other repositories may take in all; the least recently used go first."""
OTHERS_SECONDS = 90 * 86400
"""A repository that was not used for so long has no cache any more."""
_TABLE = re.compile(r"index-[0-9a-f]{16}")
_NEW = re.compile(r"new-[0-9a-f]{16}")
_FOLDER = re.compile(r"[0-9a-f]{32}")
_LOCK = "lock"
_FILES = frozenset({_LOCK, "manifests"})


class LocalCache:
    """The cache of one repository; every trouble with it is answered by doing without."""

    def __init__(self, root: str, keys: KeyRing) -> None:
        """Open or make the folder ``<root>/<repository id>``; nobody else may be able to write to it."""
        self._root = root
        self._keys = keys
        self._name = keys.repository_id.hex()
        self._folder = _open_folder(root, self._name)
        if self._folder >= 0:
            weakref.finalize(self, os.close, self._folder)
            # The time of the last use decides what goes when there is too much.
            with contextlib.suppress(OSError):
                os.utime(self._folder)

    def tables(self) -> list[Table]:
        """Return all tables that are whole, the largest first."""
        found = []
        for name in self._list(_TABLE):
            try:
                fd = os.open(name, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW, dir_fd=self._folder)
            except OSError:
                # Another process has put it into a larger one.
                continue
            try:
                found.append(Table(fd, self._keys, name))
            except TornTableError:
                self._unlink(name)
        return sorted(
            found, key=lambda table: (-table.rows, table.segments[0].name if table.segments else "")
        )

    def keep(self, merge: Merge) -> Table | None:
        """Write a table into the folder; None where that cannot be done, or another process is at it.

        Raises DamageError when what it is made of is torn.
        """
        with self._lock() as held:
            if not held:
                return None
            for name in self._list(_NEW):
                # Who made it has lost the lock, so it is dead.
                self._unlink(name)
            token = secrets.token_hex(8)
            name = f"new-{token}"
            try:
                flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW
                fd = os.open(name, flags, 0o600, dir_fd=self._folder)
                try:
                    merge.write(fd)
                finally:
                    os.close(fd)
                fd = os.open(name, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW, dir_fd=self._folder)
                table = Table(fd, self._keys, f"index-{token}")
                os.rename(name, table.name, src_dir_fd=self._folder, dst_dir_fd=self._folder)
            except OSError:
                self._unlink(name)
                return None
        _remove_others(self._root, self._name)
        return table

    def drop(self, tables: Iterable[Table]) -> None:
        """Remove tables that are not needed any more; a process that has them open keeps them."""
        for table in tables:
            if table.name:
                self._unlink(table.name)

    def load(self, name: str) -> bytes | None:
        """Return a file of the folder, or None."""
        try:
            fd = os.open(name, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW, dir_fd=self._folder)
        except OSError:
            return None
        try:
            with os.fdopen(fd, "rb") as file:
                return file.read()
        except OSError:
            return None

    def save(self, name: str, data: bytes) -> None:
        """Write a file into the folder, if that can be done."""
        with self._lock() as held, contextlib.suppress(OSError):
            if not held:
                return
            new = f"new-{secrets.token_hex(8)}"
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW
            try:
                with os.fdopen(os.open(new, flags, 0o600, dir_fd=self._folder), "wb") as file:
                    file.write(data)
                os.rename(new, name, src_dir_fd=self._folder, dst_dir_fd=self._folder)
            except OSError:
                self._unlink(new)

    @contextlib.contextmanager
    def _lock(self) -> Iterator[bool]:
        try:
            fd = os.open(
                _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600, dir_fd=self._folder
            )
        except OSError:
            yield False
            return
        try:
            held = True
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                held = False
            yield held
        finally:
            os.close(fd)

    def _list(self, pattern: re.Pattern[str]) -> list[str]:
        if self._folder < 0:
            return []
        try:
            return sorted(name for name in os.listdir(self._folder) if pattern.fullmatch(name))
        except OSError:
            return []

    def _unlink(self, name: str) -> None:
        with contextlib.suppress(OSError):
            os.unlink(name, dir_fd=self._folder)


def scratch_table(merge: Merge, keys: KeyRing) -> Table:
    """Write a table that goes with the process: to a file without a name, else to memory.

    Raises OSError when there is no room anywhere.
    """
    try:
        fd, path = tempfile.mkstemp(prefix="blocksnap-")
        os.unlink(path)
        return _fill(fd, merge, keys)
    except OSError:
        return _fill(os.memfd_create("blocksnap-index"), merge, keys)


def _fill(fd: int, merge: Merge, keys: KeyRing) -> Table:
    try:
        merge.write(fd)
    except BaseException:
        os.close(fd)
        raise
    return Table(fd, keys)


def _open_folder(root: str, name: str) -> int:
    """Return a descriptor of the folder, or -1 where there can be none that is ours alone."""
    try:
        os.makedirs(root, mode=0o700, exist_ok=True)
    except OSError:
        return -1
    path = os.path.join(root, name)
    with contextlib.suppress(OSError):
        os.mkdir(path, 0o700)
    try:
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError:
        return -1
    # Without encryption the checks of a table can be forged by whoever can write it.
    status = os.fstat(fd)
    if status.st_uid not in {os.geteuid(), 0} or stat.S_IMODE(status.st_mode) & 0o022:
        os.close(fd)
        return -1
    return fd


@dataclass(frozen=True, slots=True)
class _Other:
    path: Path
    used: float
    size: int


def _remove_others(root: str, mine: str) -> None:
    """Bound what the repositories take that this host has used before."""
    others = []
    with contextlib.suppress(OSError):
        for path in Path(root).iterdir():
            if _FOLDER.fullmatch(path.name) and path.name != mine and not path.is_symlink():
                files = [file for file in path.iterdir() if _is_ours(file.name)]
                size = sum(file.stat().st_size for file in files)
                others.append(_Other(path, path.stat().st_mtime, size))
    left = OTHERS_BYTES
    for other in sorted(others, key=lambda other: -other.used):
        left -= other.size
        if left < 0 or other.used < time.time() - OTHERS_SECONDS:
            with contextlib.suppress(OSError):
                for file in list(other.path.iterdir()):
                    if _is_ours(file.name):
                        file.unlink()
                other.path.rmdir()


def _is_ours(name: str) -> bool:
    return name in _FILES or bool(_TABLE.fullmatch(name) or _NEW.fullmatch(name))
