# SPDX-License-Identifier: Apache-2.0
"""Real volume groups for tests, on scratch disks that LAB_DISKS names; and reports for tests without any."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

GROUP = "my-vg.a+b"
"""Hyphens, dots and plus signs are all allowed in names, and all have been somebody's bug."""
POOL = "pool-1.x+y"

_REMOVING_SECONDS = 300.0
_PROGRAM_SECONDS = 60.0
"""How long one attempt may take: it may wait for what is suspended, and the next one follows."""

_FIELDS = {
    "vg_name": "vg0",
    "vg_uuid": "2UB2k5-yH8s-Ydj5-MEy0-qWmR-d7ng-NfWDnv",
    "vg_exported": "0",
    "vg_partial": "0",
    "vg_shared": "0",
    "vg_free": "1073741824",
    "vg_extent_size": "4194304",
    "lv_name": "data",
    "lv_uuid": "",
    "lv_size": "209715200",
    "lv_attr": "Vwi-a-tz--",
    "lv_time": "2026-11-22 21:47:39 +0000",
    "lv_host": os.uname().nodename,
    "lv_tags": "",
    "lv_active": "active",
    "lv_suspended": "0",
    "lv_merging": "0",
    "lv_permissions": "writeable",
    "lv_skip_activation": "0",
    "lv_device_open": "0",
    "lv_kernel_major": "-1",
    "lv_kernel_minor": "-1",
    "lv_health_status": "",
    "lv_check_needed": "-1",
    "lv_when_full": "",
    "lv_role": "public",
    "segtype": "thin",
    "devices": "",
    "origin": "",
    "origin_uuid": "",
    "origin_size": "",
    "pool_lv": "",
    "pool_lv_uuid": "",
    "metadata_lv": "",
    "metadata_lv_uuid": "",
    "thin_id": "",
    "transaction_id": "",
    "chunk_size": "0",
    "data_percent": "",
    "metadata_percent": "",
    "zero": "-1",
}


def row(name: str, **fields: str) -> dict[str, str]:
    """One row of an ``lvs`` report, with a UUID made from the name."""
    uuid = ((name.strip("[]") + "0" * 32).replace("-", "x").replace("_", "y"))[:32]
    hyphened = "-".join([uuid[:6], *(uuid[at : at + 4] for at in range(6, 26, 4)), uuid[26:]])
    return {**_FIELDS, "lv_name": name, "lv_uuid": hyphened, **fields}


def uuid_of(name: str) -> str:
    """The UUID that ``row`` gives a volume."""
    return row(name)["lv_uuid"]


def thin_rows(*names: str, **fields: str) -> list[dict[str, str]]:
    """The rows of a pool with volumes of these names, the first of which gets ``fields``."""
    pool = row(
        "pool",
        segtype="thin-pool",
        lv_attr="twi-aotz--",
        lv_role="private",
        metadata_lv="[pool_tmeta]",
        metadata_lv_uuid=uuid_of("pool_tmeta"),
        chunk_size="65536",
        lv_check_needed="0",
    )
    inner = [
        row("[pool_tmeta]", segtype="linear", lv_role="private,thin,pool,metadata", devices="/dev/sda(7)"),
        row("[pool_tdata]", segtype="linear", lv_role="private,thin,pool,data", devices="/dev/sda(8)"),
    ]
    volumes = [
        row(
            name,
            pool_lv="pool",
            pool_lv_uuid=uuid_of("pool"),
            thin_id=str(number + 1),
            transaction_id=str(number),
        )
        for number, name in enumerate(names)
    ]
    volumes[0].update(fields)
    return [pool, *inner, *volumes]


def report_text(*rows: dict[str, str]) -> str:
    """What ``lvs --reportformat json`` prints."""
    return json.dumps({"report": [{"lv": list(rows)}]})


def scratch_disks() -> list[str]:
    """The disks that may be overwritten."""
    return [disk for disk in os.environ.get("LAB_DISKS", "").split(":") if disk]


def obstacle() -> str | None:
    """Say what keeps tests with real LVM from running here."""
    if not scratch_disks():
        return "LAB_DISKS names no scratch disks (run it with vagrant/lab)"
    if os.geteuid():
        return "LVM needs root"
    return None if shutil.which("lvcreate") else "lvm2 is not installed"


def tool(*argv: str) -> str:
    """Run a program; its errors are the test's."""
    # With a path, and no descriptor to close, it is started without a fork: what the lab is slow at.
    words = [shutil.which(argv[0]) or argv[0], *argv[1:]]
    done = subprocess.run(
        words, check=False, capture_output=True, text=True, stdin=subprocess.DEVNULL, close_fds=False
    )
    if done.returncode:
        raise AssertionError(f"{' '.join(argv)}: exit {done.returncode}\n{done.stdout}{done.stderr}")
    return done.stdout


def switch(device: str, table: str) -> None:
    """Put another table in force at once."""
    subprocess.run(["dmsetup", "load", device], input=table, text=True, check=True)
    tool("dmsetup", "suspend", "--nolockfs", "--noflush", device)
    tool("dmsetup", "resume", device)


@dataclass
class ThinPool:
    """A volume group with a thin pool in it."""

    group: str
    pool: str
    root: Path

    def create(self, name: str, size: str = "64M") -> str:
        """Create a thin volume and return ``VG/LV``."""
        tool("lvcreate", "-y", "-V", size, "-T", f"{self.group}/{self.pool}", "-n", name)
        return f"{self.group}/{name}"

    def node(self, name: str) -> str:
        """The node of a volume."""
        return f"/dev/{self.group}/{name}"

    def names(self) -> list[str]:
        """All volumes of the group, inner ones too."""
        text = tool("lvs", "-a", "--noheadings", "-o", "lv_name", self.group)
        return sorted(line.strip().strip("[]") for line in text.splitlines())

    def snapshots(self) -> list[str]:
        """What blocksnap left."""
        return [name for name in self.names() if name.startswith("blocksnap-")]

    def remove(self, *names: str) -> None:
        """Remove volumes."""
        for name in names:
            tool("lvremove", "-y", f"{self.group}/{name}")


@contextmanager
def thin_pool(root: Path, *, group: str = GROUP, pool: str = POOL, chunk: str = "64k") -> Iterator[ThinPool]:
    """Make a group with a pool on all scratch disks, and take everything away again."""
    disks = scratch_disks()
    tool("vgcreate", "-y", group, *disks)
    try:
        tool(
            "lvcreate",
            "-y",
            "--type",
            "thin-pool",
            "-L",
            "512M",
            "--poolmetadatasize",
            "8M",
            "--chunksize",
            chunk,
            "-n",
            pool,
            group,
        )
        yield ThinPool(group, pool, root)
    finally:
        remove_group(group, disks)


def remove_group(group: str, disks: list[str]) -> None:
    """Remove a group, however it looks; udev may still hold something for a moment."""
    deadline = time.monotonic() + _REMOVING_SECONDS
    while exit_code("vgremove", "-ff", "-y", group):
        # There may be none, as where a test removes it.
        if exit_code("vgs", group):
            break
        if time.monotonic() > deadline:
            raise AssertionError(
                f"{group} cannot be removed:\n{tool('dmsetup', 'info', '-c')}{tool('mount')}"
            )
        time.sleep(0.3)
        for name in suspended():
            exit_code("dmsetup", "resume", name)
    exit_code("pvremove", "-ff", "-y", *disks)


def suspended() -> list[str]:
    """What device-mapper holds suspended."""
    lines = tool("dmsetup", "info", "-c", "--noheadings", "-o", "name,suspended").splitlines()
    return [line.partition(":")[0] for line in lines if line.endswith("Suspended")]


def exit_code(*words: str) -> int:
    """Run a program; one that waits for a device that is dead or suspended, and cannot be killed, is left."""
    process = subprocess.Popen(
        words, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        return process.wait(_PROGRAM_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        return -1


def write_at(node: str, offset: int, data: bytes) -> None:
    """Write to a device, through to the medium."""
    fd = os.open(node, os.O_WRONLY)
    try:
        os.pwrite(fd, data, offset)
        os.fsync(fd)
    finally:
        os.close(fd)
