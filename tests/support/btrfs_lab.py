"""A btrfs of a test's own, on a loop device, with a subvolume to work in and snapshots beside it."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from support import btrfs_calls as calls
from support.loops import RELEASE_SECONDS, call, loop_device, unmount
from support.require import require

MOUNTS: dict[str, str] = {
    "plain": "relatime",
    "noatime": "noatime",
    "strictatime": "strictatime",
    "zstd": "noatime,compress=zstd",
    "lzo": "noatime,compress-force=lzo",
    "nodatacow": "noatime,nodatacow",
}
"""Mount options under which btrfs stores data differently, by a short name."""


def require_btrfs() -> None:
    """Skip the test, or fail it where btrfs is demanded, when there is no btrfs to be had."""
    ready = os.geteuid() == 0 and shutil.which("mkfs.btrfs") is not None
    require("btrfs", ready and "btrfs" in Path("/proc/filesystems").read_text(), "no btrfs, or not root")


@dataclass(slots=True)
class BtrfsLab:
    """A mounted btrfs: ``live`` is the subvolume in use, snapshots are made beside it."""

    device: str
    mount: Path
    options: str
    _count: int = field(default=0, repr=False)

    @property
    def live(self) -> Path:
        """The subvolume that changes."""
        return self.mount / "live"

    def snapshot(self, name: str | None = None) -> Path:
        """Make a read-only snapshot of ``live``."""
        self._count += 1
        path = self.mount / (name or f"snapshot-{self._count}")
        calls.snapshot(str(self.live), str(path))
        return path

    def delete(self, snapshot: Path) -> None:
        """Delete a snapshot."""
        calls.delete_subvolume(str(snapshot))

    def sync(self) -> None:
        """Commit the running transaction."""
        fd = os.open(self.mount, os.O_RDONLY)
        try:
            calls.sync_filesystem(fd)
        finally:
            os.close(fd)

    def cycle(self, options: str | None = None) -> None:
        """Unmount and mount again: with other options, with cold caches, with inode numbers used anew."""
        self.options = options or self.options
        with self.unmounted():
            pass

    @contextmanager
    def unmounted(self) -> Iterator[None]:
        """Unmount it, everywhere, for as long as the block lasts.

        What another test began meanwhile may have a copy of all mounts for an instant.
        """
        used = Path("/sys/fs/btrfs", call("blkid", "-o", "value", "-s", "UUID", self.device).strip())
        unmount(self.mount)
        deadline = time.monotonic() + RELEASE_SECONDS
        while used.exists():
            assert time.monotonic() < deadline, f"{self.device} is mounted elsewhere"
            time.sleep(0.02)
        yield
        call("mount", "-o", self.options, self.device, self.mount)


@contextmanager
def btrfs_lab(
    folder: Path, *, mount: str = "noatime", size: int = 512 << 20, mkfs: str = ""
) -> Iterator[BtrfsLab]:
    """Make a filesystem in a file in ``folder`` and mount it; all of it is gone afterwards.

    ``mount`` is a name in MOUNTS or mount options; ``mkfs`` are options of mkfs.btrfs.
    """
    options = MOUNTS.get(mount, mount)
    image, point = folder / "btrfs.img", folder / "btrfs"
    point.mkdir(exist_ok=True)
    try:
        with loop_device(image, size=size) as device:
            call("mkfs.btrfs", "-q", "-f", *mkfs.split(), device)
            call("mount", "-o", options, device, point)
            try:
                calls.create_subvolume(str(point / "live"))
                yield BtrfsLab(device, point, options)
            finally:
                unmount(point)
    finally:
        image.unlink(missing_ok=True)
