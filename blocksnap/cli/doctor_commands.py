"""doctor."""

from __future__ import annotations

import click

from blocksnap.cli.context import Settings, common_options
from blocksnap.cli.output import print_json


@click.command("doctor")
@click.option("--fix", is_flag=True, help="Clean up what dead runs of blocksnap left, and nothing else.")
@common_options
def doctor_command(settings: Settings, *, fix: bool) -> None:
    """Tell what is in the way of backups on this host, and what interrupted runs left.

    That is: leftover snapshots and metadata snapshots, pools that are nearly full or damaged, suspended
    devices, dead loop and nbd devices, old journals, LVM's archive, missing tools.

    With --fix, what carries the tags of blocksnap and is in its journal is removed, released and resumed.
    Every backup does the same for its own volumes.

    Exit code 0: nothing is left to do. 3: warnings. 1: something is wrong now, or cannot be fixed.
    """
    from blocksnap.config import Configuration
    from blocksnap.operations.doctor import examine

    configuration = settings.configuration or Configuration()
    repository = settings.repository_url if settings.names_repository else None
    found = examine(settings.state_directory, configuration.defaults.limits, repository, fix=fix)
    if settings.json:
        print_json(
            {
                "findings": [finding.document() for finding in found.findings],
                "fixed": list(found.fixed),
                "failed": list(found.failed),
            }
        )
    else:
        for message in found.fixed:
            click.echo(f"fixed:   {message}")
        for message in found.failed:
            click.echo(f"failed:  {message}", err=True)
        for finding in found.findings:
            click.echo(f"{finding.severity + ':':8} {finding.subject}: {finding.message}")
            if finding.advice:
                click.echo(f"fix:     {finding.advice}")
        if settings.verbosity >= 0 and not (found.findings or found.failed):
            click.echo("nothing is left to do" if found.fixed else "nothing found")
    if found.exit_code:
        click.get_current_context().exit(found.exit_code)
