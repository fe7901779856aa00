"""Documents out of objects: the frame opened, the format looked at, the content validated.

A document of a later format is not damage, whatever else it says; everything else that is not as
it should be is. What is wrong with a document is told without quoting it, since it may hold keys.
"""

from __future__ import annotations

import json
from typing import TypeVar

from blake3 import blake3
from pydantic import BaseModel, ValidationError

from blocksnap.repository import documents
from blocksnap.repository.documents import Fence, Manifest, Signed
from blocksnap.repository.errors import DamagedObjectError, NewerFormatError
from blocksnap.repository.frame import NO_REPOSITORY, FrameHeader, FrameType, Opener, Sealer
from blocksnap.repository.keys import KeyRing, Right

Model = TypeVar("Model", bound=BaseModel)
_PUBLIC = KeyRing.plain(NO_REPOSITORY)
_SIGNED = b"blocksnap 2026-11 v1 signed"


def encode(document: BaseModel) -> bytes:
    """Return a document as it is stored."""
    return document.model_dump_json().encode()


def seal_public(kind: FrameType, document: BaseModel) -> bytes:
    """Return the frame of a document that is readable without a key: the config, or a wrapped key."""
    return Sealer(_PUBLIC).seal(kind, encode(document))


def decode_public(stored: bytes, name: str, kind: FrameType, model: type[Model]) -> Model:
    """Return a document that is readable without a key; raises DamagedObjectError, NewerFormatError."""
    return validate(open_frame(Opener(_PUBLIC), stored, name, kind), name, model)


def open_frame(opener: Opener, stored: bytes, name: str, kind: FrameType) -> bytes | memoryview:
    """Return the plaintext of an object that is one frame and nothing more."""
    view = memoryview(stored)
    plain = opener.open(view, where=name, kind=kind)
    if FrameHeader.parse(view, where=name).frame_length != len(stored):
        raise DamagedObjectError(name, "it is longer than it should be")
    return plain


def validate(plain: bytes | memoryview, name: str, model: type[Model]) -> Model:
    """Return a document; raises DamagedObjectError, NewerFormatError."""
    _require_format(plain, name)
    try:
        return model.model_validate_json(bytes(plain))
    except ValidationError as err:
        raise DamagedObjectError(name, f"it does not say what it should: {_first(err)}") from err


def encode_signed(document: BaseModel, name: str, keys: KeyRing, right: Right) -> bytes:
    """Return a document as it is stored under a name, signed where the repository is encrypted.

    Raises MissingRightError when the keys do not have the right that it takes.
    """
    if not keys.encrypted:
        return encode(document)
    text = document.model_dump_json()
    signature = keys.sign(_signed_bytes(text, name, keys), right)
    return encode(Signed(document=text, signature=signature.hex()))


def open_signed(plain: bytes | memoryview, name: str, keys: KeyRing, right: Right) -> bytes | memoryview:
    """Return a document that was signed for this name; raises DamagedObjectError, NewerFormatError."""
    if not keys.encrypted:
        return plain
    if "signature" not in _require_format(plain, name):
        raise DamagedObjectError(name, "it is not signed")
    signed = validate(plain, name, Signed)
    message, signature = _signed_bytes(signed.document, name, keys), bytes.fromhex(signed.signature)
    if not keys.is_signed(message, signature, right):
        raise DamagedObjectError(name, f"its signature is not that of a key for {right.value}")
    return signed.document.encode()


def _signed_bytes(text: str, name: str, keys: KeyRing) -> bytes:
    return _SIGNED + keys.repository_id + name.encode() + b"\0" + text.encode()


def decode_manifest(plain: bytes | memoryview, name: str, keys: KeyRing) -> Manifest | None:
    """Return a manifest, or None for a fence; raises DamagedObjectError, NewerFormatError."""
    writer = name.removeprefix("manifests/")
    if "fenced" in _require_format(plain, name):
        if validate(plain, name, Fence).writer != writer:
            raise DamagedObjectError(name, "it belongs to another run")
        return None
    manifest = validate(open_signed(plain, name, keys, Right.STORE), name, Manifest)
    if manifest.writer != writer:
        raise DamagedObjectError(name, "it belongs to another run")
    # One that may write must not speak of another's backup: whoever forgets the one would forget the other.
    if any(
        backup.id != backup_id(bytes.fromhex(writer), number)
        for number, backup in enumerate(manifest.backups)
    ):
        raise DamagedObjectError(name, "a backup in it has the id of another run's")
    return manifest


def backup_id(writer: bytes, number: int) -> str:
    """Return the id of a run's n-th backup, counted from 0."""
    return blake3(writer + number.to_bytes(4, "little")).hexdigest()[:32]


def _require_format(plain: bytes | memoryview, name: str) -> dict[str, object]:
    try:
        document = json.loads(bytes(plain))
    except (ValueError, RecursionError):
        # The exception carries the whole text, which may be key material. Who can write to the storage can
        # nest brackets deeper than any parser goes.
        raise DamagedObjectError(name, "it is no document") from None
    if not isinstance(document, dict):
        raise DamagedObjectError(name, "it is no document")
    version = document.get("format")
    if isinstance(version, int) and version > documents.FORMAT_VERSION:
        raise NewerFormatError(name, f"format {version}")
    return document


def _first(err: ValidationError) -> str:
    problem = err.errors(include_input=False)[0]
    place = ".".join(str(part) for part in problem["loc"])
    return f"{place}: {problem['msg']}"
