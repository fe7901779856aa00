"""Where a passphrase comes from: never from the arguments, which every user of the host can read."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import click

from blocksnap.errors import PassphraseError

if TYPE_CHECKING:
    from blocksnap.config import RepositorySettings


@dataclass(frozen=True, slots=True)
class Source:
    """The places in which one passphrase is looked for; variables are named after ``variable``."""

    variable: str
    prompt: str
    credential: str

    def find(
        self, path: str | None, *, configured: RepositorySettings | None = None, confirm: bool = False
    ) -> bytes | None:
        """Return the passphrase from the first place that has one, or None.

        ``path`` is a file that was named for it, then come the variable itself, _FILE and _COMMAND, what
        is ``configured`` for the repository, the usual systemd credential, and at last the terminal. Raises
        PassphraseError when that place does not give one.
        """
        if path:
            return _read_secret(path)
        if self.variable in os.environ:
            return _not_empty(os.environb[self.variable.encode()], self.variable)
        if path := os.environ.get(f"{self.variable}_FILE"):
            return _read_secret(path)
        if command := os.environ.get(f"{self.variable}_COMMAND"):
            return _ask_command(_split(command, f"{self.variable}_COMMAND"), f"{self.variable}_COMMAND")
        if configured and (secret := _configured(configured)) is not None:
            return secret
        if (secret := _credential(self.credential)) is not None:
            return secret
        if sys.stdin.isatty():
            asked: str = click.prompt(self.prompt, hide_input=True, confirmation_prompt=confirm, err=True)
            return _not_empty(asked.encode(errors="surrogateescape"), "the passphrase")
        if configured and (name := configured.passphrase_credential):
            raise PassphraseError(
                f"systemd has given this service no credential {name}"
                if "INVOCATION_ID" in os.environ
                else f"the passphrase is a credential of systemd ({name}), and this is none of its services",
                resolution=f"have the unit load it (LoadCredentialEncrypted={name}:FILE in a drop-in), "
                "or give --passphrase-file FILE",
            )
        return None


CURRENT = Source("BLOCKSNAP_PASSPHRASE", "Passphrase", "blocksnap.passphrase")
NEW = Source("BLOCKSNAP_NEW_PASSPHRASE", "New passphrase", "blocksnap.new-passphrase")


def _read_secret(path: str) -> bytes:
    try:
        with open(path, "rb") as file:
            secret = file.readline().rstrip(b"\r\n")
    except OSError as err:
        raise PassphraseError(f"cannot read the passphrase from {path}: {err.strerror}") from err
    return _not_empty(secret, f"the passphrase file {path}")


def _not_empty(secret: bytes, source: str) -> bytes:
    if not secret:
        raise PassphraseError(f"{source} is empty", resolution="give a passphrase that nobody guesses")
    return secret


def _configured(repository: RepositorySettings) -> bytes | None:
    if repository.passphrase_file:
        return _read_secret(repository.passphrase_file)
    if repository.passphrase_command:
        return _ask_command(repository.passphrase_command, "passphrase_command")
    # Without systemd, by hand for example, there are no credentials, and the next place is asked.
    return _credential(repository.passphrase_credential) if repository.passphrase_credential else None


def _credential(name: str) -> bytes | None:
    """Return a credential that systemd gave to this service (systemd.exec(5)); None when it gave none."""
    directory = os.environ.get("CREDENTIALS_DIRECTORY")
    path = f"{directory}/{name}"
    return _read_secret(path) if directory and os.path.exists(path) else None


def _split(command: str, variable: str) -> list[str]:
    import shlex

    try:
        words = shlex.split(command)
    except ValueError as err:
        raise PassphraseError(f"{variable} is no command: {err}") from err
    if not words:
        raise PassphraseError(f"{variable} is blank", resolution="unset it, or name a command")
    return words


def _ask_command(words: Sequence[str], source: str) -> bytes:
    from blocksnap.system.command import CommandError, MissingProgramError, run

    try:
        answer = run(*words).split("\n", 1)[0].rstrip("\r")
    except (CommandError, MissingProgramError) as err:
        failure = err.brief
    else:
        return _not_empty(answer.encode(errors="surrogateescape"), f"what {source} printed")
    # Not from within: what the library raised carries what the command printed.
    raise PassphraseError(f"{source}: {failure}", resolution="see what it says when you run it by hand")
