"""An empty disk and the repository: the walk-through of docs/operations.md, done as it stands there."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.in_process import InProcess
from support.loops import call_until_done
from support.lvm_lab import remove_group, scratch_disks, tool, write_at

MIB = 1 << 20
GROUP = "bare-vg.a+b"
REPOSITORY = Path(__file__).parents[2]


@pytest.fixture
def disks(_lab: None) -> Iterator[list[str]]:
    """Two disks, the first with a partition on it."""
    chosen = scratch_disks()[:2]
    partition(chosen[0])
    yield chosen
    remove_group(GROUP, [f"{chosen[0]}1", chosen[1]])
    for disk in chosen:
        empty(disk)


def partition(disk: str) -> None:
    subprocess.run(["sfdisk", "--quiet", disk], input=b"label: gpt\n,,L\n", check=True)
    tool("udevadm", "settle")


def empty(disk: str) -> None:
    """Forget everything on a disk: partition tables stand at both ends."""
    size = int(tool("blockdev", "--getsize64", disk))
    for offset in (0, size - MIB):
        write_at(disk, offset, bytes(MIB))
    # Who looks at what was written to keeps it for a moment.
    call_until_done("blockdev", "--rereadpt", disk)
    tool("udevadm", "settle")


def shape() -> list[dict[str, str]]:
    """What the group looks like, but for what is made anew."""
    fields = "lv_name,lv_size,segtype,pool_lv,chunk_size,vg_extent_size"
    words = ("--reportformat", "json", "--units", "b", "-o", fields, "-O", "lv_name")
    rows: list[dict[str, str]] = json.loads(tool("lvs", *words, GROUP))["report"][0]["lv"]
    return rows


def test_the_volume_group_is_back(disks: list[str], blocksnap: InProcess, tmp_path: Path) -> None:
    first = f"{disks[0]}1"
    tool("vgcreate", "-y", "-s", "8m", GROUP, first, disks[1])
    pool = ("--type", "thin-pool", "-L", "64M", "--poolmetadatasize", "8M", "--chunksize", "128k")
    tool("lvcreate", "-y", *pool, "-n", "pool-1", GROUP)
    tool("lvcreate", "-y", "-V", "40M", "-T", f"{GROUP}/pool-1", "-n", "data")
    tool("lvcreate", "-y", "-L", "24M", "-n", "classic", GROUP)
    tool("lvcreate", "-y", "-L", "8M", "-n", "scratch", GROUP)
    contents = {name: os.urandom(3 * MIB) for name in ("data", "classic")}
    for name, content in contents.items():
        write_at(f"/dev/{GROUP}/{name}", 5 * MIB, content)
    tool("blockdev", "--setro", f"/dev/{GROUP}/scratch")
    before = [row for row in shape() if row["lv_name"] != "scratch"]
    blocksnap.done("backup", f"{GROUP}/data", f"{GROUP}/classic")
    remove_group(GROUP, [first, disks[1]])
    for disk in disks:
        empty(disk)
    assert not os.path.exists(first)
    # On the new machine there is nothing but the repository.
    folder = tmp_path / "host"
    blocksnap.done("show", "latest", "--host", "--to", folder)
    text = (folder / "recover.sh").read_text()
    assert f"# {GROUP}/scratch (striped, 8388608 bytes) is in no backup" in text
    assert f"sfdisk {disks[0]} <" in text
    path = f"{REPOSITORY}/.venv/bin:{os.environ['PATH']}"
    done = subprocess.run(
        ["sh", "-eu", folder / "recover.sh"],
        check=False,
        capture_output=True,
        text=True,
        env={**os.environ, "PATH": path},
    )
    assert done.returncode == 0, (text, done.stdout, done.stderr)
    assert shape() == before
    for name, content in contents.items():
        with open(f"/dev/{GROUP}/{name}", "rb") as device:
            device.seek(5 * MIB)
            assert device.read(len(content)) == content
    # LVM's own text is there for whoever wants the old UUIDs.
    assert f"{GROUP} {{" in (folder / f"{GROUP}.vgcfg").read_text()
    told = blocksnap.backup(f"{GROUP}/data")
    assert told["kind"] == "full"
