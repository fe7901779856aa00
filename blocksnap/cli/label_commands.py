"""`blocksnap label`."""

from __future__ import annotations

import click

from blocksnap.cli.context import Settings, common_options
from blocksnap.cli.output import print_json_line


@click.command("label")
@click.argument("backup")
@click.argument("directory", required=False)
@click.option("--server", metavar="NAME", help="Which server's, where the backup is of several.")
@common_options
def label_command(settings: Settings, *, backup: str, directory: str | None, server: str | None) -> None:
    """Write the backup_label of BACKUP to DIRECTORY, a restored data directory of PostgreSQL.

    A server whose log was on another volume than its data has to find it there when it starts for the first
    time, or it does not know from where on it has to read its log. tablespace_map goes with it, for the links
    in DIRECTORY as they are now. Without DIRECTORY the label is printed.
    """
    from blocksnap.operations.catalogue import find_backup
    from blocksnap.operations.label import find_label, write_label

    stored = find_backup(settings.open_repository(), backup)
    label = find_label(stored.backup, server)
    written = write_label(label, directory) if directory else []
    if settings.json:
        facts = {"backup": stored.backup.id, "server": label.server, "written": written}
        print_json_line({**facts, "label": label.text, "tablespace_map": label.tablespace_map})
    elif not directory:
        click.echo(label.text, nl=False)
    elif settings.verbosity >= 0:
        click.echo(f"wrote {' and '.join(written)}: {label.server} may be started")
