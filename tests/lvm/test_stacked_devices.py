"""Partitions, LUKS containers and arrays, cold: backed up, compared, restored; in use, told why not."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from support.in_process import InProcess
from support.loops import call_until_done, detach, loop_device
from support.lvm_lab import scratch_disks, tool, write_at
from support.require import require

MIB = 1 << 20
CHUNK = 128 << 10
PARTITIONS = b"label: gpt\n,24M\n,24M\n"
MAPPING = "blocksnap-opened"
OPENED = f"/dev/mapper/{MAPPING}"
ARRAY = "/dev/md42"


def partition(disk: str) -> list[str]:
    subprocess.run(["sfdisk", "--quiet", disk], input=PARTITIONS, check=True)
    # Without it, udev's own reading and ours get into each other's way.
    tool("udevadm", "settle")
    infix = "p" if disk[-1].isdigit() else ""
    return [f"{disk}{infix}{number}" for number in (1, 2)]


@pytest.fixture
def parts(_lab: None) -> Iterator[list[str]]:
    """Two partitions of 24 MiB on a disk."""
    disk = scratch_disks()[0]
    made = partition(disk)
    yield made
    for part in made:
        write_at(part, 0, bytes(MIB))
    size = int(tool("blockdev", "--getsize64", disk))
    for offset in (0, size - MIB):
        write_at(disk, offset, bytes(MIB))
    # Who looks at the partitions that were written to keeps them for a moment.
    call_until_done("blockdev", "--rereadpt", disk)
    tool("udevadm", "settle")


@contextmanager
def opened(device: str, *, make: bool = False) -> Iterator[str]:
    """A LUKS container that is open."""
    require("cryptsetup", shutil.which("cryptsetup") is not None, "cryptsetup-bin is not installed")
    tool("modprobe", "-a", "dm-crypt", "algif_skcipher", "xts")
    cheap = ("--pbkdf", "pbkdf2", "--pbkdf-force-iterations", "1000")
    if make:
        secretly("luksFormat", *cheap, device)
    secretly("open", device, MAPPING)
    try:
        yield OPENED
    finally:
        tool("udevadm", "settle")
        call_until_done("cryptsetup", "close", MAPPING)


def secretly(*words: str) -> None:
    subprocess.run(["cryptsetup", "--batch-mode", *words], input=b"secret", check=True, capture_output=True)


@contextmanager
def array(devices: list[str]) -> Iterator[str]:
    """A mirror of two devices."""
    require("md", shutil.which("mdadm") is not None, "mdadm is not installed")
    tool("modprobe", "raid1")
    tool("mdadm", "--create", ARRAY, "--run", "--level=1", "--metadata=1.2", "--raid-devices=2", *devices)
    try:
        yield ARRAY
    finally:
        tool("udevadm", "settle")
        call_until_done("mdadm", "--stop", ARRAY)
        tool("mdadm", "--zero-superblock", *devices)


def listed(blocksnap: InProcess, device: str) -> dict[str, Any]:
    tool("udevadm", "settle")
    found: list[dict[str, Any]] = json.loads(blocksnap.done("volumes", "--json"))["volumes"]
    return next(each for each in found if each["name"] == os.path.realpath(device))


def go_round(blocksnap: InProcess, device: str, *, offset: int) -> None:
    """A full backup, one of what changed, and both states back; at ``offset`` anything may be."""
    luck = random.Random(device)
    write_at(device, offset, luck.randbytes(2 * MIB))
    first = blocksnap.backup(device)
    assert (first["kind"], first["method"], first["volume_kind"]) == ("full", "compare", "device")
    before = Path(device).read_bytes()
    assert first["volume_bytes"] == len(before)
    write_at(device, offset + MIB, luck.randbytes(4096))
    second = blocksnap.backup(device)
    assert (second["kind"], second["method"]) == ("incremental", "compare")
    assert 0 < second["changed_bytes"] <= CHUNK
    after = Path(device).read_bytes()
    write_at(device, 0, luck.randbytes(len(after)))
    for backup, content in ((first, before), (second, after)):
        blocksnap.done("restore", backup["id"], device)
        assert Path(device).read_bytes() == content


def refusal(blocksnap: InProcess, device: str) -> str:
    code, _, err = blocksnap("backup", device)
    assert code == 14
    return err


def test_partitions(parts: list[str], blocksnap: InProcess, tmp_path: Path) -> None:
    go_round(blocksnap, parts[1], offset=0)
    assert (listed(blocksnap, parts[1])["kind"], listed(blocksnap, parts[1])["supported"]) == (
        "partition",
        True,
    )
    with loop_device(tmp_path / "disk", size=56 * MIB) as disk:
        detach(disk)
        tool("losetup", "--partscan", disk, str(tmp_path / "disk"))
        go_round(blocksnap, partition(disk)[1], offset=0)


def test_a_container_closed_and_open(parts: list[str], blocksnap: InProcess) -> None:
    with opened(parts[0], make=True) as device:
        go_round(blocksnap, device, offset=0)
        write_at(device, 0, b"inside")
        assert (listed(blocksnap, device)["kind"], listed(blocksnap, device)["supported"]) == (
            "opened LUKS",
            True,
        )
        # What is below may be written to at any moment.
        below = listed(blocksnap, parts[0])
        assert (below["kind"], below["supported"]) == ("LUKS container", False)
        node = os.path.realpath(device)
        assert node in below["obstacle"] or MAPPING in below["obstacle"]
        assert "back up what lies on it" in below["advice"]
        assert "in use" in refusal(blocksnap, parts[0])
    go_round(blocksnap, parts[0], offset=20 * MIB)
    with opened(parts[0]) as device, open(device, "rb") as file:
        assert file.read(6) == b"inside"


def test_an_array(parts: list[str], blocksnap: InProcess) -> None:
    with array(parts) as device:
        go_round(blocksnap, device, offset=0)
        assert (listed(blocksnap, device)["kind"], listed(blocksnap, device)["supported"]) == ("md", True)
        below = listed(blocksnap, parts[0])
        assert below["supported"] is False
        assert below["advice"] == f"back up what lies on it ({ARRAY}), or end that for the time of the backup"
        assert "in use" in refusal(blocksnap, parts[0])
