"""volumes, backup, restore and verify."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, TypeVar

import click

from blocksnap.cli.context import Settings, common_options
from blocksnap.cli.ending import end_before
from blocksnap.cli.output import (
    format_age,
    format_size,
    print_facts,
    print_json,
    print_json_line,
    print_lines,
    print_table,
    printable,
)
from blocksnap.cli.parameters import NumberRange
from blocksnap.errors import BlocksnapError, DamageError, UnforeseenError, UsageError, VolumeError

if TYPE_CHECKING:
    from blocksnap.config import Job
    from blocksnap.controller.settings import LimitSettings
    from blocksnap.extents.changes import BasePolicy
    from blocksnap.operations.draft import BackupOptions
    from blocksnap.repository.repository import Repository
    from blocksnap.repository.stored import StoredBackup
    from blocksnap.volumes.base import Volume

Result = TypeVar("Result")


class TagType(click.ParamType[tuple[str, str]]):
    """A tag given as K=V."""

    name = "K=V"

    def convert(
        self, value: object, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[str, str]:
        """Split at the first equals sign."""
        key, found, text = str(value).partition("=")
        if not found or not key:
            self.fail(f"{value!r} is not of the form K=V", param, ctx)
        if not str(value).isprintable():
            self.fail(f"{value!r} is not printable text", param, ctx)
        return key, text


@click.command("volumes")
@common_options
def volumes_command(settings: Settings) -> None:
    """Show what on this host can be protected, how its changes are tracked, and what is in the way.

    With a repository named the age of the last backup is shown too, with a configuration the jobs.
    """
    from blocksnap.operations.volumes import survey

    repository = settings.open_repository() if settings.names_repository else None
    found = survey(repository, settings.configuration)
    if settings.json:
        print_json({"volumes": [volume.document() for volume in found]})
        return
    rows = [
        (
            volume.name,
            volume.kind,
            format_size(volume.size),
            volume.filesystem or "-",
            " ".join(volume.used_by) or "-",
            volume.tracking or "-",
            " ".join(volume.bases) or "-",
            " ".join(volume.jobs) or "-",
            format_age(volume.age_seconds) if volume.age_seconds is not None else "-",
            volume.obstacle or "",
        )
        for volume in found
    ]
    print_table(
        (
            "VOLUME",
            "KIND",
            "SIZE",
            "CONTENT",
            "USED BY",
            "CHANGES",
            "BASE",
            "JOBS",
            "LAST BACKUP",
            "IN THE WAY",
        ),
        rows,
        right=(2,),
    )
    notes = [f"{volume.name}: {volume.advice}" for volume in found if volume.advice]
    if notes:
        print_lines(["", *notes])


@click.command("backup")
@click.argument("volumes", metavar="VOLUME...", nargs=-1)
@click.option("--job", metavar="NAME", help="Back up the volumes of a configured job.")
@click.option("--full", is_flag=True, help="Take nothing over from an earlier backup.")
@click.option("--dry-run", is_flag=True, help="Say what would be read and why; takes and removes a snapshot.")
@click.option(
    "--tag", "tags", type=TagType(), multiple=True, help="Note K=V with the backup; may be repeated."
)
@click.option(
    "--base",
    type=click.Choice(["none", "keep", "auto"]),
    help="Whether the snapshot stays as base of the next backup; none unless the job says otherwise.",
)
@click.option(
    "--quiet-files",
    is_flag=True,
    help="Read files where they are though somebody has them open: nobody writes to them meanwhile.",
)
@click.option(
    "--wait",
    type=NumberRange(min=0),
    default=0.0,
    metavar="SECONDS",
    help="Wait so long for another run that has a volume, before giving up (exit code 11).",
)
@common_options
def backup_command(
    settings: Settings,
    *,
    volumes: tuple[str, ...],
    job: str | None,
    full: bool,
    dry_run: bool,
    tags: tuple[tuple[str, str], ...],
    base: BasePolicy | None,
    quiet_files: bool,
    wait: float,
) -> None:
    """Back up volumes while they are in use; several are one group.

    The volumes of a group are snapshotted back to back and committed together.

    VOLUME is VG/LV, a device, a mount point or directory (the volume under it), a file, or a pattern like
    '/srv/images/*.qcow2'. The first backup of a volume is full, every later one reads only what has changed.
    """
    from blocksnap.cli.trust import require_same_encryption
    from blocksnap.extents import memory
    from blocksnap.operations.backup import plan_backups
    from blocksnap.operations.draft import BackupOptions

    memory.retain()
    own_tags = _checked_tags(tags)
    settings, job_settings, job_tags = _job_of(settings, volumes, job)
    if quiet_files:
        job_settings = job_settings.model_copy(update={"quiet_files": True})
    repository = settings.open_repository()
    require_same_encryption(repository, settings.state_directory)
    failed: list[BlocksnapError] = []
    resolved, volume_limits = _volumes_of(settings, job_settings, failed)
    options = BackupOptions(
        full=full,
        tags={**job_tags, **own_tags},
        base=base or job_settings.base,
        quiesce=job_settings.quiesce,
        job=job or "",
        limits=job_settings.limits,
        volume_limits=volume_limits,
        pace=job_settings.pace,
        wait_seconds=wait,
    )
    groups = [resolved] if job_settings.group else [[volume] for volume in resolved]
    complete = partial(_with_what_belongs_to_it, settings, luks_headers=job_settings.luks_headers)
    if dry_run:
        state, reporter = settings.state_directory, settings.reporter
        plans = _in_turn(
            settings,
            groups,
            lambda group: plan_backups(repository, complete(group), state, options, reporter),
            failed,
        )
        if settings.json:
            print_json_line({"event": "done", "backups": [], "plans": plans})
    else:
        results = _in_turn(
            settings,
            groups,
            lambda group: _back_up_group(settings, repository, complete(group), options),
            failed,
        )
        _show_backups(settings, results)
    if failed:
        click.get_current_context().exit(failed[0].exit_code)


@click.command("verify")
@click.argument("backup")
@click.argument("volume", required=False)
@common_options
def verify_command(settings: Settings, *, backup: str, volume: str | None) -> None:
    """Prove every chunk of BACKUP in the repository, or compare it with a live VOLUME.

    A VOLUME is compared through a snapshot that is taken now and removed again.
    """
    from blocksnap.config import Configuration
    from blocksnap.extents import memory
    from blocksnap.operations.catalogue import find_backup
    from blocksnap.operations.verify import verify_repository, verify_volume
    from blocksnap.volumes.resolve import resolve_volume

    memory.retain()
    repository = settings.open_repository()
    stored = find_backup(repository, backup)
    problems: list[BlocksnapError]
    if volume:
        problems = verify_volume(
            repository,
            stored.backup,
            resolve_volume(volume),
            settings.state_directory,
            (settings.configuration or Configuration()).defaults.limits,
            settings.reporter,
        )
    else:
        problems = list(verify_repository(repository, stored.backup, settings.reporter))
    code = max((problem.exit_code for problem in problems), default=0)
    if settings.json:
        print_json_line(
            {
                "event": "done",
                "backup": stored.backup.id,
                "volume": volume,
                "identical": not problems,
                "problems": [problem.brief for problem in problems],
            }
        )
    else:
        for problem in problems:
            click.echo(printable(f"error: {problem.brief}"), err=True)
        if not problems and settings.verbosity >= 0:
            what = f"equals {volume}" if volume else "every chunk is in the repository and unharmed"
            name = printable(stored.backup.volume.name)
            click.echo(f"backup {stored.backup.id[:8]} of {name}: {printable(what)}")
    if any(isinstance(problem, DamageError) for problem in problems):
        code = DamageError.exit_code
    if code:
        click.get_current_context().exit(code)


def _checked_tags(tags: tuple[tuple[str, str], ...]) -> dict[str, str]:
    """Return the tags that were named; raises UsageError for the one that a job's retention goes by."""
    from blocksnap.config import JOB_TAG

    if JOB_TAG in dict(tags):
        raise UsageError(
            f"the tag {JOB_TAG} is set by blocksnap, to the name of the job",
            resolution="give the tag another name",
        )
    return dict(tags)


def _job_of(
    settings: Settings, volumes: tuple[str, ...], name: str | None
) -> tuple[Settings, Job, dict[str, str]]:
    """Return the configured job, or one made of the volumes that were named; its repository; its tags."""
    from blocksnap.config import JOB_TAG, Job

    if name is not None:
        if volumes:
            raise UsageError("name volumes or a job, not both")
        settings, job = settings.of_job(name)
        return settings, job, {**job.tags, JOB_TAG: name}
    if not volumes:
        raise UsageError("no volume was named", resolution="see what there is with: blocksnap volumes")
    configuration = settings.configuration
    if configuration is None:
        return settings, Job.model_construct(volumes=volumes), {}
    job = configuration.job_for(volumes)
    return replace(settings, repo=settings.repo or configuration.repository_of(job)), job, job.tags


def _volumes_of(
    settings: Settings, job: Job, failed: list[BlocksnapError]
) -> tuple[list[Volume], dict[str, LimitSettings]]:
    """Look the volumes of a job up, and their limits by their keys; raises UsageError, VolumeError.

    Where they are no group, one that is not there does not keep the others from being tried.
    """
    from blocksnap.volumes.resolve import resolve_volumes

    def left_out(err: BlocksnapError) -> None:
        settings.reporter.warn(f"left out: {err.brief}", resolution=err.resolution)

    configuration = settings.configuration
    resolved: list[Volume] = []
    of_volumes: dict[str, LimitSettings] = {}
    for text in job.volumes:
        name, limits = configuration.volume(text, job) if configuration else (text, job.limits)
        of_snapshots = replace(limits.for_volumes(), quiet_files=job.quiet_files)
        try:
            found = resolve_volumes(name, of_snapshots, left_out)
        except VolumeError as err:
            if job.group or len(job.volumes) == 1:
                raise
            _note_failure(settings, err, failed)
            continue
        resolved += found
        of_volumes.update({volume.key: limits for volume in found})
    if len(of_volumes) != len(resolved):
        raise UsageError("a volume is named twice")
    if not resolved and failed:
        raise failed[0]
    return resolved, of_volumes


def _with_what_belongs_to_it(settings: Settings, group: list[Volume], *, luks_headers: bool) -> list[Volume]:
    """Return a group with the subvolumes in its own, and the LUKS headers below it if the job wants them.

    They are looked for when the turn of the group comes: those before it may take hours.
    """
    from blocksnap.operations.grouping import with_nested

    group = with_nested(group, settings.reporter)
    if luks_headers:
        from blocksnap.operations.recording import with_luks_headers

        group = with_luks_headers(group, settings.reporter)
    return group


def _in_turn(
    settings: Settings,
    groups: list[list[Volume]],
    work: Callable[[list[Volume]], list[Result]],
    failed: list[BlocksnapError],
) -> list[Result]:
    """Do something with one group after the other; one that fails does not keep the others from being tried.

    Where there is no other its error is raised.
    """
    results: list[Result] = []
    is_only = len(groups) == 1 and not failed
    for group in groups:
        try:
            results += work(group)
        except BrokenPipeError:
            # Nobody hears of the others either.
            raise
        except (BlocksnapError, OSError, UnicodeError) as err:
            # Where a signal has begun to end all, further ones are not heard.
            if is_only or end_before(err) is not None:
                raise
            _note_failure(settings, err if isinstance(err, BlocksnapError) else UnforeseenError(err), failed)
    return results


def _back_up_group(
    settings: Settings, repository: Repository, group: list[Volume], options: BackupOptions
) -> list[StoredBackup]:
    from blocksnap.cli.trust import has_lost_newest, remember_newest
    from blocksnap.operations.backup import back_up

    state = settings.state_directory
    for volume in group:
        if has_lost_newest(repository, state, volume.key):
            settings.reporter.warn(
                f"the newest backup of {volume.name} that this host made is not in the repository any more",
                resolution="find out who removed it, or put an older state of the repository there",
            )
    stored = back_up(repository, group, state, options, settings.reporter)
    remember_newest(repository, state, stored)
    return stored


def _note_failure(settings: Settings, err: BlocksnapError, failed: list[BlocksnapError]) -> None:
    failed.append(err)
    settings.reporter.warn(err.brief, resolution=err.resolution)


def _show_backups(settings: Settings, stored: list[StoredBackup]) -> None:
    from blocksnap.operations.describing import describe, describe_quiesced, stored_bytes

    if settings.json:
        print_json_line({"event": "done", "backups": [describe(each) for each in stored]})
        return
    if settings.verbosity < 0:
        return
    for each in stored:
        record, figures = each.backup, each.backup.statistics
        print_facts(
            (
                ("backup", f"{record.id[:8]} of {record.volume.name}, {record.kind}"),
                ("read", f"{format_size(figures.read_bytes)}, changed {format_size(figures.changed_bytes)}"),
                (
                    "stored",
                    f"{format_size(stored_bytes(each))} for {format_size(figures.new_bytes)} of new data",
                ),
                ("took", f"{figures.seconds:.1f} s; writers stood still for {figures.freeze_ms:.0f} ms"),
                *([("quiesced", describe_quiesced(record))] if record.quiesced else []),
            )
        )
