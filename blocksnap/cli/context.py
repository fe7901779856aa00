"""What the commands share: options, the repository they open, how they report."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, TypeVar

import click

from blocksnap.cli import passphrases
from blocksnap.cli.reporting import JsonReporter, TextReporter
from blocksnap.errors import BlocksnapError, UsageError

if TYPE_CHECKING:
    from blocksnap.backends.base import Backend
    from blocksnap.config import Configuration, Job, RepositorySettings
    from blocksnap.config_files import Loaded
    from blocksnap.repository.repository import Repository

_Command = TypeVar("_Command", bound=Callable[..., Any])
DEFAULT_STATE_DIRECTORY = "/var/lib/blocksnap"
DEFAULT_CACHE_DIRECTORY = "/var/cache/blocksnap"
DEFAULT_CONFIGURATION = "/etc/blocksnap/blocksnap.toml"
EXIT_WARNINGS = 3


@dataclass(frozen=True)
class Settings:
    """The options every command has."""

    repo: str | None
    passphrase_file: str | None
    json: bool
    verbosity: int
    key: str | None = None
    config: str | None = None
    cache: str | None = None
    no_cache: bool = False
    opened: list[Repository] = field(default_factory=list)
    damage: list[BlocksnapError] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    """All that the command has warned of: with any of them it ends with EXIT_WARNINGS at best."""

    @functools.cached_property
    def loaded(self) -> Loaded | None:
        """What the configuration files say, if there are any."""
        path = self.configuration_path
        folder = os.path.splitext(path)[0] + ".d"
        if not self.config and not any(os.access(place, os.F_OK) for place in (path, folder)):
            return None
        from blocksnap import config_files

        return config_files.load(path, required=self.config is not None)

    @property
    def configuration_path(self) -> str:
        """The configuration file, which need not exist."""
        return self.config or os.environ.get("BLOCKSNAP_CONFIG") or DEFAULT_CONFIGURATION

    @property
    def configuration(self) -> Configuration | None:
        """The configuration, if there is one."""
        return self.loaded.configuration if self.loaded else None

    @functools.cached_property
    def reporter(self) -> TextReporter | JsonReporter:
        """How this command reports."""
        if self.json:
            return JsonReporter(self.warnings)
        return TextReporter(verbosity=self.verbosity, warnings=self.warnings)

    def of_job(self, name: str) -> tuple[Settings, Job]:
        """Return a configured job, and these settings with its repository; raises UsageError."""
        if self.configuration is None:
            raise UsageError(
                f"there is no job {name!r}: there is no configuration file",
                resolution=f"write {self.configuration_path}, or name another one with --config",
            )
        job = self.configuration.job(name)
        return replace(self, repo=self.repo or self.configuration.repository_of(job)), job

    @property
    def names_repository(self) -> bool:
        """Whether anybody said which repository is meant."""
        return bool(self.repo or (self.configuration and self.configuration.repository))

    @property
    def repository_url(self) -> str:
        """Where the repository is; raises UsageError when nobody said."""
        name = self.repo or (self.configuration.repository if self.configuration else None)
        if not name:
            raise UsageError(
                "no repository was named",
                resolution="give --repo URL, set BLOCKSNAP_REPOSITORY, or configure `repository`",
            )
        return self._configured_repository.url if self._configured_repository else name

    @property
    def _configured_repository(self) -> RepositorySettings | None:
        """What the configuration says of the repository that was named, by its name or its URL."""
        if self.configuration is None:
            return None
        name = self.repo or self.configuration.repository
        return self.configuration.find_repository(name) if name else None

    @property
    def state_directory(self) -> str:
        """Where the journal is kept on this host."""
        configured = self.configuration.state_directory if self.configuration else None
        return os.environ.get("BLOCKSNAP_STATE_DIRECTORY") or configured or DEFAULT_STATE_DIRECTORY

    @property
    def cache_directory(self) -> str | None:
        """Where this host may keep what is derived from repositories; None where it is to keep nothing."""
        if self.no_cache:
            return None
        configured = self.configuration.cache_directory if self.configuration else None
        return self.cache or configured or _default_cache_directory()

    def open_backend(self) -> Backend:
        """Open the place that was named, until the command ends."""
        from blocksnap.backends import open_backend

        backend = open_backend(self.repository_url)
        click.get_current_context().call_on_close(backend.close)
        return backend

    def open_repository(self) -> Repository:
        """Open the repository that was named."""
        from blocksnap.repository.repository import Repository
        from blocksnap.system.host import host_name

        backend = self.open_backend()
        configured = self._configured_repository
        key = self.key or (configured.key if configured else None) or ""
        repository = Repository.open(
            backend, self.passphrase, key=key, host=host_name(), cache=self.cache_directory
        )
        self.opened.append(repository)
        return repository

    def warn_of_damage(self) -> bool:
        """Tell on standard error what was found damaged and passed over, and whether there was any."""
        damage = [*self.damage, *(err for repository in self.opened for err in repository.damage)]
        for err in damage:
            click.echo(f"warning: {err.brief}", err=True)
            if err.resolution:
                click.echo(f"fix:     {err.resolution}", err=True)
        return bool(damage)

    def passphrase(self, *, confirm: bool = False) -> bytes | None:
        """Return the passphrase from the first place that has one, or None.

        --passphrase-file, BLOCKSNAP_PASSPHRASE, BLOCKSNAP_PASSPHRASE_FILE,
        BLOCKSNAP_PASSPHRASE_COMMAND, what is configured for the repository, a systemd credential, and at
        last the terminal.
        """
        return passphrases.CURRENT.find(
            self.passphrase_file, configured=self._configured_repository, confirm=confirm
        )


def _default_cache_directory() -> str:
    if os.geteuid() == 0:
        return DEFAULT_CACHE_DIRECTORY
    # The XDG base directory specification: what is not an absolute path is to be passed over.
    base = os.environ.get("XDG_CACHE_HOME", "")
    return os.path.join(base if os.path.isabs(base) else os.path.expanduser("~/.cache"), "blocksnap")


def common_options(command: _Command) -> _Command:
    """Add the options every command has; they arrive as one ``settings`` argument."""

    @functools.wraps(command)
    def wrapped(
        repo: str | None,
        passphrase_file: str | None,
        key: str | None,
        config: str | None,
        cache_dir: str | None,
        *,
        no_cache: bool,
        json: bool,
        quiet: bool,
        verbose: int,
        **arguments: object,
    ) -> object:
        settings = Settings(
            repo, passphrase_file, json, -1 if quiet else verbose, key, config, cache_dir, no_cache
        )
        result = command(settings=settings, **arguments)
        if settings.warn_of_damage() or settings.warnings:
            click.get_current_context().exit(EXIT_WARNINGS)
        return result

    options = [
        click.option(
            "--repo",
            envvar="BLOCKSNAP_REPOSITORY",
            metavar="URL",
            help="The repository: a directory, or a name from the configuration.",
        ),
        click.option(
            "--config",
            metavar="FILE",
            help=f"Another configuration file than {DEFAULT_CONFIGURATION} or BLOCKSNAP_CONFIG.",
        ),
        click.option(
            "--passphrase-file",
            metavar="FILE",
            help="File whose first line is the passphrase; BLOCKSNAP_PASSPHRASE, "
            "BLOCKSNAP_PASSPHRASE_COMMAND or a systemd credential do as well.",
        ),
        click.option(
            "--key",
            envvar="BLOCKSNAP_KEY",
            metavar="ID",
            help="Try the passphrase on this key only, instead of one after the other.",
        ),
        click.option(
            "--cache-dir",
            envvar="BLOCKSNAP_CACHE",
            metavar="DIR",
            help="Where to keep the index of repositories between runs, which is for speed alone.",
        ),
        click.option("--no-cache", is_flag=True, help="Neither use nor write such a directory."),
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
