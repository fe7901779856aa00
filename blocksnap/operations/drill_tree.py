"""Drill the backup of a subvolume: restore all of it to a filesystem that is thrown away, and look at it.

There is no image of it that could be mounted, so it is restored in fact, with everything that belongs to its
files, read back and compared. The filesystem is btrfs in a file without a name, which only our own processes
see: the kernel takes it away when they are gone, whatever they died of.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass

from blocksnap.config import DrillSettings
from blocksnap.errors import BlocksnapError
from blocksnap.operations.reporting import Reporter
from blocksnap.operations.restore_tree import restore_tree
from blocksnap.operations.tree_storing import inode_map
from blocksnap.repository.documents import Backup, DrillStep
from blocksnap.repository.inode_map import InodeReader
from blocksnap.repository.repository import Repository
from blocksnap.restore.drilling import performed, run_check
from blocksnap.system import namespace
from blocksnap.system.command import run

_FOLDER = f"{namespace.PRIVATE_FOLDER}/scratch"
_ID = 32
_BLOCK = 4096
_INODE_BYTES = 2048
"""More than btrfs needs for one with its names, its extents and some attributes."""
_SPARE_BYTES = 512 << 20


class NoRoomForDrillError(BlocksnapError):
    """There is no room to restore a tree to."""

    def __init__(self, folder: str, needed: int, err: OSError) -> None:
        self.folder, self.needed = folder, needed
        super().__init__(
            f"the backup of a subvolume is restored to be drilled, and {folder} does not give the {needed} "
            f"bytes for it: {os.strerror(err.errno or 0)}",
            resolution="make room there, or name another folder in the environment variable TMPDIR",
        )


@dataclass(slots=True)
class TreeDrill:
    """What came of it: the steps, and how many chunks of how many bytes were read."""

    steps: list[DrillStep]
    chunks: int = 0
    read_bytes: int = 0


def drill_tree(
    repository: Repository, backup: Backup, settings: DrillSettings, report: Reporter
) -> TreeDrill:
    """Restore it, verify it, and run the job's own command; the first step that fails is the last."""
    drill = TreeDrill([])
    with ExitStack() as stack:
        for came_of_it in performed(_steps(repository, backup, settings, report, drill, stack)):
            step = DrillStep.model_validate(came_of_it)
            drill.steps.append(step)
            report.event("drill-step", backup=backup.id, **step.model_dump(mode="json"))
    return drill


def _steps(
    repository: Repository,
    backup: Backup,
    settings: DrillSettings,
    report: Reporter,
    drill: TreeDrill,
    stack: ExitStack,
) -> Iterator[tuple[str, Callable[[], str]]]:
    tree = f"{_FOLDER}/tree"
    measured = _Measured()

    def make() -> str:
        measured.take(repository, backup)
        _make_filesystem(measured.needed, stack)
        return f"{measured.needed} bytes"

    def restore() -> str:
        done = restore_tree(repository, backup, tree, report, verify=True)
        drill.chunks, drill.read_bytes = measured.chunks, measured.size
        unkept = "".join(f"; not kept: {word}" for word in done.unkept.lines())
        return f"{done.result.inodes} inodes, {done.result.file_bytes} bytes of files{unkept}"

    def check() -> str:
        environment = {"BLOCKSNAP_DRILL_BACKUP": backup.id, "BLOCKSNAP_DRILL_FOLDER": tree}
        return run_check(settings.command or (), settings.seconds, environment)

    yield "scratch", make
    yield "restore", restore
    if settings.command:
        yield "check", check


@dataclass(slots=True)
class _Measured:
    """What a backup has: chunks, their bytes, and inodes."""

    chunks: int = 0
    size: int = 0
    inodes: int = 0

    def take(self, repository: Repository, backup: Backup) -> None:
        """Count; raises DamageError."""
        found = inode_map(backup)
        reader = InodeReader(repository, found)
        for page in range(found.pages):
            for record in reader.page(page).values():
                self.inodes += 1
                places = -(-record.size // backup.chunk_size) if record.is_file else 0
                for number, count, entry in reader.maps.runs(record.content, 0, places):
                    if len(entry) == _ID:
                        self.chunks += count
                        begin = number * backup.chunk_size
                        self.size += min(count * backup.chunk_size, record.size - begin)

    @property
    def needed(self) -> int:
        """How large a filesystem for all of it has to be."""
        # Room that is given out by parts is never used to the last of them.
        needed = (self.size + self.inodes * (_INODE_BYTES + _BLOCK)) * 9 // 8 + _SPARE_BYTES
        return -(-needed // _BLOCK) * _BLOCK


def _make_filesystem(size: int, stack: ExitStack) -> None:
    """Make it and mount it; what is pushed on the stack takes it away. Raises NoRoomForDrillError."""
    where = os.environ.get("TMPDIR") or "/var/tmp"  # noqa: S108
    file = stack.enter_context(tempfile.TemporaryFile(dir=where))  # noqa: SIM115 - the stack closes it
    try:
        # The room is taken now: neither the restore nor anybody else finds out later that it is gone.
        os.posix_fallocate(file.fileno(), 0, size)
    except OSError as err:
        raise NoRoomForDrillError(where, size, err) from err
    loop = namespace.attach_image(f"/proc/self/fd/{file.fileno()}")
    stack.callback(os.close, loop)
    node = os.readlink(f"/proc/self/fd/{loop}")
    # What is discarded would be room that somebody else may take.
    run("mkfs.btrfs", "--quiet", "--nodiscard", "--metadata", "single", node)
    os.makedirs(_FOLDER, exist_ok=True)
    namespace.mount_device(node, _FOLDER, "btrfs", "nodiscard")
    stack.callback(namespace.unmount, _FOLDER)
