"""Find backups by what people call them."""

from __future__ import annotations

import re
from datetime import datetime

from blocksnap.errors import BlocksnapError, UsageError
from blocksnap.repository.blockmap import HOLE, ZERO, MapRoot
from blocksnap.repository.documents import Backup, Root
from blocksnap.repository.errors import NoSuchBackupError
from blocksnap.repository.repository import Repository
from blocksnap.repository.stored import StoredBackup
from blocksnap.system.host import host_id, host_name

_ID_PREFIX = re.compile(r"[0-9a-f]{4,32}")
_EMPTY = {"hole": HOLE, "zero": ZERO}


def map_root(root: Root) -> MapRoot:
    """Return the root of a map from its form in a manifest."""
    return MapRoot(root.levels, _EMPTY.get(root.root) or bytes.fromhex(root.root))


def root_document(root: MapRoot) -> Root:
    """Return the form of a map's root in a manifest."""
    names = {HOLE: "hole", ZERO: "zero"}
    return Root(levels=root.levels, root=names.get(root.entry) or root.entry.hex())


def is_tree(backup: Backup) -> bool:
    """Tell whether a backup is of a subvolume: a tree of files, and no image."""
    return backup.inodes is not None


def require_image(backup: Backup) -> None:
    """Raise UsageError for the backup of a subvolume, which is a tree of files and no image."""
    if is_tree(backup):
        raise UsageError(
            f"backup {backup.id[:8]} of {backup.volume.name} is a tree of files and no image",
            resolution="its files: blocksnap mount, blocksnap files; all of them to a new directory: "
            f"blocksnap restore {backup.id[:8]} DIRECTORY",
        )


def of_volume(backups: list[StoredBackup], volume: str) -> list[StoredBackup]:
    """Return the backups of the volume that has this name or key."""
    short = volume.removeprefix("/dev/")
    return [
        stored
        for stored in backups
        if volume in (stored.backup.volume.key, stored.backup.volume.name)
        or stored.backup.volume.name.removeprefix("/dev/") == short
    ]


def _of_one_host(backups: list[StoredBackup], volume: str) -> list[StoredBackup]:
    """Of volumes with the same name on several hosts, mean this host's; raise where that cannot be told."""
    hosts = {stored.origin for stored in backups}
    if len(hosts) < 2:
        return backups
    mine = [stored for stored in backups if stored.origin == this_origin()]
    if not mine:
        raise UsageError(
            f"{volume} is a volume of several hosts: {', '.join(sorted(name for _, name in hosts))}",
            resolution="give the backup's id; see: blocksnap list",
        )
    return mine


def newest_of(backups: list[StoredBackup], key: str) -> Backup | None:
    """Return the newest backup of the volume with this key: of this host's, or if it has none, of any.

    To build on what another host made of the same volume is right, and saves the work of a first backup.
    """
    found = [stored for stored in backups if stored.backup.volume.key == key]
    mine = [stored for stored in found if stored.origin == this_origin()]
    return (mine or found)[-1].backup if found else None


def this_origin() -> tuple[str, str]:
    """Return this host's id and name, as ``StoredBackup.origin`` has them."""
    return host_id(), host_name()


def is_luks_header(backup: Backup) -> bool:
    """Tell whether a backup is of something that went along with the volumes that somebody named."""
    return backup.volume.kind == "luks-header"


def find_backup(repository: Repository, name: str) -> StoredBackup:
    """Return the backup that a name means.

    ``latest``, of all but LUKS headers; ``VOLUME@latest``; ``VOLUME@TIME``, the last at or before an ISO time
    (local unless it says otherwise); an id or a unique prefix of at least four digits.
    Raises NoSuchBackupError.
    """
    backups = repository.backups()
    volume, at, when = name.rpartition("@")
    if at:
        backups = _of_one_host(of_volume(backups, volume), volume)
        if when != "latest":
            limit = _parse_time(when)
            backups = [stored for stored in backups if stored.oldest <= limit]
            backups.sort(key=lambda stored: stored.oldest)
    elif name == "latest":
        backups = [stored for stored in backups if not is_luks_header(stored.backup)]
    if at or name == "latest":
        if not backups:
            raise _missing(repository, name)
        return backups[-1]
    found = (
        [stored for stored in backups if stored.backup.id.startswith(name)]
        if _ID_PREFIX.fullmatch(name)
        else []
    )
    if not found:
        raise _missing(repository, name)
    if len(found) > 1:
        raise NoSuchBackupError(name, len(found))
    return found[0]


def _missing(repository: Repository, name: str) -> BlocksnapError:
    """What is not found may be in a manifest that cannot be read."""
    return repository.damage[0] if repository.damage else NoSuchBackupError(name)


def _parse_time(text: str) -> datetime:
    try:
        return datetime.fromisoformat(text).astimezone()
    except (ValueError, OverflowError) as err:
        raise UsageError(
            f"{text!r} is not a time", resolution="write it like 2026-11-21T10:00 or 2026-11-21T10:00+01:00"
        ) from err
