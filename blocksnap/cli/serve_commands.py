"""`blocksnap serve`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from blocksnap.cli.context import Settings, common_options
from blocksnap.cli.output import print_json_line

if TYPE_CHECKING:
    from blocksnap.operations.serve import Serving


@click.command("serve")
@click.argument("backup")
@click.option(
    "--writable", is_flag=True, help="Take writes too, into an overlay that is thrown away at the end."
)
@click.option(
    "--socket",
    "path",
    metavar="PATH",
    default="",
    help="Listen on this socket of the filesystem; default: /run/blocksnap/ID.nbd.",
)
@click.option(
    "--port",
    type=click.IntRange(1, 65535),
    default=None,
    help="Listen for NBD clients on this TCP port of 127.0.0.1 (NBD's own is 10809), which every user of "
    "this host reaches, and on no socket; default: none.",
)
@common_options
def serve_command(settings: Settings, *, backup: str, writable: bool, path: str, port: int | None) -> None:
    """Serve a BACKUP as a network block device (NBD), read-only or with a throw-away overlay.

    It listens on a socket below /run/blocksnap that only root can reach, unless another place is named, and
    never beyond this host. It runs until Ctrl-C or another signal ends it. nbdkit does the serving.
    """
    from blocksnap.extents import memory
    from blocksnap.operations.serve import Endpoint, serve_backup

    memory.retain()

    def serving(found: Serving) -> None:
        if settings.json:
            facts = {"backup": found.backup.id, "url": found.url, "volume_bytes": found.backup.size}
            print_json_line({"event": "serving", **facts, "writable": writable})
        elif settings.verbosity >= 0:
            click.echo(
                f"{found.backup.id[:8]} of {found.backup.volume.name} is served: {found.url}", err=True
            )

    endpoint = Endpoint(port or 0, path)
    serve_backup(settings.open_repository, backup, endpoint, settings.reporter, serving, writable=writable)
