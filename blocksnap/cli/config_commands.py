"""config check and show."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import click

from blocksnap.cli.context import EXIT_WARNINGS, Settings, common_options
from blocksnap.cli.output import print_json
from blocksnap.errors import UsageError

if TYPE_CHECKING:
    from blocksnap.config_files import KeyPath, Loaded


class NoConfigurationError(UsageError):
    """There is no configuration to look at."""

    def __init__(self, path: str) -> None:
        self.path = path
        super().__init__(
            f"there is no configuration: {path}",
            resolution="write one (docs/configuration.md), or name it with --config",
        )


@click.group("config")
def config_command() -> None:
    """Look at the configuration, before a timer does."""


@config_command.command("check")
@common_options
def check_command(settings: Settings) -> None:
    """Read the configuration, and see whether this host has what it names.

    What is wrong in it is told with file and line (exit code 2). What this host does not have, a volume, a
    passphrase file, is a warning (exit code 3).
    """
    from blocksnap.operations.check_configuration import find_surprises

    loaded = _load(settings)
    surprises = find_surprises(loaded.configuration)
    if settings.json:
        print_json(
            {
                "files": list(loaded.files),
                "warnings": [
                    {
                        "key": _key_text(each.key),
                        "place": _place_text(loaded, each.key),
                        "message": each.message,
                        "resolution": each.advice,
                    }
                    for each in surprises
                ],
            }
        )
    else:
        for each in surprises:
            click.echo(
                f"warning: {_place_text(loaded, each.key)}: {_key_text(each.key)}: {each.message}", err=True
            )
            if each.advice:
                click.echo(f"fix:     {each.advice}", err=True)
        if settings.verbosity >= 0:
            jobs, repositories = loaded.configuration.jobs, loaded.configuration.repositories
            click.echo(f"{len(loaded.files)} files, {len(jobs)} jobs, {len(repositories)} repositories")
    if surprises:
        click.get_current_context().exit(EXIT_WARNINGS)


@config_command.command("show")
@click.option("--job", metavar="NAME", help="Only this job.")
@common_options
def show_command(settings: Settings, *, job: str | None) -> None:
    """Show what holds, defaults included, and in which line it is said.

    The output is itself a configuration.
    """
    loaded = _load(settings)
    document: dict[str, Any] = loaded.configuration.model_dump(mode="json", exclude_none=True)
    if job is not None:
        loaded.configuration.job(job)
        document = {"jobs": {job: document["jobs"][job]}}
    if settings.json:
        print_json({"files": list(loaded.files), "configuration": document})
        return
    for path, value in _leaves(document):
        place = loaded.place_of(path)
        click.echo(f"{_key_text(path)} = {_toml(value)}  # {place or 'default'}")


def _load(settings: Settings) -> Loaded:
    if settings.loaded is None:
        raise NoConfigurationError(settings.configuration_path)
    return settings.loaded


def _place_text(loaded: Loaded, path: KeyPath) -> str:
    for end in range(len(path), 0, -1):
        place = loaded.place_of(path[:end])
        if place is not None:
            return str(place)
    return loaded.files[0]


def _leaves(table: dict[str, Any], prefix: KeyPath = ()) -> Iterator[tuple[KeyPath, Any]]:
    for name, value in table.items():
        if isinstance(value, dict) and value:
            yield from _leaves(value, (*prefix, name))
        elif value != {}:
            yield (*prefix, name), value


def _key_text(path: KeyPath) -> str:
    parts = map(str, path)
    return ".".join(part if re.fullmatch(r"[A-Za-z0-9_-]+", part) else json.dumps(part) for part in parts)


def _toml(value: Any) -> str:  # noqa: ANN401 - a value of a TOML document
    """Write a value as TOML: its strings, numbers and booleans are JSON's, its tables are not."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_key_text((name,))} = {_toml(item)}" for name, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_toml, value)) + "]"
    return json.dumps(value)
