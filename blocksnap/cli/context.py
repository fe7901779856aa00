"""What the commands share: options, the repository they open, how they report."""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

import click

from blocksnap.cli.reporting import JsonReporter, TextReporter
from blocksnap.errors import PassphraseError, UsageError

if TYPE_CHECKING:
    from blocksnap.config import Configuration
    from blocksnap.repository.repository import Repository

_Command = TypeVar("_Command", bound=Callable[..., Any])
DEFAULT_STATE_DIRECTORY = "/var/lib/blocksnap"
EXIT_WARNINGS = 3
_CREDENTIAL = "blocksnap.passphrase"


@dataclass(frozen=True)
class Settings:
    """The options every command has."""

    repo: str | None
    passphrase_file: str | None
    json: bool
    verbosity: int
    opened: list[Repository] = field(default_factory=list)

    @functools.cached_property
    def configuration(self) -> Configuration | None:
        """The configuration file, if there is one."""
        from blocksnap import config

        return config.load_configuration() if config.configuration_exists() else None

    @functools.cached_property
    def reporter(self) -> TextReporter | JsonReporter:
        """How this command reports."""
        return JsonReporter() if self.json else TextReporter(verbosity=self.verbosity)

    @property
    def repository_url(self) -> str:
        """Where the repository is; raises UsageError when nobody said."""
        url = self.repo or (self.configuration.repository if self.configuration else None)
        if not url:
            raise UsageError(
                "no repository was named",
                resolution="give --repo URL, set BLOCKSNAP_REPOSITORY, or configure `repository`",
            )
        return url

    @property
    def state_directory(self) -> str:
        """Where the journal is kept on this host."""
        configured = self.configuration.state_directory if self.configuration else None
        return os.environ.get("BLOCKSNAP_STATE_DIRECTORY") or configured or DEFAULT_STATE_DIRECTORY

    def open_repository(self) -> Repository:
        """Open the repository that was named."""
        from blocksnap.backends import open_backend
        from blocksnap.repository.repository import Repository

        backend = open_backend(self.repository_url)
        click.get_current_context().call_on_close(backend.close)
        repository = Repository.open(backend, self.passphrase)
        self.opened.append(repository)
        return repository

    def warn_of_damage(self) -> bool:
        """Tell on standard error what was found damaged and passed over, and whether there was any."""
        damage = [err for repository in self.opened for err in repository.damage]
        for err in damage:
            click.echo(f"warning: {err.brief}", err=True)
            if err.resolution:
                click.echo(f"fix:     {err.resolution}", err=True)
        return bool(damage)

    def passphrase(self, *, confirm: bool = False) -> bytes | None:
        """Return the passphrase from the first place that has one, or None.

        --passphrase-file, BLOCKSNAP_PASSPHRASE, BLOCKSNAP_PASSPHRASE_FILE,
        BLOCKSNAP_PASSPHRASE_COMMAND, a systemd credential, the configuration, and at last the
        terminal.
        """
        if self.passphrase_file:
            return _read_secret(self.passphrase_file)
        if "BLOCKSNAP_PASSPHRASE" in os.environ:
            return _not_empty(os.environb[b"BLOCKSNAP_PASSPHRASE"], "BLOCKSNAP_PASSPHRASE")
        if path := os.environ.get("BLOCKSNAP_PASSPHRASE_FILE"):
            return _read_secret(path)
        if command := os.environ.get("BLOCKSNAP_PASSPHRASE_COMMAND"):
            return _ask_command(command)
        if directory := os.environ.get("CREDENTIALS_DIRECTORY"):
            path = f"{directory}/{_CREDENTIAL}"
            if os.path.exists(path):
                return _read_secret(path)
        if self.configuration and self.configuration.passphrase_file:
            return _read_secret(self.configuration.passphrase_file)
        if sys.stdin.isatty():
            asked: str = click.prompt("Passphrase", hide_input=True, confirmation_prompt=confirm, err=True)
            return _not_empty(asked.encode(), "the passphrase")
        return None


def common_options(command: _Command) -> _Command:
    """Add the options every command has; they arrive as one ``settings`` argument."""

    @functools.wraps(command)
    def wrapped(
        repo: str | None,
        passphrase_file: str | None,
        *,
        json: bool,
        quiet: bool,
        verbose: int,
        **arguments: object,
    ) -> object:
        settings = Settings(repo, passphrase_file, json, -1 if quiet else verbose)
        result = command(settings=settings, **arguments)
        if settings.warn_of_damage():
            click.get_current_context().exit(EXIT_WARNINGS)
        return result

    options = [
        click.option(
            "--repo", envvar="BLOCKSNAP_REPOSITORY", metavar="URL", help="The repository: a directory."
        ),
        click.option(
            "--passphrase-file",
            metavar="FILE",
            help="File whose first line is the passphrase; BLOCKSNAP_PASSPHRASE, "
            "BLOCKSNAP_PASSPHRASE_COMMAND or a systemd credential do as well.",
        ),
        click.option(
            "--json", is_flag=True, help="Print JSON: one document, or one event a line while running."
        ),
        click.option("-q", "--quiet", is_flag=True, help="Say only what went wrong."),
        click.option("-v", "--verbose", count=True, help="Say more."),
    ]
    decorated: Any = wrapped
    for option in reversed(options):
        decorated = option(decorated)
    return decorated  # type: ignore[no-any-return]


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


def _ask_command(command: str) -> bytes:
    import shlex

    from blocksnap.system.command import run

    try:
        words = shlex.split(command)
    except ValueError as err:
        raise PassphraseError(f"BLOCKSNAP_PASSPHRASE_COMMAND is no command: {err}") from err
    if not words:
        raise PassphraseError(
            "BLOCKSNAP_PASSPHRASE_COMMAND is blank", resolution="unset it, or name a command"
        )
    answer = run(*words).split("\n", 1)[0].rstrip("\r")
    return _not_empty(answer.encode(errors="surrogateescape"), "what BLOCKSNAP_PASSPHRASE_COMMAND printed")
