"""timers."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING

import click

from blocksnap.cli.config_commands import NoConfigurationError
from blocksnap.cli.context import Settings, common_options
from blocksnap.cli.output import print_json
from blocksnap.errors import UsageError

if TYPE_CHECKING:
    from blocksnap.config import Configuration
    from blocksnap.operations.timers import Unit


@click.command("timers")
@click.option(
    "--install", is_flag=True, help="Put them in place, and remove those of ours that are not needed."
)
@click.option(
    "--directory",
    default="/etc/systemd/system",
    show_default=True,
    metavar="DIR",
    help="Where to; systemd is told at once only about its own.",
)
@common_options
def timers_command(settings: Settings, *, install: bool, directory: str) -> None:
    """Print systemd units for the configured schedules, or install them.

    A job with a `schedule` is backed up by a timer of its own, and with a schedule in `drill` its backups are
    drilled; a repository with a `prune_schedule` has the retention of its jobs applied and is pruned.
    """
    from blocksnap.operations.timers import plan_units

    if settings.configuration is None:
        raise NoConfigurationError(settings.configuration_path)
    _require_calendars(settings.configuration)
    units = plan_units(settings.configuration, _program(), os.path.abspath(settings.configuration_path))
    if install:
        _install(settings, units, directory)
    elif settings.json:
        print_json({"units": [{"name": unit.name, "text": unit.text} for unit in units]})
    else:
        for unit in units:
            click.echo(f"# {directory}/{unit.name}\n{unit.text}")


def _install(settings: Settings, units: tuple[Unit, ...], directory: str) -> None:
    from blocksnap.operations.timers import UNIT_FOLDER, install_units

    activate = directory == UNIT_FOLDER and os.path.isdir("/run/systemd/system")
    done = install_units(units, directory, activate=activate)
    if settings.json:
        facts = {"written": done.written, "removed": done.removed, "unchanged": done.unchanged}
        print_json({**facts, "activated": activate})
    elif settings.verbosity >= 0:
        for word, names in (("wrote", done.written), ("removed", done.removed)):
            for name in names:
                click.echo(f"{word} {directory}/{name}")
        if not activate and done.written:
            click.echo(
                "systemd was not told: systemctl daemon-reload; systemctl enable --now TIMER", err=True
            )


def _require_calendars(configuration: Configuration) -> None:
    """Raise UsageError for a schedule that systemd would not take."""
    from blocksnap.operations.check_configuration import check_calendar

    schedules = [job.schedule for job in configuration.jobs.values()]
    schedules += [job.drill.schedule for job in configuration.jobs.values() if job.drill]
    schedules += [each.prune_schedule for each in configuration.repositories.values()]
    for text in dict.fromkeys(filter(None, schedules)):
        if trouble := check_calendar(text):
            raise UsageError(trouble, resolution="see systemd.time(7), CALENDAR EVENTS")


def _program() -> str:
    """Return the path of the command that runs, as a timer has to call it."""
    called = os.path.abspath(sys.argv[0])
    beside = os.path.join(os.path.dirname(sys.executable), "blocksnap")
    return called if os.path.basename(called) == "blocksnap" else beside
