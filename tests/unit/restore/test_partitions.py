"""Tables of partitions as they are read and judged: what cannot be is told, and nothing waits for it."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blocksnap.restore.partitions import PARTITIONS_MOST, judge, look_inside
from blocksnap.system.partitions import Table, TableEntry, parse_table, read_table
from support.disks import MIB, boot_sector, make_sectors

PRINTED = """\
NR="1" START="2048" SECTORS="4096" TYPE="0x83" SCHEME="dos"
NR="2" START="6144" SECTORS="8192" TYPE="0x5" SCHEME="dos"
NR="5" START="6145" SECTORS="100" TYPE="0x83" SCHEME="dos"
NR="6" START="6145" SECTORS="100" TYPE="0x83" SCHEME="bsd"
"""


def entry(number: int, offset: int, size: int, *, is_container: bool = False) -> TableEntry:
    return TableEntry(number, offset, size, "0x83", is_container)


def test_what_partx_prints() -> None:
    scheme, entries = parse_table(PRINTED)
    assert scheme == "dos"
    assert [(each.number, each.offset, each.size, each.is_container) for each in entries] == [
        (1, MIB, 2 * MIB, False),
        (2, 3 * MIB, 4 * MIB, True),
        (5, 3 * MIB + 512, 51200, False),
    ]
    assert parse_table("") == ("", ())
    assert parse_table('NR="1" START="0" SECTORS="1" TYPE="" SCHEME="mac"\n') == ("", ())


def test_places_that_cannot_be() -> None:
    entries = (
        entry(1, MIB, MIB),
        entry(2, 2 * MIB, 3 * MIB),
        entry(3, 4 * MIB, MIB),
        entry(4, 8 * MIB, 4 * MIB, is_container=True),
        entry(5, 9 * MIB, MIB),
        entry(6, 12 * MIB, 9 * MIB),
        entry(7, 0, MIB),
        entry(8, 11 * MIB, 0),
    )
    faults = {each.number: fault for each, fault in judge(Table("dos", entries, is_endless=False), 16 * MIB)}
    assert faults == {
        1: "",
        2: "it overlaps p3",
        3: "it overlaps p2",
        5: "",
        6: f"it ends {5 * MIB} bytes behind the end of the volume",
        7: "it begins in the table of partitions itself",
        8: "it is empty",
    }


@given(st.lists(st.tuples(st.integers(0, 40), st.integers(0, 20)), max_size=8))
def test_what_has_no_fault_is_apart_from_all_and_inside(places: list[tuple[int, int]]) -> None:
    entries = tuple(entry(at, 512 * begin, 512 * size) for at, (begin, size) in enumerate(places, 1))
    judged = judge(Table("gpt", entries, is_endless=False), 512 * 40)
    for number, (each, fault) in enumerate(judged):
        others = [other for at, (other, _) in enumerate(judged) if at != number and other.size]
        is_apart = all(
            each.offset + each.size <= other.offset or other.offset + other.size <= each.offset
            for other in others
        )
        is_inside = each.offset >= 512 and each.size and each.offset + each.size <= 512 * 40
        assert bool(fault) != bool(is_apart and is_inside)


@pytest.mark.parametrize("count", [1, 3])
def test_lists_of_logical_partitions_that_come_to_no_end(tmp_path: Path, count: int) -> None:
    image = tmp_path / "disk"
    lists = {
        2048 + 64 * at: boot_sector([(0x83, 1, 8), (0x05, 64 * ((at + 1) % count), 64)])
        for at in range(count)
    }
    make_sectors(image, 4 * MIB, {0: boot_sector([(0x05, 2048, 4096)]), **lists})
    table = read_table(str(image))
    assert table is not None
    assert table.is_endless
    assert "leads back" in look_inside(str(image)).fault


def test_more_partitions_than_a_kernel_takes(tmp_path: Path) -> None:
    image = tmp_path / "disk"
    lists = {
        2048 + 4 * at: boot_sector([(0x83, 1, 2), (0x05, 4 * (at + 1), 4)])
        for at in range(2 * PARTITIONS_MOST)
    }
    make_sectors(image, 4 * MIB, {0: boot_sector([(0x0F, 2048, 4096)]), **lists})
    table = read_table(str(image))
    assert table is not None
    assert table.is_endless
    assert len(judge(table, 4 * MIB)) == PARTITIONS_MOST


def test_no_table(tmp_path: Path) -> None:
    for name, content in (("short", b"x"), ("zeros", bytes(MIB)), ("mark", bytes(510) + b"\x55\xaa")):
        (tmp_path / name).write_bytes(content)
        assert read_table(str(tmp_path / name)) is None
        assert not look_inside(str(tmp_path / name)).partitions
