"""Show what the two engines for thin pools see, on a metadata device or an image of one."""

from __future__ import annotations

from blocksnap.errors import UsageError
from blocksnap.extents.model import ExtentList
from blocksnap.extents.thin_query import ThinAnswer, ThinQuery
from blocksnap.operations.inspection import Inspection, Stopwatch, open_to_read


def inspect_thin_diff(
    metadata: str, base_id: int, device_id: int, *, size: int | None, metadata_snapshot: bool
) -> Inspection:
    """Compare the mapping trees of two devices of one pool (thin-tree).

    Raises UsageError when there is no such device, VolumeError when the metadata makes no sense.
    """
    with open_to_read(metadata, direct=True) as fd:
        query = ThinQuery(fd, device_id, size, metadata_snapshot=metadata_snapshot)
        watch = Stopwatch()
        found = query.compare(base_id)
        seconds = watch.seconds
    extents = query.clip(found.changed.union(found.discarded))
    return Inspection(
        "thin-tree",
        f"the trees of the devices {base_id} and {device_id} compared",
        extents,
        seconds,
        _facts(query, found),
    )


def inspect_thin_extents(
    metadata: str, device_id: int, *, since: int | None, size: int | None, metadata_snapshot: bool
) -> Inspection:
    """List what a device maps, by a walk of its whole tree; with ``since`` what it maps since that pool time.

    Raises as inspect_thin_diff does, and UsageError for a time without a size.
    """
    if since is not None and size is None:
        raise UsageError("--since needs --size: the pool does not know how large the volume is")
    with open_to_read(metadata, direct=True) as fd:
        query = ThinQuery(fd, device_id, size, metadata_snapshot=metadata_snapshot)
        watch = Stopwatch()
        found = query.compare(None) if since is None else query.scan(since)
        seconds = watch.seconds
    if since is None:
        reason = f"everything that device {device_id} maps"
        return Inspection("thin-tree", reason, query.clip(found.changed), seconds, _facts(query, found))
    reason = f"what device {device_id} maps since pool time {since}"
    return Inspection("thin-time", reason, query.clip(found.changed), seconds, _facts(query, found))


def _facts(query: ThinQuery, found: ThinAnswer) -> dict[str, int]:
    discarded: ExtentList = query.clip(found.discarded)
    return {
        "chunk_size": query.chunk_size,
        "nodes": found.nodes,
        "written_bytes": query.clip(found.changed).total,
        "discarded_bytes": discarded.total,
        "discarded_count": len(discarded),
    }
