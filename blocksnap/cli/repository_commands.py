"""init, list and show."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from blocksnap.cli.context import Settings, common_options
from blocksnap.cli.output import format_size, format_time, print_facts, print_json, print_lines, print_table
from blocksnap.errors import PassphraseError, UsageError
from blocksnap.quantities import parse_size

if TYPE_CHECKING:
    from blocksnap.repository.documents import Drilled
    from blocksnap.repository.stored import StoredBackup

_CLOCK_NOTE = (
    "* so said its host's clock, which was wrong: order and retention go by when it arrived (see: show)"
)


@click.command("init")
@click.option(
    "--chunk-size", default="128K", show_default=True, help="A power of two from 16K to 4M; fixed for good."
)
@click.option("--no-encryption", is_flag=True, help="Store everything readable; has to be said.")
@common_options
def init_command(settings: Settings, *, chunk_size: str, no_encryption: bool) -> None:
    """Create a repository.

    It is encrypted with a passphrase. Whoever loses the passphrase loses the backups.
    """
    from blocksnap.repository.documents import MAX_CHUNK_SIZE, MIN_CHUNK_SIZE
    from blocksnap.repository.repository import Repository
    from blocksnap.system.host import host_name

    size = parse_size(chunk_size)
    if size & (size - 1) or not MIN_CHUNK_SIZE <= size <= MAX_CHUNK_SIZE:
        raise UsageError(f"a chunk cannot have {chunk_size}", resolution="give a power of two from 16K to 4M")
    passphrase = None
    if not no_encryption:
        passphrase = settings.passphrase(confirm=True)
        if passphrase is None:
            raise PassphraseError(
                "a repository is encrypted, and no passphrase was given",
                resolution="give --passphrase-file FILE or BLOCKSNAP_PASSPHRASE, or say --no-encryption",
            )
    repository = Repository.create(
        settings.open_backend(), chunk_size=size, passphrase=passphrase, host=host_name()
    )
    config = repository.config
    if settings.json:
        print_json(
            {
                "repository": repository.backend.place,
                "id": config.id,
                "chunk_size": config.chunk_size,
                "encryption": config.encryption,
                "key": repository.key.about.id if repository.key else None,
            }
        )
    elif settings.verbosity >= 0:
        click.echo(f"created repository {repository.backend.place} (id {config.id[:8]}, {config.encryption})")
        if passphrase is not None:
            click.echo("Keep the passphrase in a second place: without it nobody can restore anything.")


@click.command("list")
@click.argument("volume", required=False)
@common_options
def list_command(settings: Settings, volume: str | None) -> None:
    """List backups, oldest first; those of VOLUME, or all."""
    from blocksnap.operations.catalogue import of_volume
    from blocksnap.operations.describing import describe_brief, name_hosts, stored_bytes
    from blocksnap.operations.report import describe_drill, last_drills_of_backups

    repository = settings.open_repository()
    backups, drilled = repository.backups(), last_drills_of_backups(repository)
    hosts = name_hosts(stored.origin for stored in backups)
    if volume:
        backups = of_volume(backups, volume)
    if settings.json:
        documents = [
            {**describe_brief(stored), "drill": describe_drill(drilled.get(stored.backup.id))}
            for stored in backups
        ]
        print_json({"backups": documents})
        return
    if not backups:
        click.echo("no backups" + (f" of {volume}" if volume else ""), err=True)
        return
    rows = [
        (
            stored.backup.id[:8],
            stored.backup.volume.name,
            hosts[stored.origin],
            format_time(stored.backup.time) + (" *" if stored.clock_was_wrong else ""),
            stored.backup.kind,
            format_size(stored.backup.size),
            format_size(stored.backup.statistics.changed_bytes),
            format_size(stored_bytes(stored)),
            _drilled(drilled.get(stored.backup.id)),
            " ".join(f"{key}={value}" for key, value in stored.manifest.tags.items()),
        )
        for stored in backups
    ]
    print_table(
        ("ID", "VOLUME", "HOST", "TIME", "KIND", "SIZE", "CHANGED", "STORED", "DRILLED", "TAGS"),
        rows,
        right=(5, 6, 7),
        without=() if len(hosts) > 1 else (2,),
    )
    if any(stored.clock_was_wrong for stored in backups) and settings.verbosity >= 0:
        click.echo(_CLOCK_NOTE)


def _drilled(drill: Drilled | None) -> str:
    if drill is None:
        return "-"
    return format_time(drill.time) if drill.good else "FAILED"


def _dated(stored: StoredBackup) -> str:
    why = "its host's clock was wrong" if stored.clock_was_wrong else "storing it took that long"
    return f"{format_time(stored.moment)}, by its arrival: {why}"


def _show_host(settings: Settings, backup: str, folder: Path | None) -> None:
    from blocksnap.operations.catalogue import find_backup
    from blocksnap.operations.recovering_host import (
        NoRecordError,
        export_host,
        newest_of_host,
        script,
    )

    repository = settings.open_repository()
    stored = find_backup(repository, backup)
    recovery = stored.manifest.recovery
    if recovery is None:
        raise NoRecordError(stored.backup.id[:8])
    backed_up = newest_of_host(repository, stored.manifest.host)
    if folder is not None:
        written = export_host(recovery, backed_up, folder)
        if settings.json:
            print_json({"files": [str(path) for path in written]})
        else:
            print_lines(map(str, written))
    elif settings.json:
        print_json({"recovery": recovery.model_dump(mode="json")})
    else:
        print_lines(script(recovery, backed_up))


@click.command("show")
@click.argument("backup")
@click.option(
    "--host",
    is_flag=True,
    help="Show what was recorded of the host: the commands that make a bare machine ready.",
)
@click.option(
    "--to",
    "folder",
    metavar="DIR",
    type=click.Path(path_type=Path),
    help="With --host: write all of it to files.",
)
@common_options
def show_command(settings: Settings, backup: str, *, host: bool, folder: Path | None) -> None:
    """Show one backup: what it read, stored and froze, and how its changes were found.

    BACKUP is an id or a unique prefix, latest, VOLUME@latest, or VOLUME@TIME.
    """
    if folder is not None and not host:
        raise UsageError("--to goes with --host", resolution="blocksnap show BACKUP --host --to DIR")
    if host:
        _show_host(settings, backup, folder)
        return
    from blocksnap.operations.catalogue import find_backup
    from blocksnap.operations.describing import (
        describe,
        describe_quiesced,
        describe_records,
        stored_bytes,
    )
    from blocksnap.operations.losses import current_losses

    repository = settings.open_repository()
    stored = find_backup(repository, backup)
    lost = current_losses(repository, stored.backup)
    if settings.json:
        listed = [{"offset": offset, "length": length} for offset, length in lost.extents()]
        print_json(
            {
                **describe(stored),
                "lost": listed,
                "lost_bytes": lost.total_bytes,
                "lost_ranges": lost.total.ranges,
            }
        )
        return
    record, figures = stored.backup, stored.backup.statistics
    total, data = stored_bytes(stored), figures.stored_bytes - figures.metadata_bytes
    print_facts(
        (
            ("backup", record.id),
            ("volume", f"{record.volume.name} ({record.volume.kind})"),
            ("time", format_time(record.time)),
            *((("arrived", format_time(stored.received)),) if stored.received else ()),
            *((("dated", _dated(stored)),) if stored.dated else ()),
            ("host", stored.manifest.hostname),
            ("kind", f"{record.kind}, parent {record.parent[:8]}" if record.parent else record.kind),
            ("method", f"{record.method}: {record.reason}"),
            ("consistency", record.consistency),
            ("quiesced", describe_quiesced(record)),
            *describe_records(record),
            ("size", f"{format_size(record.size)} ({record.size} bytes)"),
            ("changed", format_size(figures.changed_bytes)),
            ("read", format_size(figures.read_bytes)),
            ("new", f"{format_size(figures.new_bytes)} in {figures.new_chunks} chunks"),
            ("stored", f"{format_size(total)}, of it metadata {format_size(total - data)}"),
            ("freeze", f"{figures.freeze_ms:.0f} ms; skew in its group {figures.skew_ms:.0f} ms"),
            ("took", f"{figures.seconds:.1f} s"),
            ("tags", " ".join(f"{key}={value}" for key, value in stored.manifest.tags.items()) or "none"),
            *(("LOST", f"bytes {offset} to {offset + length}") for offset, length in lost.extents()),
            *((("LOST", lost.left_out),) if lost.left_out else ()),
            *((f"source {name}", str(value)) for name, value in record.source.items()),
        )
    )
