# SPDX-License-Identifier: Apache-2.0
"""Backups of real thin volumes without a repository: every answer is applied to the parent and compared.

``Backups`` takes them of one volume, ``Group`` of several at one instant, each with or without a base.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from blocksnap.controller.session import SnapshotSession
from blocksnap.extents.changes import BaseDecision, Changes, Parent
from blocksnap.extents.mapped_set import MappedSet
from blocksnap.extents.model import ExtentList
from blocksnap.volumes.base import Snapshot, Volume
from blocksnap.volumes.resolve import resolve_volume
from support.lvm_lab import ThinPool, tool, write_at

OWNER = "0123456789abcdef"


@dataclass
class Taken:
    """What a repository would hold of one backup."""

    run: str
    content: bytes
    binding: dict[str, Any]
    mapped: MappedSet | None
    changes: Changes

    def parent(self, *, known_here: bool) -> Parent:
        """What the next backup is told of this one."""
        return Parent(len(self.content), self.binding, known_here, lambda: self.mapped)


class Backups:
    """Takes backups of one volume as operations does, and proves each of them."""

    def __init__(self, volume: str, state: Path) -> None:
        self.volume = volume
        self.state = state
        self.count = 0

    def take(self, parent: Taken | None = None) -> Taken:
        """Take one; nothing stays on the pool."""
        self.count += 1
        run = f"{os.getpid():x}x{self.count}"
        volume = resolve_volume(self.volume)
        with SnapshotSession([volume], run, self.state) as session:
            taken = take_one(session, volume, session.snapshots[0], parent)
            session.committing()
        assert (session.warnings, session.recovered) == ([], [])
        return taken


def take_one(session: SnapshotSession, volume: Volume, snapshot: Snapshot, parent: Taken | None) -> Taken:
    """Find the changes of a snapshot, read it, and prove that they lead from the parent to it."""
    known = parent is not None and session.remembers(volume, parent.run)
    changes = snapshot.find_changes(parent.parent(known_here=known) if parent else None)
    content = read_all(snapshot)
    snapshot.check()
    assert rebuilt(parent, changes, content) == content
    return Taken(session.run, content, dict(snapshot.binding), changes.mapped, changes)


def read_all(snapshot: Snapshot) -> bytes:
    """Return the content of a snapshot."""
    buffer = mmap.mmap(-1, snapshot.size)
    with snapshot.open_reader() as fd:
        assert os.preadv(fd, [buffer], 0) == snapshot.size
    return bytes(buffer)


def rebuilt(parent: Taken | None, changes: Changes, content: bytes) -> bytes:
    """The content as it follows from the parent's and what was read."""
    before = parent.content if parent and changes.inherits else b""
    made = bytearray(before[: len(content)].ljust(len(content), b"\0"))
    for hole in changes.discarded:
        made[hole.offset : hole.end] = bytes(hole.length)
    for extent in changes.changed:
        made[extent.offset : extent.end] = content[extent.offset : extent.end]
    return bytes(made)


@dataclass
class Disturbed:
    """A volume of a group, what was done to it since its last backup, and that backup."""

    pool: ThinPool
    name: str
    stays: bool
    touched: list[tuple[int, int]] = field(default_factory=list)
    last: Taken | None = None

    @property
    def node(self) -> str:
        """Its node."""
        return self.pool.node(self.name)

    @property
    def full_name(self) -> str:
        """``VG/LV``."""
        return f"{self.pool.group}/{self.name}"

    @property
    def bases(self) -> list[str]:
        """The names of what stayed of it."""
        text = tool("lvs", "--noheadings", "-o", "lv_name,lv_tags", self.pool.group)
        uuid = tool("lvs", "--noheadings", "-o", "lv_uuid", self.full_name).strip()
        return [line.split()[0] for line in text.splitlines() if f"blocksnap-base.{OWNER}.{uuid}" in line]

    def write(self, offset: int, data: bytes) -> None:
        """Write, through to the medium."""
        write_at(self.node, offset, data)
        self.touched.append((offset, len(data)))

    def rewrite(self, offset: int, length: int) -> None:
        """Write what is there already."""
        with open(self.node, "rb") as device:
            device.seek(offset)
            data = device.read(length)
        self.write(offset, data)

    def discard(self, offset: int, length: int) -> None:
        """Discard, and the kernel unmaps the whole chunks in it."""
        tool("blkdiscard", "--offset", str(offset), "--length", str(length), self.node)
        self.touched.append((offset, length))

    def resize(self, size: int) -> None:
        """Grow or shrink; the smaller of the two ends is where it may differ from."""
        before = int(tool("blockdev", "--getsize64", self.node))
        tool("lvresize", "-f", "-y", "-L", f"{size}b", self.full_name)
        end = min(before, size)
        self.touched.append((end - 1, max(before, size) - end + 1))


class Group:
    """Volumes that are disturbed and backed up together."""

    def __init__(self, volumes: Sequence[Disturbed], state: Path, chunk_size: int) -> None:
        self.volumes = tuple(volumes)
        self.state = state
        self.chunk_size = chunk_size
        self.count = 0

    def take(self, methods: Sequence[str] = ("thin-time", "thin-tree"), *, bounded: bool = True) -> list[str]:
        """Back all up by these methods and return the reasons.

        ``bounded``: no more may be read than the chunks that were touched.
        """
        self.count += 1
        run = f"{os.getpid():x}g{self.count}"
        resolved = [resolve_volume(each.full_name) for each in self.volumes]
        reasons = []
        decisions = [BaseDecision(each.stays, "the test wants it") for each in self.volumes]
        with SnapshotSession(resolved, run, self.state) as session:
            for each, method, volume, snapshot in zip(
                self.volumes, methods, resolved, session.snapshots, strict=True
            ):
                taken = take_one(session, volume, snapshot, each.last)
                assert taken.changes.method == method, taken.changes.reason
                if taken.changes.inherits and bounded:
                    self._check_bounds(each, taken)
                if method == "thin-tree":
                    self._check_against_times(snapshot, each.last, taken)
                taken.binding |= BaseDecision(each.stays, "the test wants it").to_binding()
                reasons.append(taken.changes.reason)
                each.last, each.touched = taken, []
            session.committing()
            session.settle(OWNER, decisions)
        assert session.warnings == []
        for each in self.volumes:
            assert len(each.bases) == (1 if each.stays else 0)
        return reasons

    def _check_bounds(self, of: Disturbed, taken: Taken) -> None:
        size = len(taken.content)
        inside = ((at, min(length, size - at)) for at, length in of.touched if at < size)
        most = ExtentList.of(inside).align(self.chunk_size, limit=size)
        for found in (taken.changes.changed, taken.changes.discarded):
            assert found.intersect(most).total == found.total, (of.name, of.touched, found)

    def _check_against_times(self, snapshot: Snapshot, parent: Taken | None, by_tree: Taken) -> None:
        """The same snapshot, told by the times: never less, and the same set of mapped chunks."""
        assert parent is not None
        blind = replace(parent, binding={**parent.binding, "run": "another", "base_kept": False})
        by_time = snapshot.find_changes(blind.parent(known_here=True))
        if by_time.method == "thin-time":
            assert by_time.mapped == by_tree.changes.mapped
            assert by_time.discarded == by_tree.changes.discarded
            changed = by_tree.changes.changed
            assert changed.intersect(by_time.changed).total == changed.total
