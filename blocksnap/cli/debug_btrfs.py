"""debug btrfs-diff: what the engines for btrfs see."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from blocksnap.cli.debug_commands import inspection_command

if TYPE_CHECKING:
    from blocksnap.operations.inspect_btrfs import Engine, SubvolumeInspection


@inspection_command("btrfs-diff")
@click.argument("base", metavar="SUBVOL1")
@click.argument("snapshot", metavar="SUBVOL2")
@click.option(
    "--engine",
    type=click.Choice(["tree", "send"]),
    default="tree",
    show_default=True,
    help="Read the items of both trees, or let the kernel compare them (btrfs send).",
)
def btrfs_diff(base: str, snapshot: str, engine: Engine) -> SubvolumeInspection:
    """Compare two read-only snapshots of a btrfs subvolume.

    SUBVOL1 is the earlier, SUBVOL2 the later one. A line is `begin length path`, the path being one of the
    file's names in the later one; what reads as zeros now and did not before is printed too. With --json also
    the inodes that are new or gone, names, attributes and extended attributes. The engine `send` also
    compares snapshots of different subvolumes.
    """
    from blocksnap.operations.inspect_btrfs import inspect_btrfs_diff

    return inspect_btrfs_diff(base, snapshot, engine)
