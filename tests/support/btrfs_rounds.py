"""Round after round: a random load, a snapshot, its changes as the engine tells them, and the truth.

What the engine answers is applied to records that never see the snapshots themselves (btrfs_model); they have
to stay equal to what reading everything finds.
"""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from blocksnap.extents.btrfs import SubvolumeParent, find_subvolume_changes
from blocksnap.extents.btrfs_identity import BtrfsIdentity
from blocksnap.extents.btrfs_witnesses import to_binding
from blocksnap.system.btrfs import filesystem_info, open_subvolume, subvolume_info
from support.btrfs_lab import BtrfsLab
from support.btrfs_model import Backup, Tally
from support.btrfs_reference import read_extents
from support.btrfs_truth import capture
from support.btrfs_work import Workload


@contextmanager
def opened(snapshot: Path) -> Iterator[int]:
    """Open a snapshot as the product does."""
    fd = open_subvolume(str(snapshot))
    try:
        yield fd
    finally:
        os.close(fd)


class Rounds:
    """Backups of one subvolume, one after the other.

    With ``keep_base`` the snapshot of a round stays until the next one; otherwise it is deleted, and only
    what was remembered of it is left. ``reused`` counts extents at an address that an extent of another
    generation had in an earlier round.
    """

    def __init__(self, lab: BtrfsLab, seed: int, *, keep_base: bool) -> None:
        self.lab = lab
        self.tally = Tally()
        self.reused = 0
        self._work = Workload(lab.live, seed, beside=lab.mount)
        self._random = random.Random(seed)
        self._keep_base = keep_base
        self._backup = Backup(from_memory=not keep_base)
        self._binding: dict[str, object] = {}
        self._base: Path | None = None
        self._addresses: dict[int, int] = {}

    def run(self, count: int, *, operations: int = 15) -> None:
        """Do some rounds."""
        for _ in range(count):
            self._work.run(self._random.randrange(1, 2 * operations))
            self.back_up()

    def back_up(self) -> None:
        """Take a snapshot and apply its changes."""
        snapshot = self.lab.snapshot()
        parent = (
            SubvolumeParent(self._binding, known_here=True, memory=self._backup)  # type: ignore[arg-type]
            if self._binding
            else None
        )
        with opened(snapshot) as fd:
            if self._base is None:
                answer = find_subvolume_changes(fd, parent)
            else:
                with opened(self._base) as base_fd:
                    answer = find_subvolume_changes(fd, parent, base_fd)
                    answer = replace(answer, walk=iter(list(answer.walk)))
            assert answer.inherits == bool(self._binding), answer.reason
            self.tally.add(self._backup.update(answer, capture(snapshot)))
            identity = BtrfsIdentity.of(filesystem_info(fd), subvolume_info(fd))
            self._binding = {**identity.to_binding(), **to_binding(answer.witnesses)}
        self._note_addresses()
        for old in [self._base] if self._keep_base else [snapshot]:
            if old is not None:
                self.lab.delete(old)
        self._base = snapshot if self._keep_base else None
        if self._random.random() < 0.3:
            # Frees the blocks of what was deleted, so that they are used again.
            self.lab.sync()

    def close(self) -> None:
        """Close what the load keeps open."""
        self._work.close()

    def remount(self, options: str) -> None:
        """Mount the filesystem anew with other options."""
        self._work.close()
        self.lab.cycle(options)

    def _note_addresses(self) -> None:
        for record in self._backup.records.values():
            if record.content:
                for extent in read_extents(record.state):
                    if extent.kind == "regular":
                        before = self._addresses.setdefault(extent.address, extent.generation)
                        if before != extent.generation:
                            self._addresses[extent.address] = extent.generation
                            self.reused += 1
