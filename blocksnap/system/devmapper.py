"""What device-mapper itself says: names, tables, status, suspension.

Pools are asked without a flush: ``dmsetup status`` would otherwise commit their metadata.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

from blocksnap.system import sysfs
from blocksnap.system.blockdev import holders, slaves, sysfs_folder
from blocksnap.system.command import run

PoolMode = Literal["rw", "ro", "out_of_data_space", "fail"]
SnapshotState = Literal["valid", "invalid", "overflow", "merging", "merge failed", "unknown"]
_SECTOR = 512
_SYS_BLOCK = Path("/sys/block")
_LVM_UUID = re.compile(r"LVM-(\w{32})(\w{32})(-\w+)?")


@dataclass(frozen=True, slots=True)
class PoolStatus:
    """The status line of a thin-pool target."""

    mode: PoolMode
    needs_check: bool
    transaction_id: int = 0
    metadata_used: int = 0
    metadata_total: int = 0
    data_used: int = 0
    data_total: int = 0
    held_root: int | None = None

    @property
    def data_percent(self) -> float:
        """How full the data device is."""
        return 100 * self.data_used / self.data_total if self.data_total else 0.0

    @property
    def metadata_percent(self) -> float:
        """How full the metadata device is."""
        return 100 * self.metadata_used / self.metadata_total if self.metadata_total else 0.0


@dataclass(frozen=True, slots=True)
class SnapshotStatus:
    """The status line of a classic snapshot, in bytes; all 0 in a state without numbers.

    ``allocated`` is what of the exception store is in use, ``metadata`` its header and its list among that. A
    chunk counts as allocated before the list has it. (kernel: dm-snap.c, dm-snap-persistent.c)
    """

    state: SnapshotState
    allocated: int = 0
    total: int = 0
    metadata: int = 0


@dataclass(frozen=True, slots=True)
class SnapshotTable:
    """The table of a classic snapshot: device numbers, and bytes of a chunk."""

    origin: int
    store: int
    chunk_size: int
    is_merging: bool
    is_persistent: bool


@dataclass(frozen=True, slots=True)
class LvmIdentity:
    """Whose device it is: UUIDs without hyphens, and for inner ones the layer (``tpool``)."""

    vg_uuid: str
    lv_uuid: str
    layer: str


def encode_name(vg: str, lv: str) -> str:
    """Return the device-mapper name of a logical volume: hyphens inside names are doubled."""
    return f"{vg.replace('-', '--')}-{lv.replace('-', '--')}"


def decode_name(name: str) -> tuple[str, str] | None:
    """Return volume group and logical volume of a device-mapper name; None when it is no such name."""
    # The separator is the one hyphen that is not doubled: a run of an odd length.
    found = re.fullmatch(r"((?:[^-]|--)+)-((?:[^-]|--)+)", name)
    if not found:
        return None
    vg, lv = (part.replace("--", "-") for part in found.groups())
    return vg, lv


def dm_name(number: int) -> str | None:
    """Return the device-mapper name of a device; None when it is none."""
    return sysfs.text_of(sysfs_folder(number) / "dm/name")


def dm_uuid(number: int) -> str | None:
    """Return the device-mapper UUID of a device; None when it is none."""
    return sysfs.text_of(sysfs_folder(number) / "dm/uuid")


def lvm_identity(number: int) -> LvmIdentity | None:
    """Return which logical volume a device belongs to; None when LVM did not make it."""
    found = _LVM_UUID.fullmatch(dm_uuid(number) or "")
    return LvmIdentity(found[1], found[2], (found[3] or "").removeprefix("-")) if found else None


def _layer_of(number: int) -> str | None:
    identity = lvm_identity(number)
    return identity.layer if identity is not None else None


def is_suspended(number: int) -> bool:
    """Tell whether a device is suspended; False when it is gone."""
    return sysfs.text_of(sysfs_folder(number) / "dm/suspended") == "1"


def suspended_devices() -> set[int]:
    """Return the numbers of all devices that are suspended now."""
    return {number for number in _devices() if is_suspended(number)}


def suspended_with(number: int) -> list[int]:
    """Return what of LVM is suspended with a volume, in the order in which it has to be resumed.

    For a snapshot of a classic volume LVM suspends the volume, what it lies on (legs of a RAID, a cache), and
    the snapshots that it has, with their stores. Whatever lies on others goes on after these. Thin pools are
    left out, with all below.
    """
    found: list[int] = []
    seen: set[int] = set()

    def visit(device: int) -> None:
        identity = lvm_identity(device)
        if device in seen or identity is None or identity.layer == "tpool":
            return
        seen.add(device)
        for below in slaves(device):
            visit(below)
        found.append(device)

    reals = [below for below in slaves(number) if _layer_of(below) == "real"]
    for snapshot in [above for real in reals for above in holders(real) if above != number]:
        visit(snapshot)
    visit(number)
    return [device for device in found if is_suspended(device)]


def has_lvm_devices() -> bool:
    """Tell whether LVM has made any device that is active."""
    return any(lvm_identity(number) is not None for number in _devices())


def resume(number: int) -> None:
    """Let a suspended device go on."""
    run("dmsetup", "resume", *_selected(number))


def pool_above(metadata: int) -> int | None:
    """Return the thin-pool device that lies on a metadata device; None when the pool is not active.

    LVM reports a pool as inactive, and without a number, when it runs only because a volume in it does.
    """
    for holder in holders(metadata):
        identity = lvm_identity(holder)
        if identity is not None and identity.layer == "tpool":
            return holder
    return None


def pool_below(number: int) -> int | None:
    """Return the thin-pool device that a device lies on, at whatever depth; None when it lies on none."""
    for below in slaves(number):
        identity = lvm_identity(below)
        found = below if identity is not None and identity.layer == "tpool" else pool_below(below)
        if found is not None:
            return found
    return None


def pool_status(number: int) -> PoolStatus:
    """Ask a thin pool how it is; ``number`` is its ``-tpool`` device."""
    return parse_pool_status(run("dmsetup", "status", "--noflush", *_selected(number)))


def snapshot_above(store: int) -> int | None:
    """Return the snapshot that an exception store belongs to; None when it is not active.

    While the snapshot is merged, that is the device of its origin.
    """
    return next((holder for holder in holders(store) if dm_uuid(holder) is not None), None)


def snapshot_status(number: int) -> SnapshotStatus:
    """Ask a classic snapshot how it is."""
    return parse_snapshot_status(run("dmsetup", "status", "--noflush", *_selected(number)))


def snapshot_table(number: int) -> SnapshotTable:
    """Ask a classic snapshot what it is made of; raises ValueError when it is none."""
    return parse_snapshot_table(run("dmsetup", "table", *_selected(number)))


def reserve_metadata_snapshot(number: int) -> None:
    """Make a pool hold a metadata snapshot; ``number`` is its ``-tpool`` device.

    Raises CommandError; its message has "busy" in it when the pool holds one already: there is only one.
    """
    run("dmsetup", "message", *_selected(number), "0", "reserve_metadata_snap")


def release_metadata_snapshot(number: int) -> None:
    """Let go of the metadata snapshot of a pool, whoever took it; raises CommandError when there is none."""
    run("dmsetup", "message", *_selected(number), "0", "release_metadata_snap")


def target_kinds(number: int) -> frozenset[str]:
    """Return what a device is made of: ``linear``, ``striped``, of RAID its level; none when it is none.

    Raises CommandError.
    """
    if dm_uuid(number) is None:
        return frozenset()
    # start length KIND ..., and of RAID: start length raid LEVEL ...
    lines = [line.split() for line in run("dmsetup", "table", *_selected(number)).splitlines()]
    return frozenset(words[3] if words[2] == "raid" else words[2] for words in lines if len(words) > 3)


def is_plain_thin(number: int) -> bool:
    """Tell whether a device is one thin volume without an external origin: the unmapped reads as zeros."""
    uuid = dm_uuid(number)
    return uuid is not None and _is_plain_thin(number, uuid)


@cache
def _is_plain_thin(number: int, uuid: str) -> bool:  # noqa: ARG001 - a number may be given out again
    lines = run("dmsetup", "table", *_selected(number)).splitlines()
    words = lines[0].split() if len(lines) == 1 else []
    # start length thin POOL ID [EXTERNAL ORIGIN]
    return len(words) == 5 and words[0] == "0" and words[2] == "thin"


def parse_pool_status(text: str) -> PoolStatus:
    """Parse ``0 2097152 thin-pool 2 113/1024 0/16384 - rw no_discard_passdown queue_if_no_space - 256``."""
    words = text.split()
    if "thin-pool" not in words:
        raise ValueError(f"not the status of a thin pool: {text.strip()!r}")
    facts = words[words.index("thin-pool") + 1 :]
    if len(facts) < 5 or facts[0] in ("Fail", "Error"):
        return PoolStatus(mode="fail", needs_check=True)
    metadata_used, metadata_total = map(int, facts[1].split("/"))
    data_used, data_total = map(int, facts[2].split("/"))
    mode: PoolMode = "rw" if "rw" in facts else "out_of_data_space" if "out_of_data_space" in facts else "ro"
    return PoolStatus(
        mode=mode,
        needs_check="needs_check" in facts[4:],
        transaction_id=int(facts[0]),
        metadata_used=metadata_used,
        metadata_total=metadata_total,
        data_used=data_used,
        data_total=data_total,
        held_root=None if facts[3] == "-" else int(facts[3]),
    )


def parse_snapshot_status(text: str) -> SnapshotStatus:
    """Parse ``0 204800 snapshot 112/20480 16``, or a word in place of the numbers."""
    target, facts = _snapshot_words(text, "status")
    numbers = re.fullmatch(r"(\d+)/(\d+) (\d+)", " ".join(facts))
    if numbers:
        allocated, total, metadata = (int(each) * _SECTOR for each in numbers.groups())
        state: SnapshotState = "merging" if target == "snapshot-merge" else "valid"
        return SnapshotStatus(state, allocated, total, metadata)
    words: dict[str, SnapshotState] = {
        "Invalid": "invalid",
        "Overflow": "overflow",
        "Merge failed": "merge failed",
    }
    return SnapshotStatus(words.get(" ".join(facts), "unknown"))


def parse_snapshot_table(text: str) -> SnapshotTable:
    """Parse ``0 204800 snapshot 253:1 253:2 P 8``; raises ValueError."""
    target, facts = _snapshot_words(text, "table")
    if len(facts) < 4:
        raise ValueError(f"not the table of a snapshot: {text.strip()!r}")
    return SnapshotTable(
        origin=_number(facts[0]),
        store=_number(facts[1]),
        chunk_size=int(facts[3]) * _SECTOR,
        is_merging=target == "snapshot-merge",
        is_persistent=facts[2].startswith("P"),
    )


def _snapshot_words(text: str, what: str) -> tuple[str, list[str]]:
    words = text.split()
    if text.count("\n") > 1 or len(words) < 3 or words[2] not in ("snapshot", "snapshot-merge"):
        raise ValueError(f"not the {what} of a snapshot: {text.strip()!r}")
    return words[2], words[3:]


def _number(text: str) -> int:
    major, _, minor = text.partition(":")
    return os.makedev(int(major), int(minor))


def _devices() -> list[int]:
    return sysfs.numbers_of(sysfs.find(_SYS_BLOCK, "dm-*/dev"))


def _selected(number: int) -> tuple[str, ...]:
    return "--major", str(os.major(number)), "--minor", str(os.minor(number))
