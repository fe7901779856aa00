"""What `blocksnap restore` does with the backup of a subvolume."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from blocksnap.cli.output import format_size, print_json_line, printable
from blocksnap.errors import UsageError

if TYPE_CHECKING:
    from blocksnap.cli.context import Settings
    from blocksnap.operations.restore import Missing
    from blocksnap.repository.documents import Backup
    from blocksnap.repository.repository import Repository

EXIT_WARNINGS = 3


def restore_tree_command(
    settings: Settings,
    repository: Repository,
    backup: Backup,
    target: str,
    *,
    verify: bool,
    missing: Missing,
    as_image: bool,
) -> None:
    """Restore a subvolume, and say what could not be kept; refuse what only an image can do."""
    from blocksnap.operations.label import tell_of_labels
    from blocksnap.operations.restore_tree import restore_tree

    if as_image:
        raise UsageError(
            "a subvolume is restored to a new directory",
            resolution="leave out --create, --in-place and --format",
        )
    done = restore_tree(
        repository, backup, target, settings.reporter, verify=verify, zero_missing=missing == "zero"
    )
    tell_of_labels(backup, settings.reporter)
    if settings.json:
        print_json_line(
            {
                "event": "done",
                "backup": backup.id,
                "target": target,
                "subvolume": done.is_subvolume,
                "volume_bytes": backup.size,
                "inodes": done.result.inodes,
                "shared_bytes": done.result.shared_bytes,
                "verified": done.verified,
                "complete": not done.missing and not done.unkept,
                "missing": [
                    {"path": each.path, "offset": each.offset, "length": each.length} for each in done.missing
                ],
                "not_kept": done.unkept.document(),
                "nested": list(done.nested),
                "seconds": round(done.seconds, 3),
            }
        )
    else:
        for each in done.missing:
            end = each.offset + each.length
            click.echo(f"missing: bytes {each.offset} to {end} of {each.path} are zeros", err=True)
        for line in done.unkept.lines():
            click.echo(f"not kept: {line}", err=True)
        for path in done.nested if settings.verbosity >= 0 else ():
            click.echo(
                f"{path} was a nested subvolume, and is an empty directory: it has a backup of its own"
            )
        if settings.verbosity >= 0:
            what = "a new subvolume" if done.is_subvolume else "a new directory"
            checked = ", read back and found identical" if done.verified else ""
            name = printable(backup.volume.name)
            click.echo(
                f"restored {backup.id[:8]} of {name} to {printable(target)}, {what}: "
                f"{format_size(backup.size)} in {done.result.inodes} inodes, {done.seconds:.1f} s{checked}"
            )
    if done.missing or done.unkept:
        click.get_current_context().exit(EXIT_WARNINGS)
