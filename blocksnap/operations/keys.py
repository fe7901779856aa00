"""Add, remove and change the keys of a repository.

Whatever step is the last that is done, at least one key opens the repository afterwards: a key is replaced
only after the new one was read back and opened, and the last admin key is removed only by force. Only
removing deletes; a storage that refuses it leaves the key, and says so.
"""

from __future__ import annotations

from collections.abc import Sequence

from blocksnap.backends.errors import ObjectMissingError
from blocksnap.errors import BlocksnapError, StorageError, UsageError
from blocksnap.repository.documents import Key, KeyAbout
from blocksnap.repository.errors import DamagedObjectError
from blocksnap.repository.key_objects import (
    FOLDER,
    OpenKey,
    create_key,
    find_key_name,
    first_opened,
    list_keys,
    open_key,
    read_key,
)
from blocksnap.repository.keys import Right, Role
from blocksnap.repository.repository import Repository


class NotEncryptedError(UsageError):
    """Keys were asked for where there are none."""

    def __init__(self, place: str) -> None:
        self.place = place
        super().__init__(
            f"repository {place} is not encrypted, so it has no keys",
            resolution="whether it is encrypted was decided by: blocksnap init",
        )


class StrangeKeyError(BlocksnapError):
    """A key lies there that was made for another repository, or by an init that was interrupted."""

    def __init__(self, about: KeyAbout) -> None:
        self.key = about.id
        super().__init__(
            f"key {about.id[:8]} ({about.role}) opens another repository, or the config object was replaced",
            resolution=f"if this repository opens with your passphrase: blocksnap key remove {about.id[:8]}",
        )


class PassphraseInUseError(UsageError):
    """A new passphrase opens a key already, and the first key that it opens would decide the role."""

    def __init__(self, about: KeyAbout) -> None:
        self.key = about.id
        super().__init__(
            f"the new passphrase opens key {about.id[:8]} ({about.role}) already",
            resolution="give another passphrase: each key has its own",
        )


class LastKeyError(UsageError):
    """Without this key nobody could do something any more."""

    def __init__(self, key: str, *, only: bool) -> None:
        self.key = key
        what, lost = ("key", "open the repository") if only else ("admin key", "add or remove keys")
        super().__init__(
            f"{key[:8]} is the last {what}: without it nobody can {lost}, ever again",
            resolution="add another admin key first (blocksnap key add --role admin), or say --force",
        )


class KeyNotRemovedError(StorageError):
    """The storage refused to delete a key (exit code 1)."""

    def __init__(self, key: str, err: StorageError, *, done: str = "") -> None:
        self.key = key
        super().__init__(
            f"{done}key {key[:8]} could not be removed and still opens the repository: {err.brief}",
            details="removing a key deletes an object, which an append-only storage refuses",
            resolution=f"where the storage may be deleted from, run: blocksnap key remove {key[:8]}",
        )


def add_key(repository: Repository, passphrase: bytes, *, role: Role, label: str, host: str) -> Key:
    """Let a passphrase open the repository in a role.

    Raises MissingRightError unless the repository was opened by an admin, and PassphraseInUseError.
    """
    opened = _require_key(repository)
    repository.keys.require(Right.ADMINISTER)
    taken = _opened_by(repository, passphrase)
    if taken:
        raise PassphraseInUseError(taken.about)
    return _create(repository, opened, role, passphrase, label=label, host=host)


def remove_key(repository: Repository, prefix: str, *, force: bool) -> str:
    """Remove the key whose id begins so, and return the id.

    Raises MissingRightError unless the repository was opened by an admin, NoSuchKeyError,
    KeyNotRemovedError, and LastKeyError when no admin key would be left and ``force`` is not said.
    """
    _require_key(repository)
    repository.keys.require(Right.ADMINISTER)
    backend = repository.backend
    name = find_key_name(backend, prefix)
    id_ = name.removeprefix(FOLDER)
    if not force:
        _require_admin([key for key in _keys(repository) if key.about.id != id_], id_)
    stored = backend.read(name)
    _delete(repository, id_)
    if not force:
        try:
            _require_admin(_keys(repository), id_)
        except LastKeyError:
            # Another admin removed the other key meanwhile; whoever comes last puts theirs back.
            backend.put(name, stored)
            raise
    return id_


def change_passphrase(repository: Repository, passphrase: bytes) -> tuple[KeyAbout, str]:
    """Give the key that opened the repository another passphrase; return the new key and the old one's id.

    Run again after an interruption it goes on where it was. Raises PassphraseInUseError, KeyNotRemovedError.
    """
    old = _require_key(repository)
    taken = _opened_by(repository, passphrase)
    if taken is None:
        about = old.about
        new = _create(repository, old, about.role, passphrase, label=about.label, host=about.host).about
    elif _is_successor(taken.about, old.about):
        new = taken.about
    else:
        raise PassphraseInUseError(taken.about)
    _delete(repository, old.about.id, done="the new passphrase works, but ")
    return new, old.about.id


def _require_key(repository: Repository) -> OpenKey:
    if repository.key is None:
        raise NotEncryptedError(repository.backend.place)
    return repository.key


def _create(
    repository: Repository, opened: OpenKey, role: Role, passphrase: bytes, *, label: str, host: str
) -> Key:
    backend = repository.backend
    made = create_key(
        backend, repository.keys, role, passphrase, config=opened.about.config, label=label, host=host
    )
    # What was asked to be stored is nothing to rely on before it was read back and has opened.
    name = FOLDER + made.about.id
    stored = read_key(backend, name)
    if _open(repository, opened, stored, passphrase) is None:
        raise DamagedObjectError(name, "it was just made, and does not open")
    return stored


def _open(repository: Repository, opened: OpenKey, key: Key, passphrase: bytes) -> OpenKey | None:
    return open_key(
        key, passphrase, config=opened.about.config, repository_id=bytes.fromhex(repository.config.id)
    )


def _opened_by(repository: Repository, passphrase: bytes) -> OpenKey | None:
    return first_opened(
        _keys(repository),
        passphrase,
        config=_require_key(repository).about.config,
        repository_id=bytes.fromhex(repository.config.id),
        note=_pass_over,
    )


def _keys(repository: Repository) -> list[Key]:
    config = _require_key(repository).about.config
    return [key for key in list_keys(repository.backend, _pass_over) if key.about.config == config]


def _pass_over(err: BlocksnapError) -> None:
    """A damaged key opens nothing and counts as none; who opens the repository is warned of it."""


def _is_successor(new: KeyAbout, old: KeyAbout) -> bool:
    """Tell whether an interrupted change of ``old`` has made ``new``."""
    alike = (new.role, new.label, new.host) == (old.role, old.label, old.host)
    return alike and new.id != old.id and new.created > old.created


def _require_admin(keys: Sequence[Key], removed: str) -> None:
    if not any(key.about.role is Role.ADMIN for key in keys):
        raise LastKeyError(removed, only=not keys)


def _delete(repository: Repository, id_: str, *, done: str = "") -> None:
    try:
        repository.backend.delete(FOLDER + id_)
    except ObjectMissingError:
        # Somebody else has just removed it.
        return
    except StorageError as err:
        raise KeyNotRemovedError(id_, err, done=done) from err
