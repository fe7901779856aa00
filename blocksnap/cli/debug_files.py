"""debug fiemap-diff, debug compare: what the engines for files see."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from blocksnap.cli.debug_commands import inspection_command

if TYPE_CHECKING:
    from blocksnap.operations.inspection import Inspection


@inspection_command("fiemap-diff")
@click.argument("base", metavar="FILE")
@click.argument("later", metavar="FILE")
def fiemap_diff(base: str, later: str) -> Inspection:
    """Compare two clones on XFS, by where their bytes lie (FIEMAP).

    Both files have to be on the same XFS, and nobody may write to either. What is data only in the first,
    because a hole was punched, is printed too.
    """
    from blocksnap.operations.inspect_files import inspect_fiemap_diff

    return inspect_fiemap_diff(base, later)


@inspection_command("compare")
@click.argument("base", metavar="FILE")
@click.argument("later", metavar="FILE")
@click.option(
    "--block-size", type=int, default=4096, show_default=True, metavar="BYTES", help="A multiple of 4096."
)
@click.option("--direct", is_flag=True, help="Read past the page cache, where that is possible.")
def compare(base: str, later: str, *, block_size: int, direct: bool) -> Inspection:
    """Compare two files or block devices by reading them.

    Holes are not read. What lies beyond the end of the first counts as zeros, what lies beyond the end of
    the second is not looked at.
    """
    from blocksnap.operations.inspect_files import inspect_compare

    return inspect_compare(base, later, block_size=block_size, direct=direct)
