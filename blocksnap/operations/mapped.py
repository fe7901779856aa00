"""The remembered set of mapped units, as a map of bitmap pages that backups share.

Thin pools map in units of their own, finer or coarser than our chunks; what a discard took away between two
backups is found by comparing these sets. A page is 4 KiB of bitmap; equal pages are stored once, and an
empty one is a hole.
"""

from __future__ import annotations

from functools import lru_cache

from blocksnap.extents.mapped_set import EMPTY_PAGE, PAGE_BYTES, MappedSet
from blocksnap.operations.catalogue import map_root, root_document
from blocksnap.repository.blockmap import HOLE, ZERO, MapReader, MapWriter
from blocksnap.repository.documents import Mapped
from blocksnap.repository.errors import DamagedObjectError
from blocksnap.repository.frame import FrameType
from blocksnap.repository.repository import Repository
from blocksnap.repository.writer import RepositoryWriter

_PAGES_AT_HAND = 64


def store_mapped(
    repository: Repository, writer: RepositoryWriter, mapped: MappedSet, parent: Mapped | None
) -> Mapped:
    """Store a set; pages that the parent has too cost nothing.

    ``parent`` is what the set was made from, if it was made from one that is stored.
    """
    count = mapped.page_count
    made_from = map_root(parent.map) if parent and mapped.made_from else None
    builder = MapWriter(MapReader(repository.load_node), made_from, count, writer.store_node)
    for number, page in sorted(mapped.pages.items()):
        if number < count:
            blob = HOLE if page == EMPTY_PAGE else writer.store_blob(FrameType.ATTACHMENT, page)
            builder.set(number, blob)
    return Mapped(unit=mapped.unit, length=mapped.length, map=root_document(builder.finish()))


def load_mapped(repository: Repository, mapped: Mapped | None) -> MappedSet | None:
    """Return a set whose pages are fetched when they are asked for, which raises DamageError."""
    if mapped is None:
        return None
    reader, root = MapReader(repository.load_node), map_root(mapped.map)
    count = -(-mapped.length // PAGE_BYTES)

    @lru_cache(_PAGES_AT_HAND)
    def page(number: int) -> bytes:
        if number >= count:
            return EMPTY_PAGE
        entry = reader.entry(root, number)
        found = EMPTY_PAGE if entry in (HOLE, ZERO) else repository.load(FrameType.ATTACHMENT, entry)
        if len(found) != PAGE_BYTES:
            raise DamagedObjectError(f"page {number} of a set of mapped units", f"it has {len(found)} bytes")
        return found

    return MappedSet(mapped.unit, mapped.length, page)
