"""The remembered set of mapped units, as a map of bitmap pages that backups share.

Thin pools map in units of their own, finer or coarser than our chunks; what a discard took away between two
backups is found by comparing these sets. A page is 4 KiB of bitmap; equal pages are stored once, and an
empty one is a hole.
"""

from __future__ import annotations

from blocksnap.extents.changes import MappedSet
from blocksnap.operations.catalogue import map_root, root_document
from blocksnap.repository.blockmap import HOLE, ZERO, MapReader, MapWriter
from blocksnap.repository.documents import Mapped
from blocksnap.repository.frame import FrameType
from blocksnap.repository.repository import Repository
from blocksnap.repository.writer import RepositoryWriter

PAGE_BYTES = 4096
_EMPTY_PAGE = bytes(PAGE_BYTES)


def store_mapped(
    repository: Repository, writer: RepositoryWriter, mapped: MappedSet, parent: Mapped | None
) -> Mapped:
    """Store a set; pages that the parent has too cost nothing."""
    count = max(-(-len(mapped.bitmap) // PAGE_BYTES), 1)
    root = map_root(parent.map) if parent and parent.unit == mapped.unit else None
    builder = MapWriter(MapReader(repository.load_node), root, count, writer.store_node)
    for number in range(count):
        page = mapped.bitmap[number * PAGE_BYTES : (number + 1) * PAGE_BYTES].ljust(PAGE_BYTES, b"\0")
        builder.set(number, HOLE if page == _EMPTY_PAGE else writer.store_blob(FrameType.ATTACHMENT, page))
    return Mapped(unit=mapped.unit, length=len(mapped.bitmap), map=root_document(builder.finish()))


def load_mapped(repository: Repository, mapped: Mapped | None) -> MappedSet | None:
    """Fetch a set; raises DamageError."""
    if mapped is None:
        return None
    reader = MapReader(repository.load_node)
    pages = []
    for _, count, entry in reader.runs(map_root(mapped.map), 0, -(-mapped.length // PAGE_BYTES)):
        if entry in (HOLE, ZERO):
            pages.append(_EMPTY_PAGE * count)
        else:
            pages.append(repository.load(FrameType.ATTACHMENT, entry))
    return MappedSet(mapped.unit, b"".join(pages)[: mapped.length])
