"""Every error an administrator can meet: what happened, the detail, what to do, and the exit code.

Rules. A constructor takes facts and keeps them as attributes; the class composes the sentences.
``brief`` is one line; ``resolution`` says what to do. Exceptions of libraries and the kernel are
converted once, where they enter, with ``raise ... from err``. Families below map to exit codes;
the codes are a contract (README, "Exit codes"). Sub-packages define their own errors as children
of these families.
"""

from __future__ import annotations

from typing import ClassVar


class BlocksnapError(Exception):
    """Something the user has to know; the command line prints it and exits with ``exit_code``."""

    exit_code: ClassVar[int] = 1

    def __init__(self, brief: str, *, details: str | None = None, resolution: str | None = None) -> None:
        super().__init__(brief)
        self.brief = brief
        self.details = details
        self.resolution = resolution

    def __str__(self) -> str:
        return self.brief


class UnforeseenError(BlocksnapError):
    """The system refused something in a place that nobody thought of."""

    def __init__(self, err: OSError | UnicodeError) -> None:
        self.err = err
        super().__init__(
            str(err), resolution="if the reason is not plain, please report this with the command"
        )


class UsageError(BlocksnapError):
    """The command or the configuration asks for something that makes no sense (exit code 2)."""

    exit_code = 2


class NoRepositoryError(BlocksnapError):
    """There is no repository where one was named (exit code 10)."""

    exit_code = 10


class BusyError(BlocksnapError):
    """Another run holds what this one needs (exit code 11)."""

    exit_code = 11


class PassphraseError(BlocksnapError):
    """No passphrase, one that opens no key, or one whose key may not do this (exit code 12)."""

    exit_code = 12


class DamageError(BlocksnapError):
    """Stored bytes are not what was written (exit code 13)."""

    exit_code = 13


class VolumeError(BlocksnapError):
    """The volume or its snapshot cannot be backed up (exit code 14)."""

    exit_code = 14


class QuiesceError(BlocksnapError):
    """An application refused to stand still, or could not be asked (exit code 15)."""

    exit_code = 15


class TargetError(BlocksnapError):
    """The place to restore to cannot be used (exit code 1)."""


class StorageError(BlocksnapError):
    """The place that holds the repository fails: full, unreachable, not permitted (exit code 1)."""
