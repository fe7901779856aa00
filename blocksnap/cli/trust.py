"""Remember what a repository was like when this host last wrote to it.

Whoever holds the storage could put an unencrypted repository in the place of an encrypted one, and every
later backup would go there in clear. So each host writes down the encryption of the repositories it uses, and
refuses to write to one that has lost it. And they could put an older state of a repository in its place,
of which everything is genuine; so each host writes down its newest backup of every volume, and tells
when that is gone. (Expiry never removes the newest.)
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable
from hashlib import blake2b
from pathlib import Path
from typing import Any

from blocksnap.errors import UsageError
from blocksnap.repository.repository import Repository
from blocksnap.repository.stored import StoredBackup

_FOLDER = "repositories"


class EncryptionLostError(UsageError):
    """A repository that was encrypted is not any more."""

    def __init__(self, place: str, record: Path) -> None:
        self.place = place
        super().__init__(
            f"repository {place} was encrypted when this host last wrote to it, and now it is not",
            resolution=f"find out who replaced it; if it was you, remove {record}",
        )


def require_same_encryption(repository: Repository, state_directory: str) -> None:
    """Refuse a repository that lost its encryption; remember one that is new here."""
    known = _load(repository, state_directory)
    if known.get("encryption", "none") != "none" and not repository.keys.encrypted:
        raise EncryptionLostError(repository.backend.place, _record(repository, state_directory))
    _store(repository, state_directory, known, {})


def has_lost_newest(repository: Repository, state_directory: str, volume_key: str) -> bool:
    """Tell whether the newest backup that this host made of a volume is not in the repository any more."""
    run = _newest(_load(repository, state_directory), repository).get(volume_key)
    return run is not None and not repository.backend.exists(f"manifests/{run}")


def remember_newest(repository: Repository, state_directory: str, backups: Iterable[StoredBackup]) -> None:
    """Write down the backups that this host has just made."""
    made = {stored.backup.volume.key: stored.manifest.writer for stored in backups}
    _store(repository, state_directory, _load(repository, state_directory), made)


def _record(repository: Repository, state_directory: str) -> Path:
    name = blake2b(repository.backend.place.encode(), digest_size=16).hexdigest()
    return Path(state_directory) / _FOLDER / name


def _load(repository: Repository, state_directory: str) -> dict[str, Any]:
    try:
        known = json.loads(_record(repository, state_directory).read_bytes())
    except (OSError, ValueError):
        return {}
    return known if isinstance(known, dict) else {}


def _newest(known: dict[str, Any], repository: Repository) -> dict[str, str]:
    # Another repository at the same place has other backups.
    newest = known.get("newest") if known.get("id") == repository.config.id else None
    return newest if isinstance(newest, dict) else {}


def _store(repository: Repository, state_directory: str, known: dict[str, Any], made: dict[str, str]) -> None:
    document = {
        "place": repository.backend.place,
        "id": repository.config.id,
        "encryption": repository.config.encryption,
        "newest": {**_newest(known, repository), **made},
    }
    if known == document:
        return
    record = _record(repository, state_directory)
    # A state directory that cannot be written to is told of where it matters, by the journal.
    with contextlib.suppress(OSError):
        record.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        beside = record.with_suffix(".new")
        beside.write_text(json.dumps(document))
        beside.replace(record)
