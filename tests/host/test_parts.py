"""Images that hold a part of a filesystem over several: told unless they are all of one group."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from support.commands import CommandLine
from support.loops import call, loop_device, mounted
from support.require import require
from support.xfs_work import xfs

SIZE = 320 << 20
BOTH = ["one.img", "two.img"]


@contextmanager
def filesystem(kind: str, folder: Path, point: Path) -> Iterator[str]:
    """Mount one that lies on two images; yield the device of the second."""
    with loop_device(folder / BOTH[0], size=SIZE) as one, loop_device(folder / BOTH[1], size=SIZE) as two:
        options: tuple[str, ...] = ()
        if kind == "btrfs":
            call("mkfs.btrfs", "--quiet", "--force", one, two)
            options = ("-o", f"device={two}")
        elif kind == "ext4":
            call("mke2fs", "-q", "-b", "4096", "-O", "journal_dev", two)
            call("mke2fs", "-q", "-t", "ext4", "-b", "4096", "-J", f"device={two}", one)
        else:
            call("mkfs.xfs", "-q", "-l", f"logdev={two}", one)
            options = ("-o", f"logdev={two}")
        with mounted(one, point, *options):
            yield two


@pytest.fixture
def images(tmp_path: Path) -> Iterator[Path]:
    require("xfs", "xfs" in Path("/proc/filesystems").read_text(), "no XFS")
    with xfs(tmp_path / "outer", size=1 << 30) as folder:
        yield folder


@pytest.mark.parametrize("kind", ["btrfs", "ext4", "xfs"])
def test_a_part_of_a_filesystem_is_told(
    blocksnap: CommandLine, images: Path, tmp_path: Path, kind: str
) -> None:
    one, two = (str(images / name) for name in BOTH)
    with filesystem(kind, images, tmp_path / "mnt") as device:
        wanted = (
            f"only a part of the {kind} on {tmp_path}/mnt is on {one}: the rest is on {device}, "
            "and not backed up at the same instant"
        )
        alone = blocksnap("backup", one)
        assert (alone.code, alone.stderr.count(wanted)) == (3, 1), alone
        assert "fix:     " in alone.stderr
        assert wanted in blocksnap("backup", "--dry-run", one).stderr
        # The log, or the second device, is as little without the first.
        assert f"is on {two}: the rest is on /dev/loop" in blocksnap("backup", two).stderr
        together = blocksnap.done("backup", one, two)
        assert "only a part" not in together.stderr
        configuration = tmp_path / "blocksnap.toml"
        text = f"repository = '{tmp_path}/repository'\n[jobs.a]\nvolumes = ['{one}', '{two}']\n"
        configuration.write_text(text)
        blocksnap.done("config", "check", "--config", configuration)
        configuration.write_text(text + "group = false\n")
        checked = blocksnap("config", "check", "--config", configuration)
        assert (checked.code, checked.stderr.count("only a part of")) == (3, 2)
        assert f"blocksnap.toml:3: jobs.a.volumes: {wanted}" in checked.stderr


def test_whole_filesystems_are_nobodys_part(blocksnap: CommandLine, images: Path, tmp_path: Path) -> None:
    """Beside one that spans devices too."""
    for kind, name in (("btrfs", "b.img"), ("ext4", "e.img"), ("xfs", "x.img")):
        with loop_device(images / name, size=SIZE) as device:
            call(f"mkfs.{kind}", "-q", device)
            with mounted(device, tmp_path / "whole"), filesystem("btrfs", images, tmp_path / "mnt"):
                done = blocksnap.done("backup", images / name)
        assert "only a part" not in done.stderr
