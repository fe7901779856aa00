"""What becomes of a set of mapped units when extents are mapped and discarded."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator

import pytest

from blocksnap.extents.mapped_set import EMPTY_PAGE, UNITS_PER_PAGE, MappedSet, cut
from blocksnap.extents.model import ExtentList

UNIT = 65536
SPAN = UNIT * UNITS_PER_PAGE


@pytest.mark.parametrize("seed", range(20))
def test_updated_is_what_setting_and_clearing_each_unit_gives(seed: int) -> None:
    dice = random.Random(seed)
    before_units, units = (dice.randrange(1, 4 * UNITS_PER_PAGE) for _ in range(2))
    bits = bytearray(dice.randbytes(-(-before_units // 8)))
    bits[-1] &= (1 << (before_units - 1) % 8 + 1) - 1
    # Each unit is at most in one of the two lists, as what is compared of two trees is.
    owners = [(begin, dice.choice("csn")) for begin in sorted(dice.sample(range(5 * UNITS_PER_PAGE), 200))]
    ranges: dict[str, list[tuple[int, int]]] = {"c": [], "s": [], "n": []}
    for (begin, owner), (end, _) in itertools.pairwise(owners):
        ranges[owner].append((begin, end))
    after = MappedSet.of(UNIT, bytes(bits)).updated(units, extents(ranges["s"]), extents(ranges["c"]))
    value = int.from_bytes(bits, "little")
    for owner in "sc":
        for begin, end in ranges[owner]:
            mask = (1 << end) - (1 << begin)
            value = value | mask if owner == "s" else value & ~mask
    value &= (1 << units) - 1
    length = -(-units // 8)
    expected = value.to_bytes(length, "little")
    assert (after.length, after.read(0, length)) == (length, expected)
    old = dict(cut(bytes(bits)))
    assert after.pages == {
        number: page for number, page in cut(expected) if page != old.get(number, EMPTY_PAGE)
    }


def test_one_page_is_unpacked_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each page is done before the extents of the next are looked at."""
    asked: list[str] = []
    count = 50

    def page(number: int) -> bytes:
        asked.append(f"page {number}")
        return EMPTY_PAGE

    def noted(self: ExtentList) -> Iterator[tuple[int, int]]:
        for offset, length in pairs(self):
            asked.append(f"extent {offset // SPAN}")
            yield offset, length

    pairs = ExtentList.pairs
    changed = ExtentList.of((number * SPAN, UNIT) for number in range(count))
    monkeypatch.setattr(ExtentList, "pairs", noted)
    MappedSet(UNIT, count * UNITS_PER_PAGE // 8, page).updated(count * UNITS_PER_PAGE, changed, ExtentList())
    assert asked.index("page 0") < asked.index("extent 2")


def extents(ranges: list[tuple[int, int]]) -> ExtentList:
    return ExtentList.of((begin * UNIT, (end - begin) * UNIT) for begin, end in ranges)
