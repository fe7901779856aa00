"""A random load on a btrfs subvolume, the same for the same seed: everything that can be done to files.

    work = Workload(lab.live, seed=7)
    work.run(200)

Each operation is a small function in btrfs_operations (on files' data, on names, on what describes them)
or btrfs_upkeep (on the filesystem as a whole, slower). What the kernel refuses, as it does for a file that is
immutable, is counted and not an error: ``done`` and ``refused`` tell by operation how often which happened,
so that a test can show that nothing it relies on was always refused.
"""

from __future__ import annotations

import errno
import os
import random
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path

MAX_ENTRIES = 120
"""Names in the tree above which more is removed than made."""
MAX_SIZE = 1 << 20
"""No file is made longer than this."""

REFUSALS = frozenset({
    errno.EPERM, errno.EACCES, errno.EINVAL, errno.EEXIST, errno.ENOTEMPTY, errno.ENODATA, errno.EOPNOTSUPP,
    errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.ETXTBSY, errno.EMLINK, errno.ENXIO,
    errno.EBUSY, errno.ENOSPC, errno.EXDEV, errno.EINPROGRESS, errno.ECANCELED, errno.EAGAIN, errno.E2BIG,
    errno.EROFS,
})  # fmt: skip
"""What the kernel answers to something that is not possible for this file now."""

_SUBVOLUME_ROOT, _STUB = 256, 2

Operation = Callable[["Workload"], None]


class Workload:
    """Works on a subvolume; ``root`` has to be there, and be left alone by everybody else.

    Paths in here are relative to it. ``beside`` is a directory of the same filesystem where snapshots of
    the subvolume may be made and deleted; the operations that need it are left out without it.
    """

    def __init__(
        self,
        root: Path | str,
        seed: int,
        *,
        beside: Path | str | None = None,
        operations: Iterable[str] | None = None,
        upkeep: bool = True,
    ) -> None:
        """``operations`` restricts the load to these; ``upkeep`` says whether btrfs_upkeep takes part."""
        self.root = os.fspath(root)
        self.beside = None if beside is None else os.fspath(beside)
        self.random = random.Random(seed)
        self.done: Counter[str] = Counter()
        self.refused: Counter[str] = Counter()
        self.files: list[str] = []
        self.folders: list[str] = [""]
        self.others: list[str] = []
        self.held: list[int] = []
        self.foreign: list[str] = []
        self._pool = random.Random(seed ^ 0x5EED).randbytes(1 << 18)
        self._made = 0
        self._choose(operations, upkeep=upkeep)

    def _choose(self, names: Iterable[str] | None, *, upkeep: bool) -> None:
        from support import btrfs_operations, btrfs_upkeep

        table = dict(btrfs_operations.OPERATIONS)
        if upkeep:
            table |= btrfs_upkeep.OPERATIONS
        if self.beside is not None and upkeep:
            table |= btrfs_upkeep.WITH_SNAPSHOTS
        if names is not None:
            known = {**btrfs_operations.OPERATIONS, **btrfs_upkeep.OPERATIONS, **btrfs_upkeep.WITH_SNAPSHOTS}
            table = {name: known[name] for name in names}
        self._names = list(table)
        self._operations = {name: operation for name, (_, operation) in table.items()}
        self._weights = [weight for weight, _ in table.values()]

    @property
    def operations(self) -> list[str]:
        """Names of all operations that take part."""
        return list(self._names)

    def run(self, count: int) -> list[str]:
        """Do ``count`` operations; return their names."""
        names = self.random.choices(self._names, self._weights, k=count)
        for name in names:
            self.do(name)
        return names

    def do(self, name: str) -> bool:
        """Do one operation by its name; return whether the kernel let it happen."""
        try:
            self._operations[name](self)
        except OSError as err:
            if err.errno not in REFUSALS:
                raise
            self.refused[name] += 1
            return False
        except NothingToWorkOnError:
            self.refused[name] += 1
            return False
        self.done[name] += 1
        return True

    def close(self) -> None:
        """Close files that were kept open after they were unlinked."""
        while self.held:
            os.close(self.held.pop())

    # --- what operations choose from ---

    def path(self, name: str) -> str:
        """Return the full path of a name."""
        return f"{self.root}/{name}"

    def some_file(self) -> str:
        """Choose a regular file."""
        return self._one_of(self.files)

    def some_folder(self, *, root: bool = True) -> str:
        """Choose a directory; the subvolume itself only if ``root``."""
        return self._one_of(self.folders if root else self.folders[1:])

    def something(self) -> str:
        """Choose anything but the subvolume itself."""
        return self._one_of(self.files + self.others + self.folders[1:])

    def _one_of(self, names: list[str]) -> str:
        if not names:
            raise NothingToWorkOnError
        return self.random.choice(names)

    def new_name(self, folder: str | None = None) -> str:
        """Make up a name that was never used, or sometimes one that was; now and then a long or odd one."""
        folder = self.some_folder() if folder is None else folder
        self._made += 1
        chance = self.random.random()
        if chance < 0.3:
            name = f"n{self.random.randrange(24)}"
        elif chance < 0.34:
            name = f"{self._made}" + "long" * self.random.randrange(1, 60)
        elif chance < 0.38:
            name = f"o{self._made + 256}-{self.random.randrange(5, 40)}-0"
        elif chance < 0.42:
            name = f"\udcff odd\n{self._made} é"
        else:
            name = f"f{self._made}"
        return f"{folder}/{name}" if folder else name

    def content(self, length: int) -> bytes:
        """Make data: random, or compressible, or zeros, or such that two files can be alike."""
        chance = self.random.random()
        if chance < 0.45:
            at = self.random.randrange(len(self._pool))
            doubled = self._pool[at : at + length]
            return (doubled * (length // max(1, len(doubled)) + 1))[:length]
        if chance < 0.6:
            return bytes([self.random.randrange(1, 4)]) * length
        if chance < 0.7:
            return bytes(length)
        line = b"%d the quick brown fox\n" % self.random.randrange(1000)
        return (line * (length // len(line) + 1))[:length]

    def place(self, size: int) -> tuple[int, int]:
        """Choose (offset, length) in or a bit beyond a file of ``size`` bytes, often whole blocks."""
        length = self.random.choice((1, 100, 2000, 4096, 8192, 20000, 65536, 140000))
        length = self.random.randrange(1, length + 1)
        offset = min(self.random.randrange(size + 8192), MAX_SIZE)
        if self.random.random() < 0.5:
            return offset & -4096, max(4096, length & -4096)
        return offset, length

    def size(self, fd: int) -> int:
        """Return the size of an open file."""
        return os.fstat(fd).st_size

    # --- what operations tell ---

    def gone(self, name: str) -> None:
        """Forget a name, and with a directory all below it."""
        below = f"{name}/"
        for names in (self.files, self.folders, self.others):
            names[:] = [entry for entry in names if entry != name and not entry.startswith(below)]

    def moved(self, old: str, new: str) -> None:
        """Follow a rename, of what replaced or was replaced too."""
        if old == new:
            return
        self.gone(new)
        below = f"{old}/"
        for names in (self.files, self.folders, self.others):
            for index, name in enumerate(names):
                if name == old:
                    names[index] = new
                elif name.startswith(below):
                    names[index] = new + name[len(old) :]

    def exchanged(self, one: str, other: str) -> None:
        """Follow an exchange of two names, neither of which is below the other."""
        aside = "/exchanged/"
        self.moved(one, aside)
        self.moved(other, one)
        self.moved(aside, other)

    def relist(self) -> None:
        """Look at what there is, after something that may have been done in part."""
        self.files, self.folders, self.others = [], [""], []
        self.foreign = [path for path in self.foreign if not path.startswith(f"{self.root}/")]
        for folder in self.folders:
            with os.scandir(self.path(folder)) as entries:
                for entry in entries:
                    name = f"{folder}/{entry.name}" if folder else entry.name
                    if not entry.is_dir(follow_symlinks=False):
                        (self.files if entry.is_file(follow_symlinks=False) else self.others).append(name)
                    elif entry.stat(follow_symlinks=False).st_ino == _SUBVOLUME_ROOT:
                        self.foreign.append(entry.path)
                    elif entry.inode() != _STUB:
                        # The list grows while it is walked.
                        self.folders.append(name)

    def crowded(self) -> bool:
        """Whether there is so much that something should be removed rather than made."""
        return len(self.files) + len(self.folders) + len(self.others) > MAX_ENTRIES


class NothingToWorkOnError(Exception):
    """There is no file, or no directory, of the kind that an operation needs."""
