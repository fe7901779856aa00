"""debug thin-diff, debug thin-extents: what the engines for thin pools see."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import click

from blocksnap.cli.debug_commands import inspection_command

if TYPE_CHECKING:
    from blocksnap.operations.inspection import Inspection

_Function = TypeVar("_Function", bound=Callable[..., Any])
_DEVICE_ID = click.IntRange(0, 0xFFFFFF)


def _asks_a_pool(function: _Function) -> _Function:
    for option in (
        click.option("--size", type=click.IntRange(1), metavar="BYTES", help="Size of the volume."),
        click.option("--metadata-snap", is_flag=True, help="Read the pool's metadata snapshot."),
    ):
        function = option(function)
    return function


@inspection_command("thin-diff")
@click.argument("metadata", metavar="META")
@click.argument("base_id", metavar="ID1", type=_DEVICE_ID)
@click.argument("device_id", metavar="ID2", type=_DEVICE_ID)
@_asks_a_pool
def thin_diff(
    metadata: str, base_id: int, device_id: int, *, size: int | None, metadata_snap: bool
) -> Inspection:
    """Compare two devices of a thin pool, by the trees in its metadata.

    META is the pool's _tmeta device or an image of it; ID1 and ID2 are the thin ids of two snapshots that
    nobody writes to. What is only mapped in the first, because it was discarded, is printed too.
    """
    from blocksnap.operations.inspect_thin import inspect_thin_diff

    return inspect_thin_diff(metadata, base_id, device_id, size=size, metadata_snapshot=metadata_snap)


@inspection_command("thin-extents")
@click.argument("metadata", metavar="META")
@click.argument("device_id", metavar="ID", type=_DEVICE_ID)
@click.option(
    "--since", type=click.IntRange(0), metavar="TIME", help="Only what is mapped since a pool time."
)
@_asks_a_pool
def thin_extents(
    metadata: str, device_id: int, *, since: int | None, size: int | None, metadata_snap: bool
) -> Inspection:
    """List what a device of a thin pool maps.

    META is the pool's _tmeta device or an image of it; ID is the thin id of a snapshot that nobody writes to.
    """
    from blocksnap.operations.inspect_thin import inspect_thin_extents

    return inspect_thin_extents(metadata, device_id, since=since, size=size, metadata_snapshot=metadata_snap)
