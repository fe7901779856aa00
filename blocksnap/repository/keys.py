"""Keys: one random master key, what is derived from it, and how passphrases wrap it.

From the master key come three: ``id_key`` names blobs, ``data_key`` seals data chunks, ``meta_key`` seals
everything else, so that a later role may be given the last without the second. Every frame has
its own AES-256-GCM key, derived from the salt and the id in its header, and is used once; hence
the nonce is zero and no writer keeps state (docs/design.md, "Keys").
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

from blake3 import blake3

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM

KEY_SIZE = 32
DATA_TYPE = 1
_CONTEXT = "blocksnap 2026-11 v1 "


@dataclass(frozen=True)
class KeyRing:
    """What a process needs to name, seal and open the frames of one repository."""

    repository_id: bytes
    # Never in a traceback.
    id_key: bytes = field(repr=False)
    data_key: bytes = field(repr=False)
    meta_key: bytes = field(repr=False)
    encrypted: bool

    @classmethod
    def from_master(cls, master: bytes, *, repository_id: bytes) -> KeyRing:
        """Derive the keys of an encrypted repository."""
        return cls(
            repository_id,
            id_key=_derive("id key", master),
            data_key=_derive("data key", master),
            meta_key=_derive("meta key", master),
            encrypted=True,
        )

    @classmethod
    def plain(cls, repository_id: bytes) -> KeyRing:
        """Return the keys, known to everybody, of a repository without encryption."""
        zero = bytes(KEY_SIZE)
        return cls(repository_id, id_key=zero, data_key=zero, meta_key=zero, encrypted=False)

    @cached_property
    def _id_keys(self) -> tuple[bytes, ...]:
        return tuple(_derive(f"id of type {kind}", self.id_key) for kind in range(32))

    @cached_property
    def index_key(self) -> bytes:
        """Key of the checksum at the end of an index segment.

        The repository's id is in it because without encryption ``meta_key`` is the same everywhere.
        """
        return _derive("index key", self.meta_key + self.repository_id)

    def identify(self, kind: int, plain: bytes | memoryview) -> bytes:
        """Return the 32-byte id of a blob: keyed BLAKE3, with a key for each type."""
        return blake3(plain, key=self._id_keys[kind]).digest()

    def frame_cipher(self, kind: int, *, salt: bytes, id_: bytes) -> AESGCM:
        """Return the cipher of one frame."""
        from cryptography.hazmat.primitives.ciphers.aead import AESGCM

        key = self.data_key if kind == DATA_TYPE else self.meta_key
        return AESGCM(blake3(salt + id_, key=key).digest())


@dataclass(frozen=True, slots=True)
class KdfCost:
    """Work that argon2id does for one guess of a passphrase."""

    memory_kib: int = 65536
    passes: int = 3
    lanes: int = 4


# Second recommended option of RFC 9106, section 4; the first (2 GiB) does not fit small hosts.
DEFAULT_COST = KdfCost()
# A key object from outside may not make opening cheap to guess, nor exhaust the host.
MINIMUM_COST = KdfCost(memory_kib=19456, passes=2, lanes=1)
MAXIMUM_COST = KdfCost(memory_kib=4 << 20, passes=64, lanes=64)


def new_master() -> bytes:
    """Return a fresh random master key."""
    return os.urandom(KEY_SIZE)


def passphrase_key(passphrase: bytes, *, salt: bytes, cost: KdfCost) -> bytes:
    """Return the key that wraps the master key: argon2id, version 1.3 (RFC 9106)."""
    from cryptography.hazmat.primitives.kdf.argon2 import Argon2id

    kdf = Argon2id(
        salt=salt, length=KEY_SIZE, iterations=cost.passes, lanes=cost.lanes, memory_cost=cost.memory_kib
    )
    return kdf.derive(passphrase)


def wrap(secret: bytes, *, wrapping_key: bytes, associated: bytes) -> bytes:
    """Seal key material under a key that is never used again (its salt is random)."""
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM

    return AESGCM(wrapping_key).encrypt(bytes(12), secret, associated)


def unwrap(wrapped: bytes, *, wrapping_key: bytes, associated: bytes) -> bytes | None:
    """Return what ``wrap`` sealed, or None when the key is another one."""
    from cryptography.exceptions import InvalidTag
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM

    try:
        return AESGCM(wrapping_key).decrypt(bytes(12), wrapped, associated)
    except InvalidTag:
        return None


def _derive(purpose: str, material: bytes) -> bytes:
    return blake3(material, derive_key_context=_CONTEXT + purpose).digest()
