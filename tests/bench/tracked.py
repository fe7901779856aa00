"""What change tracking saves: incremental backups of a thin volume beside full compares of the same volume.

Runs in the lab (``make bench-tracked``), where there is real LVM, one slow CPU and slow system calls: the
ratio and the bytes read mean something, the seconds do not.
"""

from __future__ import annotations

import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

MIB = 1 << 20
SIZE_MIB, FILLED_MIB, ROUNDS = 2048, 1024, 3
GROUP = "bench"
NODE = f"/dev/{GROUP}/data"


def call(*argv: str) -> None:
    """Run a tool that has to succeed."""
    subprocess.run(argv, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def blocksnap(folder: Path, *arguments: str) -> tuple[float, dict[str, object]]:
    """Run a command; return its seconds and what its last event says of the backup."""
    environment = {
        **os.environ,
        "BLOCKSNAP_REPOSITORY": str(folder / "repository"),
        "BLOCKSNAP_STATE_DIRECTORY": str(folder / "state"),
        "BLOCKSNAP_CACHE": str(folder / "cache"),
        "BLOCKSNAP_PASSPHRASE": "benchmark",
    }
    argv = [sys.executable, "-m", "blocksnap", *arguments, "--json"]
    began = time.monotonic()
    out = subprocess.run(argv, check=True, env=environment, stdout=subprocess.PIPE).stdout
    seconds = time.monotonic() - began
    last = json.loads(out.splitlines()[-1]) if arguments[0] == "backup" else {}
    return seconds, last["backups"][0] if last else {}


def write(dice: random.Random, length: int, count: int) -> None:
    """Write random data at random places of the filled part."""
    fd = os.open(NODE, os.O_WRONLY)
    for _ in range(count):
        os.pwrite(fd, dice.randbytes(length), dice.randrange(FILLED_MIB * MIB - length) // 4096 * 4096)
    os.fsync(fd)
    os.close(fd)


def measure(folder: Path) -> dict[str, list[tuple[float, dict[str, object]]]]:
    """Back up by tracking, by comparing everything, and unchanged, in turns."""
    dice = random.Random(1)
    results: dict[str, list[tuple[float, dict[str, object]]]] = {
        "tracked": [],
        "compared": [],
        "unchanged": [],
    }
    for _ in range(ROUNDS):
        write(dice, 64 << 10, 160)
        results["tracked"].append(blocksnap(folder, "backup", f"{GROUP}/data"))
        results["unchanged"].append(blocksnap(folder, "backup", f"{GROUP}/data"))
        write(dice, 64 << 10, 160)
        results["compared"].append(blocksnap(folder, "backup", "--full", f"{GROUP}/data"))
    return results


def main() -> None:
    """Make the volume, measure, and print the table of docs/benchmarks.md."""
    disks = os.environ["LAB_DISKS"].split(":")
    call("vgcreate", "-y", GROUP, *disks)
    call("lvcreate", "-y", "-L", "4G", "-T", f"{GROUP}/pool")
    call("lvcreate", "-y", "-V", f"{SIZE_MIB}M", "-T", f"{GROUP}/pool", "-n", "data")
    dice = random.Random(0)
    with open(NODE, "wb", buffering=0) as device:
        repeated = bytes(range(256)) * (4 * MIB // 256)
        device.writelines(dice.randbytes(4 * MIB) + repeated for _ in range(FILLED_MIB // 8))
        os.fsync(device.fileno())
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        blocksnap(folder, "init")
        seconds, first = blocksnap(folder, "backup", f"{GROUP}/data")
        rows = [("first", [(seconds, first)]), *measure(folder).items()]
        print("| backup | method | read MiB | stored MiB | command s | backup s |")
        print("|---|---|---|---|---|---|")
        for label, runs in rows:
            told = runs[-1][1]
            read, stored = int(str(told["read_bytes"])) / MIB, int(str(told["stored_bytes"])) / MIB
            command = statistics.median(seconds for seconds, _ in runs)
            inner = statistics.median(float(str(each["seconds"])) for _, each in runs)
            print(f"| {label} | {told['method']} | {read:.1f} | {stored:.2f} | {command:.1f} | {inner:.1f} |")


if __name__ == "__main__":
    main()
