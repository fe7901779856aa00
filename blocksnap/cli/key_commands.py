"""key: list, add, remove, change and show the keys that open a repository."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from blocksnap.cli import passphrases
from blocksnap.cli.context import Settings, common_options
from blocksnap.cli.output import format_size, format_time, print_facts, print_json, print_table
from blocksnap.errors import PassphraseError, UsageError

if TYPE_CHECKING:
    from blocksnap.repository.documents import Key, KeyAbout

_ROLES = ("admin", "restore", "backup", "gc")
_new_passphrase_option = click.option(
    "--new-passphrase-file",
    metavar="FILE",
    help="File whose first line is the new passphrase; BLOCKSNAP_NEW_PASSPHRASE and "
    "BLOCKSNAP_NEW_PASSPHRASE_COMMAND do as well, or the terminal is asked.",
)


@click.group("key")
def key_command() -> None:
    """Manage the keys that open a repository.

    Each has a passphrase of its own and a role: admin (everything), restore (reads everything), backup
    (stores, and cannot read what is stored), gc (prunes, and cannot read data).
    """


@key_command.command("list")
@common_options
def list_command(settings: Settings) -> None:
    """List the keys, oldest first; needs no passphrase."""
    from blocksnap.operations.keys import StrangeKeyError
    from blocksnap.repository.key_objects import list_keys
    from blocksnap.repository.repository import load_config

    backend = settings.open_backend()
    config, digest = load_config(backend)
    keys = []
    for key in list_keys(backend, settings.damage.append):
        if key.about.config == digest:
            keys.append(key)
        else:
            settings.damage.append(StrangeKeyError(key.about))
    if settings.json:
        print_json({"encryption": config.encryption, "keys": [_describe(key) for key in keys]})
        return
    if not keys:
        click.echo("no keys" + (": it is not encrypted" if config.encryption == "none" else ""), err=True)
        return
    rows = [
        (key.about.id[:8], key.about.role, key.about.host, format_time(key.about.created), key.about.label)
        for key in keys
    ]
    print_table(("ID", "ROLE", "HOST", "CREATED", "LABEL"), rows)


@key_command.command("add")
@click.option("--role", type=click.Choice(_ROLES), required=True, help="What the new key may do.")
@click.option("--label", default="", metavar="TEXT", help="What it is for; readable without a passphrase.")
@click.option(
    "--host",
    metavar="NAME",
    help="The host that will use it, which then tries it first; this host unless named.",
)
@_new_passphrase_option
@common_options
def add_command(
    settings: Settings, *, role: str, label: str, host: str | None, new_passphrase_file: str | None
) -> None:
    """Let another passphrase open the repository, in a role; needs an admin key."""
    from blocksnap.operations.keys import add_key
    from blocksnap.repository.keys import Right, Role
    from blocksnap.system.host import host_name

    name = host_name() if host is None else host
    for text in (label, name):
        if len(text) > 200 or not text.isprintable():
            raise UsageError(f"{text[:40]!r} is not one line of printable text of at most 200 characters")
    repository = settings.open_repository()
    # Before anybody is asked to think of a passphrase.
    repository.keys.require(Right.ADMINISTER)
    secret = _new_passphrase(new_passphrase_file)
    key = add_key(repository, secret, role=Role(role), label=label, host=name)
    if settings.json:
        print_json({"key": _describe(key)})
    elif settings.verbosity >= 0:
        click.echo(f"added key {key.about.id[:8]} ({role})")


@key_command.command("remove")
@click.argument("id_", metavar="ID")
@click.option("--force", is_flag=True, help="Even if no admin key is left, or no key at all.")
@common_options
def remove_command(settings: Settings, *, id_: str, force: bool) -> None:
    """Remove the key whose id begins with ID; needs an admin key and a storage that deletes.

    Its passphrase opens nothing any more. Whoever has opened it before may have kept what it held: see
    "Keys" in docs/operations.md.
    """
    from blocksnap.operations.keys import remove_key

    removed = remove_key(settings.open_repository(), id_, force=force)
    if settings.json:
        print_json({"removed": removed})
    elif settings.verbosity >= 0:
        click.echo(f"removed key {removed[:8]}")


@key_command.command("change")
@_new_passphrase_option
@common_options
def change_command(settings: Settings, *, new_passphrase_file: str | None) -> None:
    """Change the passphrase of the key that the current passphrase opens.

    A new key is made and tried before the old one is removed. Interrupted, it is finished by running
    it again with the same two passphrases.
    """
    from blocksnap.operations.keys import NotEncryptedError, change_passphrase

    repository = settings.open_repository()
    if repository.key is None:
        raise NotEncryptedError(repository.backend.place)
    about, removed = change_passphrase(repository, _new_passphrase(new_passphrase_file))
    if settings.json:
        print_json({"key": _describe_about(about), "removed": removed})
    elif settings.verbosity >= 0:
        click.echo(f"changed: key {about.id[:8]} ({about.role}) replaces {removed[:8]}")


@key_command.command("show")
@click.argument("id_", metavar="[ID]", required=False)
@common_options
def show_command(settings: Settings, *, id_: str | None) -> None:
    """Show the key that the passphrase opens and what it may do, or with ID any, without a passphrase."""
    from blocksnap.operations.keys import NotEncryptedError
    from blocksnap.repository.key_objects import find_key_name, read_key
    from blocksnap.repository.keys import RIGHTS
    from blocksnap.repository.repository import load_config

    if id_ is None:
        repository = settings.open_repository()
        if repository.key is None:
            raise NotEncryptedError(repository.backend.place)
        backend, name = repository.backend, repository.key.name
    else:
        backend = settings.open_backend()
        load_config(backend)
        name = find_key_name(backend, id_)
    key = read_key(backend, name)
    kdf, about, rights = key.kdf, key.about, sorted(RIGHTS[key.about.role], key=lambda right: right.value)
    if settings.json:
        print_json({"key": _describe(key), "rights": [right.name.lower() for right in rights]})
        return
    print_facts(
        (
            ("key", about.id),
            ("role", about.role),
            ("may be used for", ", ".join(right.value for right in rights)),
            ("label", about.label or "none"),
            ("host", about.host or "none"),
            ("created", format_time(about.created)),
            ("passphrase", f"argon2id, {format_size(kdf.memory_kib << 10)}, {kdf.passes} passes"),
        )
    )


def _new_passphrase(path: str | None) -> bytes:
    secret = passphrases.NEW.find(path, confirm=True)
    if secret is None:
        raise PassphraseError(
            "no new passphrase was given",
            resolution="give --new-passphrase-file FILE or BLOCKSNAP_NEW_PASSPHRASE",
        )
    return secret


def _describe_about(about: KeyAbout) -> dict[str, object]:
    return {
        "id": about.id,
        "role": about.role,
        "label": about.label,
        "host": about.host,
        "created": about.created,
    }


def _describe(key: Key) -> dict[str, object]:
    cost = {"memory_bytes": key.kdf.memory_kib << 10, "passes": key.kdf.passes, "lanes": key.kdf.lanes}
    return {**_describe_about(key.about), "argon2id": cost}
