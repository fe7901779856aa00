"""Why a volume cannot be backed up; all of them end with exit code 14."""

from __future__ import annotations

import os

from blocksnap.errors import UsageError, VolumeError

SUPPORTED = (
    "supported are LVM volumes, thin or classic, btrfs subvolumes, files, and block devices that nobody uses"
)


class NoSuchVolumeError(VolumeError):
    """Nothing answers to the name."""

    def __init__(self, name: str, reason: str) -> None:
        self.name = name
        super().__init__(
            f"there is no volume {name}: {reason}", resolution="blocksnap volumes shows what there is"
        )


class UnsupportedVolumeError(VolumeError):
    """It exists, but blocksnap cannot back it up."""

    def __init__(self, name: str, what: str, advice: str | None = None) -> None:
        self.name = name
        self.what = what
        super().__init__(f"{name} cannot be backed up: it is {what}", resolution=advice or SUPPORTED)


class NameNotTextError(VolumeError):
    """Its name has bytes that are no UTF-8, and what is recorded of a backup is text."""

    def __init__(self, name: str) -> None:
        self.name = os.fsencode(name).decode(errors="backslashreplace")
        super().__init__(
            f"{self.name} cannot be backed up: its name is no UTF-8", resolution="rename it (convmv, mv)"
        )


class NoImageError(UsageError):
    """A subvolume is a tree of files, and something else was asked for."""

    def __init__(self) -> None:
        super().__init__(
            "a subvolume is a tree of files, and this is for volumes, devices and files that are images",
            resolution="it can be backed up, restored, verified and checked",
        )


class VolumeInUseError(VolumeError):
    """It has no snapshots, and somebody may write to it."""

    def __init__(self, name: str, users: list[str]) -> None:
        self.name = name
        self.users = users
        super().__init__(
            f"{name} has no snapshots and is in use: {'; '.join(users) or 'somebody holds it open'}",
            resolution="unmount it or stop what uses it meanwhile (hooks of a job can: quiesce), or move the "
            "data to an LVM volume",
        )


class FileInUseError(VolumeError):
    """A file of which no clone can be made is open for writing."""

    def __init__(self, path: str) -> None:
        self.path = path
        super().__init__(
            f"somebody has {path} open for writing, and its filesystem can make no clone of it",
            resolution="have a hook of the job stop who writes to it until it is read (quiesce), or say "
            "--quiet-files if nobody writes meanwhile (quiet_files in a job), or keep it on XFS or btrfs",
        )


class VolumeChangedError(VolumeError):
    """It was written to while it was read."""

    def __init__(self, name: str, what: str) -> None:
        self.name = name
        super().__init__(
            f"{name} changed while it was read: {what}",
            resolution="stop what writes to it for the time of the backup; nothing was committed",
        )


class UnfinishedVolumeError(VolumeError):
    """A restore to the volume is at work, or was interrupted."""

    def __init__(self, name: str) -> None:
        self.name = name
        super().__init__(
            f"{name} is not whole: a restore to it is at work, or was interrupted",
            resolution="run the same restore again: it goes on where it was; then back it up",
        )


class PoolFullError(VolumeError):
    """A snapshot would make a pool that is nearly full fill up."""

    def __init__(self, pool: str, part: str, used_percent: float, limit_percent: float) -> None:
        self.pool = pool
        self.part = part
        self.used_percent = used_percent
        self.limit_percent = limit_percent
        option = "--poolmetadatasize" if part == "metadata" else "--size"
        super().__init__(
            f"{part} of thin pool {pool} is {used_percent:.1f} % full; a snapshot needs {limit_percent:g} %",
            resolution=f"extend it: lvextend {option} +SIZE {pool}",
        )


class PoolHealthError(VolumeError):
    """The pool is in a state in which its metadata cannot be trusted or changed."""

    def __init__(self, pool: str, state: str) -> None:
        self.pool = pool
        self.state = state
        super().__init__(
            f"thin pool {pool} is not healthy: {state}",
            resolution=f"see: dmsetup status, lvs -a; a damaged pool needs lvconvert --repair {pool}",
        )


class PoolWornOutError(VolumeError):
    """A pool has taken so many snapshots that further ones would make the kernel lose data."""

    def __init__(self, pool: str, taken: int, limit: int) -> None:
        self.pool = pool
        self.taken = taken
        self.limit = limit
        super().__init__(
            f"thin pool {pool} has taken {taken} snapshots in its life; beyond {limit - 1} the kernel "
            "mixes up its blocks",
            details="a mapping has 24 bits for the time it was made at, and the kernel does not check it",
            resolution="take no more snapshots in it, whoever does, and copy its volumes to a new pool",
        )


class NoRoomForStoreError(VolumeError):
    """A volume group has no room for the exception store of a classic snapshot."""

    def __init__(self, volume: str, free_bytes: int, least_bytes: int) -> None:
        self.volume = volume
        self.free_bytes = free_bytes
        self.least_bytes = least_bytes
        super().__init__(
            f"there is no room for a snapshot of {volume}: its volume group has {free_bytes} bytes free, of "
            f"which a snapshot may take four fifths, and the smallest takes {least_bytes}",
            resolution="make room there (vgextend, lvremove)",
        )


class InactiveVolumeError(VolumeError):
    """A classic volume that is not active has no snapshots that could be read."""

    def __init__(self, name: str) -> None:
        self.name = name
        super().__init__(f"{name} is not active", resolution=f"activate it: lvchange -ay {name}")


class SnapshotFailedError(VolumeError):
    """LVM refused to take a snapshot."""

    def __init__(self, volume: str, message: str) -> None:
        self.volume = volume
        lines = [line.strip() for line in message.splitlines() if line.strip()]
        super().__init__(
            f"LVM took no snapshot of {volume}: {lines[-1] if lines else 'it does not say why'}",
            details="\n".join(lines) or None,
            resolution="see: lvs -a, dmsetup status, dmesg",
        )


class SnapshotLostError(VolumeError):
    """The snapshot is not any more what was taken."""

    def __init__(self, volume: str, reason: str, advice: str = "take the backup again") -> None:
        self.volume = volume
        super().__init__(
            f"the snapshot of {volume} cannot be trusted any more: {reason}",
            resolution=f"nothing was committed; {advice}",
        )
