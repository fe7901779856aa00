"""`blocksnap restore`."""

from __future__ import annotations

import sys
from functools import partial
from typing import TYPE_CHECKING

import click

from blocksnap.cli.context import Settings, common_options
from blocksnap.cli.output import format_size, print_json_line, printable
from blocksnap.errors import UsageError
from blocksnap.quantities import parse_size

if TYPE_CHECKING:
    from blocksnap.operations.restore import (
        ImageFormat,
        Missing,
        NewVolumeOptions,
        RestorePlan,
        RestoreResult,
    )
    from blocksnap.repository.documents import Backup
    from blocksnap.repository.repository import Repository

EXIT_WARNINGS = 3


@click.command("restore")
@click.argument("backup")
@click.argument("target", required=False, default="")
@click.option("--create", is_flag=True, help="Make the logical volume TARGET (VG/NAME) and restore to it.")
@click.option(
    "--pool",
    metavar="POOL",
    help="With --create: the thin pool; else the one the backup came from, or a classic volume.",
)
@click.option("--classic", is_flag=True, help="With --create: make a classic volume, in no pool.")
@click.option("--size", metavar="SIZE", help="With --create: make the volume larger than the backup.")
@click.option(
    "--in-place", is_flag=True, help="Write only what differs over what TARGET, a device or file, holds."
)
@click.option(
    "--instant",
    is_flag=True,
    help="Make the volume TARGET (VG/NAME), which can be used before its data is there.",
)
@click.option(
    "--resume", is_flag=True, help="With --instant and no BACKUP: go on with TARGET where it was interrupted."
)
@click.option(
    "--abandon",
    is_flag=True,
    help="With --instant and no BACKUP: remove TARGET, with what was written to it.",
)
@click.option(
    "--write-room",
    metavar="SIZE",
    help="With --instant: how much may be written before all is there; else all of the volume.",
)
@click.option("--rate", metavar="SIZE", help="With --instant: bytes a second that the data may come with.")
@click.option(
    "--format",
    "image",
    type=click.Choice(["raw", "qcow2"]),
    default="raw",
    help="Format of a new file; qcow2 is made by qemu-img.",
)
@click.option(
    "--verify",
    is_flag=True,
    help="Read back what was written and compare it with the backup; with --instant before what was written "
    "meanwhile goes to it.",
)
@click.option(
    "--missing",
    type=click.Choice(["fail", "zero"]),
    default="fail",
    show_default=True,
    help="Where the repository has lost something: end there, or write zeros, go on, and list the ranges.",
)
@common_options
def restore_command(
    settings: Settings,
    *,
    backup: str,
    target: str,
    create: bool,
    pool: str | None,
    classic: bool,
    size: str | None,
    in_place: bool,
    instant: bool,
    resume: bool,
    abandon: bool,
    write_room: str | None,
    rate: str | None,
    image: ImageFormat,
    verify: bool,
    missing: Missing,
) -> None:
    """Restore BACKUP to TARGET.

    TARGET is a new file, a block device, a new volume VG/NAME (--create), or - for standard output. A restore
    that was interrupted goes on where it was when the same command is run again. A subvolume goes to a new
    directory, on btrfs to a new subvolume; what another filesystem cannot keep is told.

    With --in-place a thin volume is not even read: what differs is told by the maps of the backups and by the
    pool, and a snapshot of what was there stays beside it.

    With --instant the new volume can be mounted and written to within seconds. It becomes like any other when
    all is there; if that is interrupted, --instant --resume VG/NAME goes on with it.

    BACKUP is an id or a unique prefix, latest, VOLUME@latest, or VOLUME@TIME.
    """
    if instant:
        if create or in_place or image != "raw" or missing != "fail":
            raise UsageError(
                "--instant makes a volume: it goes with --pool, --classic, --size, --verify only"
            )
        if abandon:
            _abandon(settings, backup, target, resume, verify, write_room, rate, pool, classic, size)
            return
        made = (pool, classic, size)
        _restore_instantly(settings, backup, target, made, write_room, rate, verify=verify, resume=resume)
        return
    if resume or abandon or write_room or rate:
        raise UsageError("--resume, --abandon, --write-room and --rate go with --instant")
    _require_target(settings, target, verify=verify)
    from blocksnap.extents import memory
    from blocksnap.operations.catalogue import find_backup
    from blocksnap.operations.restore import plan_restore
    from blocksnap.operations.restore_limits import restore_limits

    memory.retain()
    new = _new_volume(pool, classic=classic, size=size)
    repository = settings.open_repository()
    stored = find_backup(repository, backup)
    if stored.backup.inodes is not None:
        from blocksnap.cli.restore_tree import restore_tree_command

        as_image = create or in_place or image != "raw" or new is not None
        restore_tree_command(
            settings, repository, stored.backup, target, verify=verify, missing=missing, as_image=as_image
        )
        return
    limits = restore_limits(settings.configuration, stored)
    plan = plan_restore(
        stored.backup, target, create=create, in_place=in_place, image=image, new=new, limits=limits
    )
    _restore(settings, repository, plan, verify=verify, missing=missing)


def _require_target(settings: Settings, target: str, *, verify: bool) -> None:
    if not target:
        raise UsageError("no TARGET was named")
    if target == "-" and verify:
        raise UsageError("standard output cannot be read back", resolution="leave out --verify")
    if target == "-" and settings.json:
        raise UsageError("standard output cannot take the volume and JSON at once")


def _restore(
    settings: Settings, repository: Repository, plan: RestorePlan, *, verify: bool, missing: Missing
) -> None:
    from blocksnap.operations.label import tell_of_labels
    from blocksnap.operations.restore import execute_restore

    result = execute_restore(
        repository,
        plan,
        sys.stdout.buffer,
        settings.reporter,
        verify=verify,
        missing=missing,
        state_directory=settings.state_directory,
    )
    tell_of_labels(plan.backup, settings.reporter)
    _show(settings, plan.backup, result)
    if result.missing or (result.in_place is not None and result.in_place.is_way_back_gone):
        click.get_current_context().exit(EXIT_WARNINGS)


def _abandon(settings: Settings, volume: str, *others: str | bool | None) -> None:
    from blocksnap.operations.instant import abandon_instant

    # One of them may ask for the opposite.
    if any(others):
        raise UsageError("write it as: blocksnap restore --instant --abandon VG/NAME")
    abandon_instant(volume, settings.state_directory)
    if settings.json:
        print_json_line({"event": "done", "abandoned": volume})
    elif settings.verbosity >= 0:
        click.echo(f"removed {volume}, which was not whole")


def _restore_instantly(
    settings: Settings,
    backup: str,
    target: str,
    new: tuple[str | None, bool, str | None],
    write_room: str | None,
    rate: str | None,
    *,
    verify: bool,
    resume: bool,
) -> None:
    from blocksnap.extents import memory
    from blocksnap.operations.instant import InstantOptions, begin_instant, resume_instant
    from blocksnap.operations.restore import NewVolumeOptions
    from blocksnap.operations.restore_limits import restore_limits

    memory.retain()
    pool, classic, size = new
    made = _new_volume(pool, classic=classic, size=size) or NewVolumeOptions()
    per_second = parse_size(rate) if rate else 0
    limits_of = partial(restore_limits, settings.configuration)
    where = (limits_of, settings.reporter, settings.state_directory)
    if resume:
        if target or made != NewVolumeOptions() or write_room:
            raise UsageError("write it as: blocksnap restore --instant --resume VG/NAME")
        result = resume_instant(settings.open_repository, backup, per_second, *where, verify=verify)
    else:
        options = InstantOptions(made, parse_size(write_room) if write_room else 0, per_second, verify)
        result = begin_instant(settings.open_repository, backup, target, options, *where)
    facts = {
        "device": result.device,
        "backup": result.backup,
        "volume_bytes": result.volume_bytes,
        "verified": result.verified,
    }
    seconds = {"usable_seconds": round(result.usable_seconds, 3), "seconds": round(result.seconds, 3)}
    if settings.json:
        print_json_line({"event": "done", **facts, **seconds})
    elif settings.verbosity >= 0:
        click.echo(
            f"restored {result.backup[:8]} to {result.device}: {format_size(result.volume_bytes)}, "
            f"usable after {result.usable_seconds:.1f} s, whole after {result.seconds:.1f} s"
            + (", read back and found identical" if result.verified else "")
        )


def _new_volume(pool: str | None, *, classic: bool, size: str | None) -> NewVolumeOptions | None:
    from blocksnap.operations.restore import NewVolumeOptions

    if pool is None and not classic and size is None:
        return None
    return NewVolumeOptions(pool, classic, parse_size(size) if size else 0)


def _show(settings: Settings, backup: Backup, result: RestoreResult) -> None:
    plan, found = result.plan, result.in_place
    for offset, length in () if settings.json else result.missing:
        click.echo(f"missing: bytes {offset} to {offset + length} are zeros", err=True)
    if settings.json:
        facts: dict[str, object] = {
            "event": "done",
            "backup": backup.id,
            "target": plan.target,
            "volume_bytes": backup.size,
            "verified": result.verified,
            "complete": not result.missing,
            "missing": [{"offset": offset, "length": length} for offset, length in result.missing],
            "seconds": round(result.seconds, 3),
        }
        if found is not None:
            facts |= {
                "written_bytes": found.written_bytes,
                "method": found.differing.method,
                "reason": found.differing.reason,
                "way_back": found.way_back or None,
            }
        print_json_line(facts)
        return
    target, name = printable(plan.target), printable(backup.volume.name)
    if result.missing:
        click.echo(
            f"INCOMPLETE: {target} has zeros for {format_size(result.missing_bytes)} of "
            f"{backup.id[:8]} of {name} in {len(result.missing)} ranges, "
            "which the repository has lost",
            err=True,
        )
        return
    if settings.verbosity < 0 or plan.kind == "stream":
        return
    checked = ", read back and found identical" if result.verified else ""
    much = format_size(backup.size)
    if found is not None:
        much = f"{format_size(found.written_bytes)} of {much} differed"
    click.echo(f"restored {backup.id[:8]} of {name} to {target}: {much} in {result.seconds:.1f} s{checked}")
    if found is not None and found.way_back:
        click.echo(
            f"restored over it; what it held before is {found.way_back}: "
            f"lvremove it, or go back with lvconvert --merge"
        )
