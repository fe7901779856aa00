"""Volumes of this host's own kernel: files and devices, on filesystems made for the tests."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))

from support.loops import call, loop_device, mounted
from support.require import require
from support.xfs_work import xfs


@pytest.fixture(scope="session", autouse=True)
def _loops() -> None:
    able = os.geteuid() == 0 and Path("/dev/loop-control").exists()
    require("loop", able, "loop devices need root and /dev/loop-control")


@pytest.fixture(scope="module")
def on_xfs(_loops: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with xfs(tmp_path_factory.mktemp("xfs")) as folder:
        yield folder


@pytest.fixture(scope="module")
def on_btrfs(_loops: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    place = tmp_path_factory.mktemp("btrfs")
    with loop_device(place / "btrfs.img", size=2 << 30) as device:
        call("mkfs.btrfs", "-q", device)
        with mounted(device, place / "mnt") as folder:
            yield folder


@pytest.fixture(scope="module")
def on_ext4(_loops: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    place = tmp_path_factory.mktemp("ext4")
    with loop_device(place / "ext4.img", size=160 << 20) as device:
        call("mkfs.ext4", "-q", device)
        with mounted(device, place / "mnt") as folder:
            yield folder
