"""debug cow-extents: what the engine for classic snapshots sees."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from blocksnap.cli.debug_commands import inspection_command

if TYPE_CHECKING:
    from blocksnap.operations.inspection import Inspection


@inspection_command("cow-extents")
@click.argument("device", metavar="DEV")
@click.option(
    "--origin-size",
    type=click.IntRange(1, (1 << 63) - 1),
    metavar="BYTES",
    help="Size of the origin when the snapshot was made.",
)
@click.option(
    "--settled-areas",
    type=click.IntRange(0),
    metavar="N",
    help="Of an image: so many areas of the list are full, and are read together.",
)
def cow_extents(device: str, *, origin_size: int | None, settled_areas: int | None) -> Inspection:
    """List what was written to a classic volume since a snapshot of it was made.

    DEV is the -cow device of the snapshot or an image of it.
    """
    from blocksnap.operations.inspect_cow import inspect_cow_extents

    return inspect_cow_extents(device, origin_size=origin_size, settled_areas=settled_areas)
