"""`blocksnap mount` and `blocksnap files`."""

from __future__ import annotations

import os
import stat
from datetime import UTC, datetime
from typing import Any

import click

from blocksnap.cli.context import Settings, common_options
from blocksnap.cli.output import format_size, print_json, print_json_line, printable
from blocksnap.errors import UsageError


@click.command("mount")
@click.argument("backup", metavar="BACKUP|VOLUME")
@click.argument("folder", metavar="DIR")
@common_options
def mount_command(settings: Settings, *, backup: str, folder: str) -> None:
    """Show a BACKUP, or all of a VOLUME by their times, in the directory DIR, read-only.

    Each has its raw volume as the file image, and where the kernel can mount its filesystem (ext4, XFS or
    btrfs, without a replay of the journal) what is in it under files; of a disk with partitions under p1, p2
    and so on, while the file partitions says what each is. Backups of a btrfs subvolume are trees of files as
    they are, with owners, links and extended attributes. It runs until DIR is unmounted.
    """
    from blocksnap.extents import memory
    from blocksnap.operations.images import show_backups

    memory.retain()

    def mounted(count: int) -> None:
        if settings.json:
            print_json_line({"event": "mounted", "folder": folder, "backups": count})
        elif settings.verbosity >= 0:
            what = "1 backup is" if count == 1 else f"{count} backups are"
            click.echo(f"{what} in {folder}; umount {folder} ends it", err=True)

    show_backups(settings.open_repository, backup, folder, settings.reporter, mounted)
    if settings.json:
        print_json_line({"event": "done"})


@click.command("files")
@click.argument("backup")
@click.argument("path", required=False, default="")
@click.option("--to", metavar="DIR", help="Copy PATH, with all below it, into this directory.")
@click.option("--find", metavar="PATTERN", help="List only names like this, at any depth: '*.conf'.")
@click.option("-r", "--recursive", is_flag=True, help="List everything below PATH.")
@common_options
def files_command(
    settings: Settings, *, backup: str, path: str, to: str | None, find: str | None, recursive: bool
) -> None:
    """List the files in a BACKUP, or copy them out, without mounting anything by hand.

    PATH is that of a file or directory in the volume's filesystem or the subvolume, its root if not given. Of
    a disk with partitions it begins with one of them (p1/etc/fstab), and without it they are listed. Copies
    keep owners, modes, times, links, extended attributes and holes, and never replace anything.
    """
    from blocksnap.extents import memory
    from blocksnap.operations.images import files_of

    if to is not None and (find or recursive):
        raise UsageError("--to copies, --find and --recursive list")
    if to is not None and not os.path.isdir(to):
        raise UsageError(f"there is no directory {to}", resolution="make it first")
    memory.retain()
    with files_of(settings.open_repository, backup, settings.reporter) as files:
        if to is not None:
            made = files.copy(path, to)
            _show_copied(settings, files.backup.id, made)
        elif settings.json:
            entries = list(files.entries(path, recursive=recursive, find=find))
            print_json({"backup": files.backup.id, "entries": entries})
        else:
            for entry in files.entries(path, recursive=recursive, find=find):
                click.echo(_line(entry))


def _show_copied(settings: Settings, backup: str, made: list[str]) -> None:
    if settings.json:
        print_json({"backup": backup, "copied": made})
    elif settings.verbosity >= 0:
        for each in made:
            click.echo(f"copied to {_printable(each)}")


_TYPES = {
    "file": stat.S_IFREG,
    "directory": stat.S_IFDIR,
    "link": stat.S_IFLNK,
    "block device": stat.S_IFBLK,
    "character device": stat.S_IFCHR,
    "pipe": stat.S_IFIFO,
    "socket": stat.S_IFSOCK,
}


def _line(entry: dict[str, Any]) -> str:
    if entry["kind"] == "partition":
        content = f"not shown: {entry['reason']}" if entry["reason"] else entry["content"]
        return f"{entry['path']:<5} {format_size(entry['size']):>10} {content}"
    mode = stat.filemode(entry["mode"] | _TYPES.get(entry["kind"], 0))
    when = _format_time(entry["modified"])
    target = f" -> {_printable(entry['target'])}" if entry["target"] is not None else ""
    size = format_size(entry["size"])
    owner = f"{entry['uid']}:{entry['gid']}"
    return f"{mode} {owner:>11} {size:>10} {when} {_printable(entry['path'])}{target}"


def _format_time(seconds: float) -> str:
    """Return a time as people read it; what no calendar has, as date(1) takes it."""
    try:
        return datetime.fromtimestamp(seconds, UTC).astimezone().strftime("%Y-%m-%d %H:%M:%S")
    except (ValueError, OverflowError, OSError):
        # btrfs has room for any 64 bits of seconds, and keeps what programs set.
        return f"@{seconds:.0f}".ljust(19)


def _printable(name: str) -> str:
    """Return a name as a terminal can show it: names come from the backup and may hold anything."""
    decoded = os.fsencode(name).decode("utf-8", "backslashreplace")
    return printable(decoded, kept="")
