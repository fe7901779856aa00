"""Restore the backup of a subvolume to a new directory, on btrfs to a new subvolume."""

from __future__ import annotations

import time
from dataclasses import dataclass

from blocksnap.errors import UsageError
from blocksnap.operations.reporting import Reporter, phase
from blocksnap.operations.tree_storing import inode_map
from blocksnap.repository.documents import Backup
from blocksnap.repository.inode_map import InodeReader
from blocksnap.repository.keys import Right
from blocksnap.repository.repository import Repository
from blocksnap.restore.naming import printable
from blocksnap.restore.targets import TargetFailedError
from blocksnap.restore.tree import MissingRange, TreeRestore, TreeResult
from blocksnap.restore.tree_place import NewTree
from blocksnap.restore.tree_verify import verify_tree
from blocksnap.restore.unkept import Unkept


@dataclass(frozen=True, slots=True)
class RestoredTree:
    """What a restore of a tree did; ``nested`` are subvolumes that are empty directories in it."""

    target: str
    is_subvolume: bool
    result: TreeResult
    unkept: Unkept
    nested: tuple[str, ...]
    missing: tuple[MissingRange, ...]
    verified: bool
    seconds: float


def restore_tree(
    repository: Repository,
    backup: Backup,
    target: str,
    report: Reporter,
    *,
    verify: bool = False,
    zero_missing: bool = False,
) -> RestoredTree:
    """Restore to ``target``, a directory that does not exist yet; it gets its name when it is complete.

    Raises MissingRightError, TargetError, DamageError; nothing is left then.
    """
    repository.keys.require(Right.READ)
    if target == "-":
        raise UsageError("a tree of files is not written to standard output", resolution="name a directory")
    began = time.monotonic()
    reader = InodeReader(repository, inode_map(backup))
    missing: list[MissingRange] | None = [] if zero_missing else None
    with NewTree(target, backup.id[:8]) as place:
        tree = TreeRestore(repository, reader, place.fd, place.hidden, backup.chunk_size)
        with phase(report, f"restoring {backup.volume.name}", backup.size):
            result = tree.run(report.advance, missing)
        try:
            place.flush()
            if verify and not missing:
                with phase(report, f"verifying {target}", backup.size):
                    verify_tree(reader, repository.keys, place.fd, backup.chunk_size, report.advance)
            tree.finish_top()
            place.flush()
            place.finish()
            tree.seal_top()
        except OSError as err:
            raise TargetFailedError(target, err) from err
        return RestoredTree(
            target=target,
            is_subvolume=place.is_subvolume,
            result=result,
            unkept=tree.unkept,
            nested=tuple(printable(path) for path in tree.nested),
            missing=tuple(missing or ()),
            verified=verify and not missing,
            seconds=time.monotonic() - began,
        )
