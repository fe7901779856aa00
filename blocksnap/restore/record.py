"""What stands at the beginning of a target until the restore is complete.

While a target is written its first 128 KiB, where filesystems, volume managers and partition tables have
what they are recognised by, are zeros but for this record. So nothing takes half a volume for a whole one,
and a restore that was interrupted goes on where it was: what the record says to be there is durable. It
fits a sector, which disks write whole or not at all.

    BLOCKSNAP RESTORING <16 hex digits: BLAKE3 of the document> <document, JSON> <zeros up to 512 bytes>
"""

from __future__ import annotations

from typing import Literal

from blake3 import blake3
from pydantic import BaseModel, ConfigDict, Field, ValidationError

HEAD_BYTES = 128 << 10
RECORD_BYTES = 512
_MAGIC = b"BLOCKSNAP RESTORING "
_DIGITS = 16


RestoreMode = Literal["whole", "with-losses", "in-place"]


class RestoreRecord(BaseModel):
    """Which backup is being written, how far it has come, and the snapshot that leads back."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    repository: str = Field(max_length=32)
    backup: str = Field(max_length=32)
    mode: RestoreMode
    reached: int = Field(default=0, ge=0)
    way_back: str = Field(default="", max_length=200)

    def continues(self, other: RestoreRecord) -> bool:
        """Tell whether this is an earlier state of the same restore as ``other``."""
        mine = (self.repository, self.backup, self.mode)
        return mine == (other.repository, other.backup, other.mode)


def encode_record(record: RestoreRecord) -> bytes:
    """Return the sector that begins an unfinished target."""
    document = record.model_dump_json().encode()
    text = _MAGIC + blake3(document).hexdigest(length=_DIGITS // 2).encode() + b" " + document
    if len(text) > RECORD_BYTES:
        raise ValueError(f"the record of a restore does not fit {RECORD_BYTES} bytes")
    return text.ljust(RECORD_BYTES, b"\0")


def decode_record(sector: bytes) -> RestoreRecord | None:
    """Return the record at the beginning of a target, or None where there is none."""
    if not sector.startswith(_MAGIC):
        return None
    digest, _, document = sector[len(_MAGIC) :].rstrip(b"\0").partition(b" ")
    if blake3(document).hexdigest(length=_DIGITS // 2).encode() != digest:
        return None
    try:
        return RestoreRecord.model_validate_json(document)
    except ValidationError:
        return None
