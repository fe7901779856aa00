"""Sets of mapped units in a repository: made from one another, and only what differs in memory."""

from __future__ import annotations

from pathlib import Path

import pytest

from blocksnap.errors import DamageError
from blocksnap.extents.mapped_set import MappedSet
from blocksnap.extents.model import ExtentList
from blocksnap.operations.catalogue import root_document
from blocksnap.operations.mapped import load_mapped, store_mapped
from blocksnap.repository.blockmap import MapReader, MapWriter
from blocksnap.repository.documents import Mapped
from blocksnap.repository.frame import FrameType
from support import independent_reader
from support.repositories import make_repository, open_repository, open_writer


@pytest.mark.parametrize("now", [40_000, 400_000, 900_000])
def test_mapped_sets_made_from_one_that_is_stored(tmp_path: Path, now: int) -> None:
    """The volume stays as it is, shrinks or grows; only pages that change are fetched or stored."""
    bits = 400_000
    before = {*range(0, bits, 50_000), bits - 1}
    repository = make_repository(tmp_path / "r", encrypted=True)
    with open_writer(repository) as writer:
        first = store_mapped(repository, writer, mapped_set(before, bits), None)
        writer.flush()
    changed, gone = {7, 399_990, now - 1}, {50_000, 350_000}
    repository = open_repository(tmp_path / "r")
    loaded = load_mapped(repository, first)
    assert loaded
    after = loaded.updated(now, extents(changed), extents(gone))
    assert after.pages.keys() <= {number // 32768 for number in {*changed, *gone, now - 1}}
    with open_writer(repository) as writer:
        second = store_mapped(repository, writer, after, first)
        writer.flush()
    expected = {bit for bit in before - gone | changed if bit < now}
    reader = independent_reader.Repository(tmp_path / "r", b"correct horse")
    assert reader.mapped({"mapped": second.model_dump()}) == mapped_set(expected, now).read(0, second.length)
    # As if it had been made from nothing.
    with open_writer(repository) as writer:
        assert store_mapped(repository, writer, mapped_set(expected, now), None) == second


def test_a_page_of_another_length_is_damage(tmp_path: Path) -> None:
    repository = make_repository(tmp_path / "r", encrypted=True)
    with open_writer(repository) as writer:
        page = writer.store_blob(FrameType.ATTACHMENT, b"short")
        builder = MapWriter(MapReader(repository.load_node), None, 1, writer.store_node)
        builder.set(0, page)
        stored = Mapped(unit=65536, length=5, map=root_document(builder.finish()))
        writer.flush()
    loaded = load_mapped(open_repository(tmp_path / "r"), stored)
    assert loaded
    with pytest.raises(DamageError, match="it has 5 bytes"):
        loaded.page(0)


def mapped_set(units: set[int], count: int) -> MappedSet:
    bitmap = sum(1 << unit for unit in units).to_bytes(-(-count // 8), "little")
    return MappedSet.of(65536, bitmap)


def extents(units: set[int]) -> ExtentList:
    return ExtentList.of((unit * 65536, 65536) for unit in units)
