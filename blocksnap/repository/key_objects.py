"""The objects ``keys/<id>``: key material of a role, wrapped by a passphrase.

Any of them opens the repository. One that is damaged does not stand in the way of another.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import UTC, datetime

from pydantic import ValidationError

from blocksnap.backends.base import Backend
from blocksnap.backends.errors import ObjectMissingError
from blocksnap.errors import BlocksnapError, DamageError
from blocksnap.repository import keys as keys_module
from blocksnap.repository.decoding import decode_public, encode, seal_public
from blocksnap.repository.documents import Kdf, Key, KeyAbout, KeyMaterial
from blocksnap.repository.errors import (
    DamagedObjectError,
    NewerFormatError,
    NoKeysError,
    NoSuchKeyError,
    NotEnoughMemoryError,
    WrongPassphraseError,
)
from blocksnap.repository.frame import FrameType
from blocksnap.repository.keys import (
    MAXIMUM_COST,
    MINIMUM_COST,
    KdfCost,
    KeyRing,
    Role,
    passphrase_key,
    unwrap,
    wrap,
)
from blocksnap.repository.pack import read_object

FOLDER = "keys/"


@dataclass(frozen=True, slots=True)
class OpenKey:
    """A key that a passphrase has opened."""

    about: KeyAbout
    ring: KeyRing

    @property
    def name(self) -> str:
        """Name of its object."""
        return FOLDER + self.about.id


def create_key(
    backend: Backend,
    ring: KeyRing,
    role: Role,
    passphrase: bytes,
    *,
    config: str,
    label: str = "",
    host: str = "",
    cost: KdfCost | None = None,
) -> Key:
    """Store what a role holds of a key ring under a passphrase; raises MissingRightError."""
    cost = cost or keys_module.DEFAULT_COST
    about = KeyAbout(
        id=os.urandom(16).hex(),
        created=datetime.now(UTC),
        label=label,
        role=role,
        host=host,
        config=config,
    )
    held = {name: key.hex() for name, key in ring.held_by(role).items()}
    salt = os.urandom(32)
    wrapped = wrap(
        encode(KeyMaterial(about=about, keys=held)),
        wrapping_key=passphrase_key(passphrase, salt=salt, cost=cost),
        associated=salt,
    )
    kdf = Kdf(memory_kib=cost.memory_kib, passes=cost.passes, lanes=cost.lanes, salt=salt.hex())
    key = Key(about=about, kdf=kdf, wrapped=wrapped.hex())
    backend.put(FOLDER + about.id, seal_public(FrameType.KEY, key))
    return key


def read_key(backend: Backend, name: str) -> Key:
    """Return a key object; raises DamagedObjectError, ObjectMissingError."""
    return decode_key(read_object(backend, name), name)


def decode_key(stored: bytes, name: str) -> Key:
    """Return the key object in bytes that were read; raises DamagedObjectError."""
    key = decode_public(stored, name, FrameType.KEY, Key)
    if name != FOLDER + key.about.id:
        raise DamagedObjectError(name, "it is another key's object")
    for field in ("memory_kib", "passes", "lanes"):
        if not getattr(MINIMUM_COST, field) <= getattr(key.kdf, field) <= getattr(MAXIMUM_COST, field):
            raise DamagedObjectError(name, f"its {field} is out of bounds")
    return key


def list_keys(backend: Backend, note: Callable[[BlocksnapError], None]) -> list[Key]:
    """Return all keys, oldest first; ``note`` is told of those that are damaged, or too new to be read."""
    found = []
    for info in sorted(backend.list(FOLDER), key=lambda info: info.name):
        try:
            found.append(read_key(backend, info.name))
        except (DamageError, NewerFormatError) as err:
            note(err)
        except ObjectMissingError:
            # Removed since it was listed.
            continue
    return sorted(found, key=lambda key: (key.about.created, key.about.id))


def find_key_name(backend: Backend, prefix: str) -> str:
    """Return the name of the key whose id begins so, damaged or not; raises NoSuchKeyError."""
    names = [info.name for info in backend.list(FOLDER) if info.name.startswith(FOLDER + prefix)]
    if len(names) != 1 or not prefix:
        raise NoSuchKeyError(prefix, len(names))
    return names[0]


def open_key(key: Key, passphrase: bytes, *, config: str, repository_id: bytes) -> OpenKey | None:
    """Try a passphrase on a key, or return None when it is another one's.

    It costs an argon2id. Raises DamagedObjectError when the passphrase is right and the rest is not.
    """
    name = FOLDER + key.about.id
    if key.about.config != config:
        raise _stranger(key)
    material = _unwrap(key, name, passphrase)
    if material is None:
        return None
    if material.about != key.about:
        raise DamagedObjectError(name, "what it says in the clear is not what it says inside")
    held = {part: bytes.fromhex(value) for part, value in material.keys.items()}
    try:
        ring = KeyRing.of_role(material.about.role, held, repository_id=repository_id)
    except ValueError:
        # Whatever the exception says, it was made from keys.
        raise DamagedObjectError(name, "it does not hold the keys of its role") from None
    return OpenKey(key.about, ring)


def find_open_key(
    backend: Backend,
    passphrase: bytes,
    *,
    config: str,
    repository_id: bytes,
    host: str,
    note: Callable[[BlocksnapError], None],
) -> OpenKey:
    """Return the first key that a passphrase opens; those made for ``host`` are tried first.

    Raises PassphraseError, or DamageError where damage is why none was opened; otherwise ``note`` is told of
    what is damaged.
    """
    unread: list[BlocksnapError] = []
    unfit: list[BlocksnapError] = []
    listed = list_keys(backend, unread.append)
    # One of another repository may lie there since an init that was interrupted.
    found = [key for key in listed if key.about.config == config]
    found.sort(key=lambda key: key.about.host != host)
    opened = first_opened(found, passphrase, config=config, repository_id=repository_id, note=unfit.append)
    if opened is None:
        if unfit:
            raise unfit[0]
        if found:
            raise WrongPassphraseError(backend.place, damaged=len(unread))
        if listed:
            raise _stranger(listed[0])
        raise unread[0] if unread else NoKeysError(backend.place)
    for err in (*unread, *unfit):
        note(err)
    return opened


def first_opened(
    keys: Iterable[Key],
    passphrase: bytes,
    *,
    config: str,
    repository_id: bytes,
    note: Callable[[BlocksnapError], None],
) -> OpenKey | None:
    """Return the first of some keys that a passphrase opens, or None."""
    for key in keys:
        try:
            opened = open_key(key, passphrase, config=config, repository_id=repository_id)
        except (DamageError, NotEnoughMemoryError) as err:
            # One that was made for a larger host, or by somebody who wants nobody in, is no reason to stop.
            note(err)
            continue
        if opened is not None:
            return opened
    return None


def _stranger(key: Key) -> DamagedObjectError:
    return DamagedObjectError(
        FOLDER + key.about.id,
        "it belongs to another repository, or the object config was replaced since it was made",
    )


def _unwrap(key: Key, name: str, passphrase: bytes) -> KeyMaterial | None:
    cost = KdfCost(key.kdf.memory_kib, key.kdf.passes, key.kdf.lanes)
    salt = bytes.fromhex(key.kdf.salt)
    wrapping = passphrase_key(passphrase, salt=salt, cost=cost)
    plain = unwrap(bytes.fromhex(key.wrapped), wrapping_key=wrapping, associated=salt)
    if plain is None:
        return None
    try:
        return KeyMaterial.model_validate_json(plain)
    except ValidationError:
        raise DamagedObjectError(name, "what it wraps makes no sense") from None
