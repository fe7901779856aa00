"""What dead runs left on btrfs: read-only snapshots in the top directory of a filesystem.

They have no tags. The journal has the name before there is one, and the kernel tells of which subvolume a
snapshot was taken; both have to agree before anything is removed.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING
from uuid import UUID

from blocksnap.controller.findings import Finding
from blocksnap.controller.journal import Entry
from blocksnap.errors import BlocksnapError
from blocksnap.system.mounts import read_mounts

if TYPE_CHECKING:
    from blocksnap.system.mounts import Mount

KIND = "btrfs"
"""Of the traces of such snapshots."""


@dataclass(slots=True)
class SubvolumeLeftovers:
    """What was removed, what could not be, what is not ours after all, and the runs something is left of."""

    removed: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    puzzles: list[str] = field(default_factory=list)
    kept: set[str] = field(default_factory=set)


def remove_subvolume_snapshots(dead: Collection[Entry]) -> SubvolumeLeftovers:
    """Remove the snapshots that dead runs announced; goes on past errors."""
    found = SubvolumeLeftovers()
    for entry, trace, name in _announced(dead):
        from blocksnap.volumes.subvolume import remove_trace

        try:
            left = remove_trace(trace)
        except BlocksnapError as err:
            found.kept.add(entry.run)
            found.warnings.append(f"cannot remove {name}, which run {entry.run} left: {err}")
            continue
        if left == "removed":
            found.removed.append(f"removed {name}, a snapshot that run {entry.run} left")
        elif left == "unreachable":
            found.kept.add(entry.run)
            found.warnings.append(
                f"run {entry.run} may have left {name}, which is not mounted: mount it, and run it again"
            )
        elif left == "foreign":
            found.puzzles.append(f"{name} has the name of a snapshot of ours and is none: it is left")
    return found


def examine_subvolumes(entries: Collection[Entry], mounts: Collection[Mount]) -> Iterator[Finding]:
    """Tell of snapshots of dead runs, and of those whose run no journal here knows. Changes nothing."""
    known = set()
    for entry, trace, name in _announced(entries):
        from blocksnap.volumes.subvolume import find_trace

        known.add((trace.get("filesystem"), trace.get("name")))
        if entry.alive:
            continue
        left = find_trace(trace)
        if left == "removed":
            message = f"a snapshot that run {entry.run} left"
            yield Finding(
                "warning", "leftover", name, message, "blocksnap doctor --fix removes it", ours=True
            )
        elif left == "unreachable":
            message = f"run {entry.run} may have left it, and the filesystem is not mounted"
            yield Finding("warning", "leftover", name, message, "mount it, and run: blocksnap doctor --fix")
    for filesystem in sorted(_filesystems(mounts), key=str):
        from blocksnap.system.btrfs_places import NotReachedError
        from blocksnap.volumes.subvolume import snapshots_on

        try:
            snapshots = snapshots_on(filesystem)
        except NotReachedError as err:
            # One that was unmounted meanwhile, or is mounted for reading only, does not keep the others.
            if filesystem in _filesystems([mount for mount in read_mounts() if not mount.read_only]):
                yield Finding("error", "leftover", f"btrfs {filesystem}", f"cannot be looked at: {err.brief}")
            continue
        for snapshot in snapshots:
            if (str(filesystem), snapshot) not in known:
                yield Finding(
                    "warning",
                    "leftover",
                    f"{snapshot} on btrfs {filesystem}",
                    "a snapshot of ours whose run this state directory does not know",
                    "if no other run is using it: mount -o subvolid=5, and btrfs subvolume delete it",
                )


def _announced(entries: Collection[Entry]) -> Iterator[tuple[Entry, dict[str, str], str]]:
    for entry in entries:
        for trace in entry.traces():
            if trace.get("kind") == KIND:
                yield entry, trace, f"{trace['name']} on btrfs {trace['filesystem']}"


def _filesystems(mounts: Collection[Mount]) -> set[UUID]:
    from blocksnap.system.btrfs import filesystem_info

    found = set()
    for point in {mount.source: mount.point for mount in mounts if mount.filesystem == "btrfs"}.values():
        try:
            fd = os.open(point, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError:
            continue
        try:
            found.add(filesystem_info(fd).uuid)
        except BlocksnapError:
            # Something else is mounted over it.
            continue
        finally:
            os.close(fd)
    return found
