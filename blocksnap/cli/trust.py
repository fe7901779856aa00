"""Remember what a repository was like when this host first wrote to it.

Whoever holds the storage could put an unencrypted repository in the place of an encrypted one, and every
later backup would go there in clear. So each host writes down the encryption of the repositories it uses, and
refuses to write to one that has lost it.
"""

from __future__ import annotations

import contextlib
import json
from hashlib import blake2b
from pathlib import Path

from blocksnap.errors import UsageError
from blocksnap.repository.repository import Repository

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
    place = repository.backend.place
    record = Path(state_directory) / _FOLDER / blake2b(place.encode(), digest_size=16).hexdigest()
    document = {"place": place, "id": repository.config.id, "encryption": repository.config.encryption}
    try:
        known = json.loads(record.read_bytes())
    except (OSError, ValueError):
        known = None
    if isinstance(known, dict):
        if known.get("encryption") != "none" and not repository.keys.encrypted:
            raise EncryptionLostError(place, record)
        if known == document:
            return
    # A state directory that cannot be written to is told of where it matters, by the journal.
    with contextlib.suppress(OSError):
        record.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        beside = record.with_suffix(".new")
        beside.write_text(json.dumps(document))
        beside.replace(record)
