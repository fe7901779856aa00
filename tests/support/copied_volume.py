"""A volume on a loop device whose snapshot is a copy, made while its filesystem is frozen."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from blocksnap.system import freeze
from blocksnap.volumes.base import Ledger, SnapshotTiming
from support.loops import call, loop_device
from support.standing import holding


class CopiedVolume:
    """An ext4 in a file, mounted; ``meanwhile`` is called right after each snapshot."""

    # Of those kinds LVM is not asked about leftovers.
    kind = "device"

    def __init__(self, folder: Path, name: str, size: int, stack: ExitStack) -> None:
        self.name, self.key, self.size = name, f"key:{name}", size
        self.image, self.copy = folder / f"{name}.img", folder / f"{name}.snapshot"
        device = stack.enter_context(loop_device(self.image, size=size))
        call("mkfs.ext4", "-q", device)
        self.device = device
        self.folder = stack.enter_context(holding(device, folder / name))
        self.folder.chmod(0o755)
        self.snapshot_device = os.stat(device).st_rdev
        self.binding: dict[str, Any] = {}
        self.timing = SnapshotTiming(0.0, 0.0)
        self.meanwhile: Callable[[], object] = lambda: None

    def trace(self, run: str) -> dict[str, str] | None:
        return None

    def prepare(self) -> None:
        pass

    def take_snapshot(self, run: str, ledger: Ledger) -> CopiedVolume:
        fd = os.open(self.folder, os.O_RDONLY)
        try:
            freeze.freeze(fd)
            try:
                self.timing = SnapshotTiming(time.time(), 0.0)
                call("cp", "--sparse=always", self.image, self.copy)
            finally:
                freeze.thaw(fd)
        finally:
            os.close(fd)
        self.meanwhile()
        return self

    def check(self) -> None:
        pass

    def remove(self) -> None:
        pass


@contextmanager
def restored(*volumes: CopiedVolume) -> Iterator[list[Path]]:
    """The snapshots, mounted, after the volumes themselves are gone."""
    with ExitStack() as stack:
        yield [
            stack.enter_context(
                holding(
                    stack.enter_context(loop_device(each.copy)), each.copy.with_name(f"restored {each.name}")
                )
            )
            for each in volumes
        ]
