"""`blocksnap drill` and `blocksnap report`."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import click

from blocksnap.cli.context import Settings, common_options
from blocksnap.cli.output import format_size, format_time, print_json, print_json_line, print_table
from blocksnap.errors import UsageError

if TYPE_CHECKING:
    from blocksnap.operations.report import VolumeReport
    from blocksnap.repository.documents import Drilled, DrillStep

EXIT_WARNINGS = 3


@click.command("drill")
@click.argument("backup", required=False, default="")
@click.option("--job", metavar="NAME", help="Drill the newest backup of each volume of a configured job.")
@common_options
def drill_command(settings: Settings, *, backup: str, job: str | None) -> None:
    """Prove that BACKUP restores, without restoring it anywhere.

    A sample of its chunks is read again. Its filesystem is mounted from an overlay, with a replay,
    checked by its fsck, and mounted once more for the check command of its job, which starts the database and
    queries it. All of that is thrown away; what came of it is kept in the repository, for list and report.

    The backup of a subvolume is restored, in fact, to a filesystem in a file of TMPDIR (else /var/tmp), where
    there has to be room for all of it, and read back; then the command runs.

    The command finds BLOCKSNAP_DRILL_FOLDER, BLOCKSNAP_DRILL_DEVICE and BLOCKSNAP_DRILL_BACKUP in its
    environment. Whatever it starts ends with it.
    """
    from blocksnap.extents import memory
    from blocksnap.operations.drill import plan_drill, run_drills

    if bool(backup) == bool(job):
        raise UsageError("name a BACKUP, or --job NAME")
    memory.retain()
    if job:
        settings, _ = settings.of_job(job)
    plan = partial(plan_drill, configuration=settings.configuration, name=backup, job=job)
    run_drills(settings.open_repository, plan, settings.reporter, partial(_show, settings))


def _show(settings: Settings, result: Drilled) -> None:
    if settings.json:
        print_json_line({"event": "drilled", **result.model_dump(mode="json", exclude={"format"})})
        return
    if settings.verbosity < 0:
        return
    click.echo(
        f"{'drilled' if result.good else 'FAILED'} {result.backup[:8]} of {result.volume.name}: "
        f"{result.chunks} chunks ({format_size(result.sampled_bytes)}) read again, "
        + ", ".join(_told(step) for step in result.steps[1:])
    )


def _told(step: DrillStep) -> str:
    # What is not looked into is said where it would be taken for looked into.
    return step.said if step.step in ("partitions", "contents") else f"{step.step} {step.seconds:.1f} s"


@click.command("report")
@click.option("--backup-age", metavar="AGE", help="Warn of volumes whose last backup is older: 26h, 8d, 2w.")
@click.option("--drill-age", metavar="AGE", help="The same for the last good drill.")
@click.option("--check-age", metavar="AGE", help="The same for the last check that read packs.")
@common_options
def report_command(
    settings: Settings, *, backup_age: str | None, drill_age: str | None, check_age: str | None
) -> None:
    """Tell of each volume when it was last backed up and drilled, and what to worry about.

    Exit code 3 when there is anything; so it can be what a monitoring system calls.
    """
    from datetime import UTC, datetime

    from blocksnap.operations.report import Ages, make_report

    ages = Ages.parse(backup_age, drill_age, check_age)
    found = make_report(settings.open_repository(), ages, datetime.now(UTC))
    if settings.json:
        print_json(found.document())
    else:
        if found.volumes:
            rows = [_row(volume) for volume in found.volumes]
            header = ("VOLUME", "HOST", "LAST BACKUP", "BACKUPS", "LAST DRILL", "RESULT")
            several = len({volume.called for volume in found.volumes}) > 1
            print_table(header, rows, right=(3,), without=() if several else (1,))
        if settings.verbosity >= 0:
            when = format_time(found.checked) if found.checked else "never"
            click.echo(f"packs were last read by a check: {when}")
    for warning in found.warnings:
        click.echo(f"warning: {warning}", err=True)
    if found.warnings:
        click.get_current_context().exit(EXIT_WARNINGS)


def _row(volume: VolumeReport) -> tuple[str, ...]:
    drill = volume.drill
    return (
        volume.name,
        volume.called,
        format_time(volume.time),
        str(volume.backups),
        format_time(drill.time) if drill else "never",
        ("good" if drill.good else "FAILED") if drill else "-",
    )
