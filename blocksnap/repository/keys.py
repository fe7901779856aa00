"""Keys: one random master key, what is derived from it, and how a passphrase wraps what a role holds.

``id_key`` names data chunks, ``meta_key`` names and seals everything else. Data chunks are sealed to the
public half of ``data_secret``, so that who writes need not be able to read. Manifests are signed with
``commit_secret`` and what is to be deleted with ``collect_secret``, so that who can read metadata can
neither make backups nor have some removed. A role is the set of keys its holder has: what it may not do it
has no key for (docs/design.md, "Ids and keys").

Every frame has its own AES-256-GCM key, derived from the salt and the id in its header, and used once; hence
the nonce is zero and no writer keeps state.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum, StrEnum
from functools import cached_property
from typing import TYPE_CHECKING

from blake3 import blake3

from blocksnap.repository.errors import MissingRightError, NotEnoughMemoryError

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM

KEY_SIZE = 32
DATA_TYPE = 1
_CONTEXT = "blocksnap 2026-11 v1 "
_ID_TYPES = 32


class Role(StrEnum):
    """What the holder of a key is there for."""

    ADMIN = "admin"
    RESTORE = "restore"
    BACKUP = "backup"
    GC = "gc"


class Right(Enum):
    """What a command may need, as its refusal says it."""

    READ = "reading stored data"
    STORE = "backing up"
    IDENTIFY = "recognising chunks by their content"
    COLLECT = "removing what no backup needs"
    ADMINISTER = "making and removing keys"


RIGHTS: Mapping[Role, frozenset[Right]] = {
    Role.ADMIN: frozenset(Right),
    Role.RESTORE: frozenset({Right.READ, Right.IDENTIFY}),
    Role.BACKUP: frozenset({Right.STORE, Right.IDENTIFY}),
    Role.GC: frozenset({Right.COLLECT}),
}
HELD: Mapping[Role, frozenset[str]] = {
    Role.ADMIN: frozenset({"master"}),
    Role.RESTORE: frozenset({"id_key", "meta_key", "data_secret", "commit_public", "collect_public"}),
    Role.BACKUP: frozenset({"id_key", "meta_key", "data_public", "commit_secret", "collect_public"}),
    Role.GC: frozenset({"meta_key", "commit_public", "collect_secret"}),
}
"""The keys by which a role is what it is."""
_SIGNED_WITH: Mapping[Right, str] = {Right.STORE: "commit", Right.COLLECT: "collect"}


@dataclass(frozen=True)
class KeyRing:
    """What a process has to name, seal and open the frames of one repository.

    A key that its role does not hold is None. What needs one that is missing raises MissingRightError.
    """

    repository_id: bytes
    role: Role
    encrypted: bool
    # Never in a traceback.
    meta_key: bytes = field(repr=False)
    id_key: bytes | None = field(default=None, repr=False)
    data_secret: bytes | None = field(default=None, repr=False)
    data_public: bytes | None = field(default=None, repr=False)
    commit_secret: bytes | None = field(default=None, repr=False)
    commit_public: bytes | None = field(default=None, repr=False)
    collect_secret: bytes | None = field(default=None, repr=False)
    collect_public: bytes | None = field(default=None, repr=False)
    master: bytes | None = field(default=None, repr=False)

    @classmethod
    def from_master(cls, master: bytes, *, repository_id: bytes) -> KeyRing:
        """Derive the keys of an encrypted repository, all of them."""
        return cls(
            repository_id,
            Role.ADMIN,
            encrypted=True,
            master=master,
            id_key=_derive("id key", master),
            meta_key=_derive("meta key", master),
            data_secret=(data := _derive("data secret", master)),
            data_public=_x25519_public(data),
            commit_secret=(commit := _derive("commit secret", master)),
            commit_public=_ed25519_public(commit),
            collect_secret=(collect := _derive("collect secret", master)),
            collect_public=_ed25519_public(collect),
        )

    @classmethod
    def of_role(cls, role: Role, held: Mapping[str, bytes], *, repository_id: bytes) -> KeyRing:
        """Return the ring of a role from what its key object held; raises ValueError when that is not it."""
        if held.keys() != HELD[role]:
            raise ValueError(f"these are not the keys of role {role}")
        if role is Role.ADMIN:
            return cls.from_master(held["master"], repository_id=repository_id)
        secrets = {"data": _x25519_public, "commit": _ed25519_public, "collect": _ed25519_public}
        halves = {
            f"{name}_public": public(held[f"{name}_secret"])
            for name, public in secrets.items()
            if f"{name}_secret" in held
        }
        return cls(repository_id, role, encrypted=True, **{**held, **halves})

    @classmethod
    def plain(cls, repository_id: bytes) -> KeyRing:
        """Return the keys, known to everybody, of a repository without encryption."""
        zero = bytes(KEY_SIZE)
        return cls(repository_id, Role.ADMIN, encrypted=False, id_key=zero, meta_key=zero)

    def require(self, right: Right) -> None:
        """Raise MissingRightError unless this ring's role has a right."""
        if right not in RIGHTS[self.role]:
            holders = [role for role in Role if right in RIGHTS[role]]
            raise MissingRightError(self.role, right.value, holders)

    def may(self, right: Right) -> bool:
        """Tell whether this ring's role has a right."""
        return right in RIGHTS[self.role]

    def held_by(self, role: Role) -> dict[str, bytes]:
        """Return what a key object of a role holds: only an admin can tell for others than its own role."""
        if role is not self.role:
            self.require(Right.ADMINISTER)
        held = {name: getattr(self, name) for name in sorted(HELD[role])}
        return {name: _present(key, self, Right.ADMINISTER) for name, key in held.items()}

    @cached_property
    def _id_keys(self) -> tuple[bytes | None, ...]:
        keys: list[bytes | None] = [_derive(f"id of type {kind}", self.meta_key) for kind in range(_ID_TYPES)]
        keys[DATA_TYPE] = _derive(f"id of type {DATA_TYPE}", self.id_key) if self.id_key else None
        return tuple(keys)

    @cached_property
    def index_key(self) -> bytes:
        """Key of the checksum at the end of an index segment.

        The repository's id is in it because without encryption ``meta_key`` is the same everywhere.
        """
        return _derive("index key", self.meta_key + self.repository_id)

    @cached_property
    def cache_key(self) -> bytes:
        """Key of the checksums in what a host keeps of the index for itself."""
        return _derive("cache key", self.meta_key + self.repository_id)

    def identify(self, kind: int, plain: bytes | memoryview) -> bytes:
        """Return the 32-byte id of a blob: keyed BLAKE3, with a key for each type."""
        return blake3(plain, key=_present(self._id_keys[kind], self, Right.IDENTIFY)).digest()

    def new_sender(self) -> tuple[bytes, bytes]:
        """Return a fresh public key and the run key it stands for; nothing that could repeat it is kept."""
        from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey

        recipient = _present(self.data_public, self, Right.STORE)
        once = X25519PrivateKey.generate()
        sender = once.public_key().public_bytes_raw()
        return sender, self._run_key(once.exchange(X25519PublicKey.from_public_bytes(recipient)), sender)

    def run_key(self, sender: bytes) -> bytes:
        """Return the run key that a sender stands for; raises ValueError when it is no public key."""
        from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PublicKey

        return self._run_key(self._data_private.exchange(X25519PublicKey.from_public_bytes(sender)), sender)

    @cached_property
    def _data_private(self) -> X25519PrivateKey:
        from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

        return X25519PrivateKey.from_private_bytes(_present(self.data_secret, self, Right.READ))

    def _run_key(self, shared: bytes, sender: bytes) -> bytes:
        # The id key is part of it, so that breaking X25519 alone opens nothing.
        key = _derive("run key", _present(self.id_key, self, Right.IDENTIFY))
        return blake3(shared + sender + _present(self.data_public, self, Right.STORE), key=key).digest()

    def sign(self, message: bytes, right: Right) -> bytes:
        """Return the Ed25519 signature (64 bytes) of one who has a right: to store, or to collect."""
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

        secret: bytes | None = getattr(self, f"{_SIGNED_WITH[right]}_secret")
        return Ed25519PrivateKey.from_private_bytes(_present(secret, self, right)).sign(message)

    def is_signed(self, message: bytes, signature: bytes, right: Right) -> bool:
        """Tell whether one who has a right signed a message; False too where nothing is signed."""
        from cryptography.exceptions import InvalidSignature
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

        public: bytes | None = getattr(self, f"{_SIGNED_WITH[right]}_public")
        if public is None:
            return False
        try:
            Ed25519PublicKey.from_public_bytes(public).verify(signature, message)
        except InvalidSignature:
            return False
        return True


def frame_cipher(key: bytes, *, salt: bytes, id_: bytes) -> AESGCM:
    """Return the cipher of one frame from the meta key or a run key."""
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM

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
    """Return the key that wraps key material: argon2id, version 1.3 (RFC 9106)."""
    from cryptography.hazmat.primitives.kdf.argon2 import Argon2id

    kdf = Argon2id(
        salt=salt, length=KEY_SIZE, iterations=cost.passes, lanes=cost.lanes, memory_cost=cost.memory_kib
    )
    try:
        return kdf.derive(passphrase)
    except MemoryError as err:
        raise NotEnoughMemoryError(cost.memory_kib << 10) from err


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


def _present(key: bytes | None, ring: KeyRing, right: Right) -> bytes:
    if key is None:
        ring.require(right)
        raise ValueError("a repository without encryption has no such key")
    return key


def _derive(purpose: str, material: bytes) -> bytes:
    return blake3(material, derive_key_context=_CONTEXT + purpose).digest()


def _x25519_public(secret: bytes) -> bytes:
    from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

    return X25519PrivateKey.from_private_bytes(secret).public_key().public_bytes_raw()


def _ed25519_public(secret: bytes) -> bytes:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    return Ed25519PrivateKey.from_private_bytes(secret).public_key().public_bytes_raw()
