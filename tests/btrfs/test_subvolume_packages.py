"""Real trees, changed by dpkg between backups: what is restored equals the snapshot for rsync, file by file.

With ``BLOCKSNAP_SOAK`` it is all of /usr, and packages of Debian (``BLOCKSNAP_PACKAGES``) that apt fetches;
else a part of it, and packages that are made here.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.btrfs_lab import BtrfsLab, btrfs_lab, require_btrfs
from support.commands import CommandLine
from support.file_trees import rsync_differences
from support.loops import call, loop_device, mounted
from support.require import require

SOAK = bool(os.environ.get("BLOCKSNAP_SOAK"))
PACKAGES = os.environ.get("BLOCKSNAP_PACKAGES", "hello cowsay sl figlet").split()
PARTS = ("/usr",) if SOAK else ("/usr/share/zoneinfo",)
SIZE = (40 << 30) if SOAK else (1 << 30)


@pytest.fixture
def lab(tmp_path: Path) -> Iterator[BtrfsLab]:
    require_btrfs()
    require("dpkg", shutil.which("dpkg") is not None, "no dpkg")
    with btrfs_lab(tmp_path, mount="noatime,compress=zstd", size=SIZE) as found:
        yield found


@pytest.fixture
def elsewhere(tmp_path: Path) -> Iterator[Path]:
    with loop_device(tmp_path / "else.img", size=SIZE) as device:
        call("mkfs.ext4", "-q", "-i", "8192", device)
        with mounted(device, tmp_path / "elsewhere") as folder:
            yield folder


def packages(folder: Path) -> list[Path]:
    """Return packages: fetched, or made of some files, directories and links."""
    folder.mkdir()
    if SOAK:
        subprocess.run(["apt-get", "download", *PACKAGES], cwd=folder, check=True, capture_output=True)
        return sorted(folder.glob("*.deb"))
    for name in ("one", "two", "three"):
        root = folder / name
        (root / "DEBIAN").mkdir(parents=True)
        (root / "DEBIAN" / "control").write_text(
            f"Package: {name}\nVersion: 1\nArchitecture: all\nMaintainer: x <x@y>\nDescription: test\n"
        )
        for number in range(40):
            path = root / "usr" / "share" / name / f"{number % 5}" / f"{number}"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(os.urandom(number * 700))
        (root / "usr" / "sbin").mkdir()
        (root / "usr" / "sbin" / name).symlink_to(f"../share/{name}/0/0")
        call("dpkg-deb", "--build", root, folder / f"{name}.deb")
    return sorted(folder.glob("*.deb"))


def dpkg(root: Path, *arguments: str | Path) -> None:
    admin = root / "var" / "lib" / "dpkg"
    for each in ("info", "updates", "triggers", "parts"):
        (admin / each).mkdir(parents=True, exist_ok=True)
    for each in ("status", "available"):
        (admin / each).touch()
    call("dpkg", f"--instdir={root}", f"--admindir={admin}", "--force-depends", "--force-confnew", *arguments)


@pytest.mark.timeout(7200 if SOAK else 900)
def test_packages_come_and_go(lab: BtrfsLab, elsewhere: Path, tmp_path: Path) -> None:
    for part in PARTS:
        target = lab.live / part.lstrip("/")
        target.parent.mkdir(parents=True, exist_ok=True)
        call("cp", "--archive", "--one-file-system", part, target)
    blocksnap = CommandLine(tmp_path)
    blocksnap.done("init", "--no-encryption")
    debs = packages(tmp_path / "packages")
    steps = [
        [],
        *(["--install", deb] for deb in debs),
        ["--remove", debs[0].name.split("_")[0].split(".")[0]],
    ]
    for number, step in enumerate(steps):
        if step:
            dpkg(lab.live, *step)
        (backup,) = blocksnap.done("backup", "--json", lab.live).backups
        assert backup["method"] == ("btrfs-tree" if number else "compare"), backup["reason"]
        print(f"{step}: {backup['read_bytes']} read, {backup['stored_bytes']} stored, {backup['seconds']} s")
        snapshot, back = lab.snapshot(), lab.mount / "back"
        blocksnap.done("restore", "latest", back)
        assert rsync_differences(snapshot, back) == "", step
        if number == len(steps) - 1:
            outcome = blocksnap("restore", "--verify", "latest", elsewhere / "back")
            assert outcome.code == 0, outcome.stderr
            assert rsync_differences(snapshot, elsewhere / "back") == "", step
        for path in (snapshot, back):
            lab.delete(path)
    blocksnap.done("check", "--read-data")
