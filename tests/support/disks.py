"""Disks in files: tables of partitions with filesystems in them, and tables that cannot be right."""

from __future__ import annotations

import hashlib
import random
import struct
import subprocess
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from support.loops import call, loop_device, mounted

MIB = 1 << 20
SECTOR = 512
# Placed by sfdisk from 1 MiB on; an extended partition takes what its logical ones and their lists need.
GPT = ("ext4", "xfs", "LVM2_member", "btrfs", "crypto_LUKS")
SIZES = {"ext4": 32, "xfs": 304, "btrfs": 112, "LVM2_member": 8, "crypto_LUKS": 20, "swap": 4, "": 2}


@contextmanager
def part_of(image: Path, offset: int, size: int) -> Iterator[str]:
    """Attach a part of a file to a loop device."""
    with loop_device(image, "--offset", str(offset), "--sizelimit", str(size)) as device:
        yield device


def make_disk(image: Path, script: str, contents: Sequence[str]) -> dict[str, dict[str, str]]:
    """Make a disk whose partitions of these numbers, from 1, hold this; return the digests of their files."""
    with image.open("wb") as file:
        file.truncate((8 + sum(SIZES[content] + 2 for content in contents)) * MIB)
    subprocess.run(["sfdisk", "--quiet", image], input=script.encode(), check=True)
    pairs = call("partx", "--raw", "--noheadings", "--output", "NR,START,SECTORS", image)
    places = {int(a): (int(b) * SECTOR, int(c) * SECTOR) for a, b, c in map(str.split, pairs.splitlines())}
    digests = {}
    for number, content in enumerate(contents, 1):
        if content:
            with part_of(image, *places[number]) as device:
                digests[f"p{number}"] = _fill(device, content, image.parent / f"work{number}")
    return {name: found for name, found in digests.items() if found}


def make_gpt(image: Path) -> dict[str, dict[str, str]]:
    """Make a disk with all of GPT in it."""
    sizes = "".join(f"size={SIZES[content]}MiB\n" for content in GPT)
    return make_disk(image, f"label: gpt\n{sizes}", GPT)


def make_mbr(image: Path) -> dict[str, dict[str, str]]:
    """Make a disk with ext4 in a primary partition (p1) and in a logical one (p6), and swap before that."""
    script = (
        "label: dos\nsize=32MiB\nsize=42MiB,type=5\nsize=2MiB\nsize=2MiB\nsize=4MiB,type=82\nsize=32MiB\n"
    )
    return make_disk(image, script, ("ext4", "", "", "", "swap", "ext4"))


def _fill(device: str, content: str, folder: Path) -> dict[str, str]:
    if content == "LVM2_member":
        with Path(device).open("r+b") as file:
            file.seek(SECTOR)
            file.write(lvm_label())
        return {}
    if content == "crypto_LUKS":
        with Path(device).open("r+b") as file:
            file.write(b"LUKS\xba\xbe" + struct.pack(">H", 1) + bytes(160) + b"0" * 36)
        return {}
    if content == "swap":
        call("mkswap", device)
        return {}
    call(f"mkfs.{content}", "-q", device)
    dice, digests = random.Random(device + content), {}
    with mounted(device, folder) as root:
        (root / "etc").mkdir()
        for name in ("etc/fstab", "etc/app.conf", "data"):
            text = dice.randbytes(dice.randrange(MIB))
            (root / name).write_bytes(text)
            digests[name] = hashlib.sha256(text).hexdigest()
    return digests


def lvm_label() -> bytes:
    """Return the second sector of a physical volume (lib/label/label.h of LVM2; its CRC is not inverted)."""
    covered = struct.pack("<I8s", 32, b"LVM2 001") + b"a" * 32
    covered = covered.ljust(SECTOR - 20, b"\0")
    crc = zlib.crc32(covered, 0xF597A6CF ^ 0xFFFFFFFF) ^ 0xFFFFFFFF
    return b"LABELONE" + struct.pack("<QI", 1, crc) + covered


def boot_sector(entries: Sequence[tuple[int, int, int]]) -> bytes:
    """Return a sector with a list of up to four partitions: type, first sector, sectors."""
    rows = b"".join(struct.pack("<4xB3xII", *entry) for entry in entries)
    return bytes(446) + rows.ljust(64, b"\0") + b"\x55\xaa"


def make_sectors(image: Path, size: int, sectors: dict[int, bytes]) -> None:
    """Make a disk of zeros with these sectors."""
    with image.open("wb") as file:
        file.truncate(size)
        for number, content in sectors.items():
            file.seek(number * SECTOR)
            file.write(content)
