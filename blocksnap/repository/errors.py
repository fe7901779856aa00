"""What can be wrong with a repository."""

from __future__ import annotations

from collections.abc import Iterable

from blocksnap.errors import BlocksnapError, DamageError, NoRepositoryError, PassphraseError, UsageError


class DamagedObjectError(DamageError):
    """An object, or a frame in it, is not what was written."""

    def __init__(self, name: str, reason: str) -> None:
        self.name = name
        self.reason = reason
        super().__init__(
            f"{name} is damaged: {reason}",
            resolution="run: blocksnap check --read-data, to learn which backups are touched",
        )


class MissingChunkError(DamageError):
    """No pack holds a chunk or node that a backup needs."""

    def __init__(self, what: str, id_: bytes) -> None:
        self.id = id_
        super().__init__(
            f"{what} {id_.hex()[:16]} is in no pack of the repository",
            resolution="run: blocksnap check, to learn which backups are touched",
        )


class NotARepositoryError(NoRepositoryError):
    """The place exists, but holds no repository."""

    def __init__(self, place: str) -> None:
        self.place = place
        super().__init__(
            f"{place} is not a blocksnap repository",
            resolution=f"create one with: blocksnap init --repo {place}",
        )


class RepositoryExistsError(UsageError):
    """init was asked for a place that is taken."""

    def __init__(self, place: str) -> None:
        self.place = place
        super().__init__(
            f"{place} holds something already; a repository needs an empty or new directory",
            resolution="name another directory",
        )


class NewerFormatError(BlocksnapError):
    """A repository or an object in it was written by a later version, and is not damaged."""

    def __init__(self, what: str, needs: str) -> None:
        self.what = what
        self.needs = needs
        super().__init__(
            f"{what} needs a newer blocksnap: {needs}",
            resolution="upgrade blocksnap on this host; nothing was changed",
        )


class WrongPassphraseError(PassphraseError):
    """The passphrase opens none of the repository's keys, or not the one that was named."""

    def __init__(self, place: str, *, key: str = "", damaged: int = 0) -> None:
        self.place = place
        self.key = key
        self.damaged = damaged
        which = f"key {key[:8]} of " if key else ""
        super().__init__(
            f"wrong passphrase for {which}repository {place}",
            details=f"{damaged} damaged keys could not be tried" if damaged else None,
            resolution="check --passphrase-file, BLOCKSNAP_PASSPHRASE or BLOCKSNAP_PASSPHRASE_COMMAND",
        )


class NoKeysError(PassphraseError):
    """An encrypted repository has no key any more."""

    def __init__(self, place: str) -> None:
        self.place = place
        super().__init__(
            f"repository {place} has no key left, and nobody can open it",
            resolution="if a copy of the repository has its folder keys/, copy that back",
        )


class NoPassphraseError(PassphraseError):
    """An encrypted repository was opened without a passphrase."""

    def __init__(self, place: str) -> None:
        self.place = place
        super().__init__(
            f"repository {place} is encrypted and no passphrase was given",
            resolution="give --passphrase-file FILE, or set BLOCKSNAP_PASSPHRASE",
        )


class MissingRightError(PassphraseError):
    """The key that the passphrase opened is of a role that may not do this."""

    def __init__(self, role: str, needed: str, holders: Iterable[str]) -> None:
        self.role = role
        self.needed = needed
        self.holders = tuple(holders)
        roles = " or ".join(filter(None, (", ".join(self.holders[:-1]), self.holders[-1])))
        super().__init__(
            f"the passphrase is that of a {role} key, and {needed} needs role {roles}",
            resolution="give the passphrase of such a key; see what there is with: blocksnap key list",
        )


class NotEnoughMemoryError(BlocksnapError):
    """The host has too little memory for what a key object says its passphrase costs."""

    def __init__(self, memory_bytes: int) -> None:
        self.memory_bytes = memory_bytes
        super().__init__(
            f"opening a key takes {memory_bytes >> 20} MiB of memory, which this host does not have free",
            resolution="free some memory, or raise the limit of this process",
        )


class NoSuchKeyError(UsageError):
    """No key, or more than one, answers to a name."""

    def __init__(self, name: str, matches: int = 0) -> None:
        self.name = name
        self.matches = matches
        brief = f"{name!r} names {matches} keys" if matches else f"there is no key {name!r}"
        super().__init__(
            brief,
            resolution="give more of its id" if matches else "see what there is with: blocksnap key list",
        )


class NoSuchBackupError(UsageError):
    """No backup, or more than one, answers to a name."""

    def __init__(self, name: str, matches: int = 0) -> None:
        self.name = name
        self.matches = matches
        brief = f"{name!r} names {matches} backups" if matches else f"there is no backup {name!r}"
        super().__init__(
            brief,
            resolution="give more of its id" if matches else "see what there is with: blocksnap list",
        )


class FencedError(BlocksnapError):
    """Another run ended this writer, because it seemed dead."""

    def __init__(self, writer: str) -> None:
        self.writer = writer
        super().__init__(
            f"this run (writer {writer[:8]}) was silent for too long and has been shut out",
            resolution="run the backup again; what it stored will be found and not be stored twice",
        )
