"""From what a run recorded of its host to the commands that make a bare machine ready for its volumes.

They are written to be read: which disk stands in the place of which only people can say. Volume groups,
thin pools and then the volumes are made anew, with new UUIDs: LVM's own text is exported beside them for who
needs the old ones.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from blocksnap.errors import DamageError, TargetError, UsageError
from blocksnap.operations.recording import physical_volumes
from blocksnap.repository.documents import RecordedHeader, Recovery
from blocksnap.repository.repository import Repository
from blocksnap.system import lvm
from blocksnap.system.lvm_text import LvmTextError, Section, Value, number_in, parse, section_in, strings_in

SCRIPT = "recover.sh"
_SECTOR = 512


class NoRecordError(TargetError):
    """A run recorded nothing of its host (exit code 1)."""

    def __init__(self, backup: str) -> None:
        super().__init__(
            f"with backup {backup} nothing was recorded of the host",
            resolution="that is done for logical volumes and devices, and not for files",
        )


class SenselessRecordError(DamageError):
    """What was recorded of the host is not what LVM writes of a group (exit code 13)."""

    def __init__(self, reason: str) -> None:
        super().__init__(
            f"what was recorded of the host makes no sense: {reason}",
            resolution="the volumes can be restored all the same: make the group anew, then restore --create",
        )


@dataclass(frozen=True, slots=True)
class RecordedVolume:
    """A logical volume as it was: sizes in bytes; ``pool`` is empty for a classic one."""

    group: str
    name: str
    kind: str
    size: int
    pool: str = ""
    metadata_size: int = 0
    chunk_size: int = 0


def newest_of_host(repository: Repository, host: str) -> dict[str, str]:
    """Return the newest backup of each volume of one host, id by name.

    Other hosts may have volumes of the same names, and whoever runs the script may be one of them.
    """
    backups = (stored for stored in repository.backups() if stored.manifest.host == host)
    return {stored.backup.volume.name: stored.backup.id for stored in backups}


def export_host(recovery: Recovery, backed_up: Mapping[str, str], folder: Path) -> list[Path]:
    """Write everything to files in a folder, and the script; raises TargetError when that is not possible.

    ``backed_up`` are the volumes of the host of which there are backups, with the ids of the newest.
    """
    files = {f"{name}.vgcfg": text for name, text in recovery.groups.items()}
    files |= {f"{_plain(disk.path)}.sfdisk": disk.table for disk in recovery.disks if disk.table}
    files["fstab"] = recovery.fstab
    lines = [f"{each.source} {each.point} {each.filesystem}" for each in recovery.mounts]
    files["mounts"] = "\n".join(lines) + "\n"
    files[SCRIPT] = "\n".join(script(recovery, backed_up)) + "\n"
    written = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in files.items():
            path = folder / name
            path.write_text(text)
            written.append(path)
    except OSError as err:
        raise TargetError(
            f"cannot write to {folder}: {err.strerror}", resolution="name a folder that can be written to"
        ) from err
    return written


def script(recovery: Recovery, backed_up: Mapping[str, str]) -> Iterator[str]:
    """Yield the lines of the script; raises SenselessRecordError."""
    try:
        yield from _script(recovery, backed_up)
    except (LvmTextError, UsageError) as err:
        raise SenselessRecordError(str(err)) from err


def _script(recovery: Recovery, backed_up: Mapping[str, str]) -> Iterator[str]:
    yield "#!/bin/sh -eu"
    yield "# Written by blocksnap. READ IT FIRST: it overwrites the disks that it names. Put in the names"
    yield "# of the new ones, which have to be at least as large, and leave out what is there already."
    for disk in recovery.disks:
        yield f"# {disk.path!r} had {disk.size} bytes"
    yield 'cd "$(dirname "$0")"'
    for disk in recovery.disks:
        if disk.table:
            yield f"sfdisk {_device(disk.path)} < {_plain(disk.path)}.sfdisk"
    for path in _arrays(recovery):
        yield f"# {path!r} was an array: make it first (mdadm --create), or put another device in its place"
    for header in recovery.headers:
        yield from _header(header, backed_up)
    for name, text in recovery.groups.items():
        lvm.check_name(name)
        group = section_in(parse(text), name)
        extent = number_in(group, "extent_size") * _SECTOR
        disks = " ".join(_device(path) for path in physical_volumes(name, text))
        yield f"vgcreate --yes --physicalextentsize {extent}b {name} {disks}"
        yield from _volumes(list(read_volumes(name, group)), backed_up)


def read_volumes(name: str, group: Section) -> Iterator[RecordedVolume]:
    """Yield the visible volumes of a recorded group, but for snapshots of ours; raises LvmTextError."""
    extent = number_in(group, "extent_size") * _SECTOR
    volumes = section_in(group, "logical_volumes")
    for lv in volumes:
        facts = section_in(volumes, lv)
        if "VISIBLE" not in strings_in(facts, "status") or lvm.TAG in strings_in(facts, "tags"):
            continue
        first = section_in(facts, "segment1")
        is_pool = first.get("type") == "thin-pool"
        metadata = section_in(volumes, str(first.get("metadata"))) if is_pool else {}
        yield RecordedVolume(
            group=name,
            name=lvm.check_name(lv),
            kind=_name(first.get("type", "")),
            size=_extents(facts) * extent,
            pool=_name(first.get("thin_pool", "")),
            metadata_size=_extents(metadata) * extent,
            chunk_size=number_in(first, "chunk_size") * _SECTOR if is_pool else 0,
        )


def _name(value: Value) -> str:
    """Return a name that may be missing; raises UsageError for what LVM would not take."""
    return lvm.check_name(value) if isinstance(value, str) and value else ""


def _device(path: str) -> str:
    """Return a path for a shell, where it is never taken for an option; raises LvmTextError."""
    if not path.startswith("/"):
        raise LvmTextError(f"{path!r} is no path of a device")
    return shlex.quote(path)


def _extents(volume: Section) -> int:
    segments = [section_in(volume, name) for name in volume if re.fullmatch(r"segment\d+", name)]
    return sum(number_in(segment, "extent_count") for segment in segments)


def _arrays(recovery: Recovery) -> list[str]:
    """Return the arrays of md that there have to be before what lies on them is made."""
    paths = [header.path for header in recovery.headers]
    for name, text in recovery.groups.items():
        paths += physical_volumes(name, text)
    return [path for path in dict.fromkeys(paths) if path.startswith("/dev/md")]


def _header(header: RecordedHeader, backed_up: Mapping[str, str]) -> Iterator[str]:
    """The header first, then the container is opened as it was: its passphrase is asked for."""
    path, file = _device(header.path), shlex.quote(f"{_plain(header.path)}.luks")
    backup = backed_up.get(header.volume)
    if backup is None:
        yield f"# the LUKS header of {header.path!r} is in no backup of this repository any more"
        return
    # A path in a comment is written so that it has no second line.
    yield f"# {header.path!r} is a LUKS container: its old header makes one of a new device, for the old keys"
    yield f"(umask 077 && blocksnap restore -- {backup} {file})"
    yield f"cryptsetup luksHeaderRestore --batch-mode --header-backup-file {file} {path}"
    yield f"rm {file}"
    if header.mapping:
        yield f"cryptsetup open -- {path} {shlex.quote(header.mapping)}"


def _volumes(volumes: Sequence[RecordedVolume], backed_up: Mapping[str, str]) -> Iterator[str]:
    """Pools first, then what is in the repository, then what is not."""
    for each in volumes:
        if each.kind == "thin-pool":
            yield (
                f"lvcreate --yes --type thin-pool --size {each.size}b --chunksize {each.chunk_size}b "
                f"--poolmetadatasize {each.metadata_size}b --name {each.name} {each.group}"
            )
    for each in volumes:
        full_name = f"{each.group}/{each.name}"
        if each.kind == "thin-pool":
            continue
        how = f"--pool {each.pool}" if each.pool else "--classic"
        if full_name in backed_up:
            if each.kind.startswith("raid") or each.kind in ("cache", "writecache"):
                yield f"# {full_name} was of type {each.kind}, and comes back linear: see lvconvert(8)"
            yield f"blocksnap restore {backed_up[full_name]} {full_name} --create {how}"
        else:
            yield f"# {full_name} ({each.kind}, {each.size} bytes) is in no backup of this repository"


def _plain(path: str) -> str:
    """Return a name for a file made of the path of a device; no hyphen is at the beginning."""
    return "".join(letter if letter.isalnum() else "-" for letter in path.removeprefix("/dev/")).lstrip("-")
