"""Where a passphrase comes from: never from the arguments, which every user of the host can read."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass

import click

from blocksnap.errors import PassphraseError


@dataclass(frozen=True, slots=True)
class Source:
    """The places in which one passphrase is looked for; variables are named after ``variable``."""

    variable: str
    prompt: str
    credential: str

    def find(self, path: str | None, *, configured: str | None = None, confirm: bool = False) -> bytes | None:
        """Return the passphrase from the first place that has one, or None.

        ``path`` is a file that was named for it, then come the variable itself, _FILE and _COMMAND, a
        systemd credential, the ``configured`` file, and at last the terminal. Raises PassphraseError when
        that place does not give one.
        """
        if path:
            return _read_secret(path)
        if self.variable in os.environ:
            return _not_empty(os.environb[self.variable.encode()], self.variable)
        if path := os.environ.get(f"{self.variable}_FILE"):
            return _read_secret(path)
        if command := os.environ.get(f"{self.variable}_COMMAND"):
            return _ask_command(command, f"{self.variable}_COMMAND")
        if directory := os.environ.get("CREDENTIALS_DIRECTORY"):
            path = f"{directory}/{self.credential}"
            if os.path.exists(path):
                return _read_secret(path)
        if configured:
            return _read_secret(configured)
        if sys.stdin.isatty():
            asked: str = click.prompt(self.prompt, hide_input=True, confirmation_prompt=confirm, err=True)
            return _not_empty(asked.encode(errors="surrogateescape"), "the passphrase")
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


def _ask_command(command: str, variable: str) -> bytes:
    import shlex

    from blocksnap.system.command import CommandError, run

    try:
        words = shlex.split(command)
    except ValueError as err:
        raise PassphraseError(f"{variable} is no command: {err}") from err
    if not words:
        raise PassphraseError(f"{variable} is blank", resolution="unset it, or name a command")
    try:
        answer = run(*words).split("\n", 1)[0].rstrip("\r")
    except CommandError as err:
        failure = err.brief
    else:
        return _not_empty(answer.encode(errors="surrogateescape"), f"what {variable} printed")
    # Not from within: what the library raised carries what the command printed.
    raise PassphraseError(f"{variable}: {failure}", resolution="see what it says when you run it by hand")
