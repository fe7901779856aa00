# SPDX-License-Identifier: Apache-2.0
"""The kinds of volumes as the conformance suite sees them."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
from pathlib import Path

from blocksnap.volumes.base import Snapshot, is_tree
from blocksnap.volumes.image import FOLDER
from blocksnap.volumes.subvolume import PREFIX
from support import btrfs_calls
from support.classic_volume import ClassicVolume, make_volume
from support.conformance import MIB, SIZE, Kind
from support.file_ioctls import clone_file, dedupe_range, opened, set_immutable
from support.file_trees import rsync_differences
from support.in_process import InProcess
from support.loops import call
from support.lvm_lab import ThinPool, tool


def fill(kind: Kind) -> None:
    """Write to the first half of a volume."""
    kind.write(0, random.Random(kind.name).randbytes(SIZE // 2))


def share_equal_blocks(path: Path, other: Path) -> None:
    """Copy the beginning of a file, and have it let go of its own bytes for those of the copy."""
    with open(path, "rb") as file:
        other.write_bytes(file.read(2 * MIB))
    with opened(other, os.O_RDWR) as source, opened(path, os.O_RDWR) as target:
        os.fsync(source)
        assert dedupe_range(source, target, 0, 2 * MIB, 0) == 2 * MIB


class FileKind(Kind):
    """A file on a filesystem without reflinks."""

    has_snapshots = False

    def __init__(self, path: Path) -> None:
        self.name, self.path = str(path), path
        path.touch()
        os.truncate(path, SIZE)

    def ours(self) -> list[str]:
        return []

    def resize(self, size: int) -> None:
        os.truncate(self.path, size)


class DeviceKind(Kind):
    """A loop device that nobody uses."""

    has_snapshots = False

    def __init__(self, device: str, image: Path) -> None:
        self.name, self.path = device, Path(device)
        self._image = image

    def ours(self) -> list[str]:
        return []

    def resize(self, size: int) -> None:
        os.truncate(self._image, size)
        call("losetup", "--set-capacity", self.name)

    def write_meanwhile(self) -> None:
        # Whoever wants to write to a device that is held, to mount it for one, is refused.
        os.close(os.open(self.path, os.O_RDWR | os.O_EXCL))


class ImageKind(Kind):
    """A file on XFS or btrfs."""

    options = ("--base", "keep")
    bases = 1

    def __init__(self, path: Path, tracked: str) -> None:
        self.name, self.path, self.tracked = str(path), path, tracked
        path.touch()
        os.truncate(path, SIZE)

    def ours(self) -> list[str]:
        folder = self.path.parent / FOLDER
        return [each.name for each in folder.glob("clone-*") if each.suffix != ".base"]

    def lose(self, name: str) -> None:
        clone = self.path.parent / FOLDER / name
        set_immutable(clone, immutable=False)
        clone.unlink()

    def break_identity(self) -> str:
        (base,) = self.ours()
        for immutable in (False, True):
            set_immutable(self.path.parent / FOLDER / base, immutable=immutable)
        return "attributes changed since the parent backup"

    def resize(self, size: int) -> None:
        os.truncate(self.path, size)

    def disturb(self, chance: random.Random) -> None:
        """Move its bytes, or let another file share them for a while."""
        chosen = chance.choice(("move", "share", "copy", "dedupe"))
        other = self.path.parent / "other"
        if chosen == "dedupe":
            share_equal_blocks(self.path, other)
        elif chosen == "move" and self.tracked == "fiemap":
            subprocess.run(["xfs_fsr", self.path], check=False, capture_output=True)
        elif chosen == "move":
            call("btrfs", "filesystem", "defragment", "-f", self.path)
            call("btrfs", "balance", "start", "-dusage=90", self.path.parent)
        elif chosen == "share":
            with opened(self.path) as source, opened(other, os.O_RDWR | os.O_CREAT) as target:
                clone_file(source, target)
        else:
            other.write_bytes(self.content()[: 2 * MIB])
            with opened(other) as source, opened(self.path, os.O_RDWR) as target:
                os.copy_file_range(source, target, MIB, 0, 0)


class SubvolumeKind(Kind):
    """A btrfs subvolume with one file in it."""

    tracked = "btrfs-tree"
    in_place = False

    def __init__(self, path: Path, state: Path) -> None:
        """``state`` is where blocksnap remembers which runs of this host were committed."""
        self._top, self._state = path, state
        self.name, self.path = str(path), path / "disk.img"
        btrfs_calls.create_subvolume(self.name)
        self.path.touch()
        os.truncate(self.path, SIZE)

    def ours(self) -> list[str]:
        # The filesystem is mounted whole, and this subvolume at its top.
        return [name for name in os.listdir(self._top.parent) if name.startswith(PREFIX)]

    def lose(self, name: str) -> None:
        btrfs_calls.delete_subvolume(str(self._top.parent / name))

    def break_identity(self) -> str:
        shutil.rmtree(self._state)
        return "no record of the parent backup"

    def resize(self, size: int) -> None:
        os.truncate(self.path, size)

    def disturb(self, chance: random.Random) -> None:
        """Move its bytes, let another file share them, or let it be replaced by one that is like it."""
        chosen = chance.choice(("move", "dedupe", "replace"))
        other = self._top.parent / "other"
        if chosen == "move":
            call("btrfs", "filesystem", "defragment", "-f", self.path)
            call("btrfs", "balance", "start", "-dusage=90", self._top.parent)
        elif chosen == "dedupe":
            share_equal_blocks(self.path, other)
        else:
            call("cp", "--archive", "--reflink=always", self.path, f"{self.path}.new")
            os.replace(f"{self.path}.new", self.path)

    def read(self, snapshot: Snapshot) -> bytes:
        assert is_tree(snapshot)
        with os.fdopen(snapshot.open_file(self.path.stat().st_ino), "rb") as file:
            return file.read()

    def restored(self, blocksnap: InProcess) -> bytes:
        place = self._top.parent / "restored"
        try:
            return self.restored_to(blocksnap, place)
        finally:
            btrfs_calls.delete_subvolume(str(place))

    def restored_to(self, blocksnap: InProcess, place: Path) -> bytes:
        blocksnap.done("restore", "latest", place, "--verify")
        assert rsync_differences(self._top, place) == ""
        return (place / self.path.name).read_bytes()

    def close(self) -> None:
        """Delete it, and what it shared bytes with."""
        btrfs_calls.delete_subvolume(self.name)
        (self._top.parent / "other").unlink(missing_ok=True)


class ThinKind(Kind):
    """A thin volume, with nothing left on the pool or with a base."""

    can_shrink = True

    def __init__(self, pool: ThinPool, *, base: bool) -> None:
        self._pool = pool
        self._before = set(pool.names()) | {"data"}
        self.name, self.path = pool.create("data", f"{SIZE}b"), Path(pool.node("data"))
        self.tracked = "thin-tree" if base else "thin-time"
        self.options = ("--base", "keep") if base else ()
        self.bases = 1 if base else 0

    def ours(self) -> list[str]:
        return self._pool.snapshots()

    def lose(self, name: str) -> None:
        self._pool.remove(name)

    def break_identity(self) -> str:
        """Revert it to a snapshot that is like it."""
        tool("lvcreate", "-s", "-n", "theirs", self.name)
        tool("lvchange", "-an", self.name)
        tool("lvconvert", "--merge", f"{self._pool.group}/theirs")
        tool("lvchange", "-ay", self.name)
        for name in self.ours():
            self.lose(name)
        return "device"

    def resize(self, size: int) -> None:
        tool("lvresize", "-f", "-y", "-L", f"{size}b", self.name)

    def disturb(self, chance: random.Random) -> None:
        """Take a snapshot of it that somebody else wants, and remove it."""
        if chance.random() < 0.5:
            tool("lvcreate", "-s", "-n", "theirs", self.name)
            self._pool.remove("theirs")

    def close(self) -> None:
        """Remove it, and all that came of it."""
        self._pool.remove(*(set(self._pool.names()) - self._before), "data")


class ClassicKind(Kind):
    """A classic volume with a base."""

    options = ("--base", "keep")
    tracked = "cow"
    bases = 1
    can_shrink = False

    def __init__(self, group: str, kind: str = "linear") -> None:
        make_volume(group, "data", SIZE, kind)
        self._volume = ClassicVolume(group, "data")
        self.name, self.path = f"{group}/data", Path(self._volume.node)

    def ours(self) -> list[str]:
        words = ("--noheadings", "-o", "lv_name", "--select", "lv_tags=blocksnap")
        return tool("lvs", *words, self._volume.group).split()

    def lose(self, name: str) -> None:
        self._volume.remove(name)

    def break_identity(self) -> str:
        (base,) = self.ours()
        tool("lvchange", "-prw", f"{self._volume.group}/{base}")
        return "can be written to"

    def resize(self, size: int) -> None:
        tool("lvchange", "-an", self.name)
        tool("lvextend", "-L", f"{size}b", self.name)
        tool("lvchange", "-ay", self.name)

    def close(self) -> None:
        """Remove it and its snapshots."""
        tool("lvremove", "-ff", "-y", self.name)
