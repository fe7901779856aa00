"""No order of events of a repair and collections loses what the repair has reported to be there."""

from __future__ import annotations

import sys
from dataclasses import fields, replace
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from repair_model import Rules, search


def test_what_is_reported_stays() -> None:
    states, way, happened = search(Rules(), epochs=3)
    assert way is None, way
    assert states > 1_000
    for expected in (
        "repair is done",
        "repair was shut out",
        "repair copies",
        "repair finds it gone",
        "collector begins anew",
        "collector takes the epoch up",
        "collector deletes",
        "collector marks in ('P', 'P')",
        "collector marks in ('Q', 'R')",
    ):
        assert expected in happened, sorted(happened)


@pytest.mark.parametrize("rule", [each.name for each in fields(Rules)])
def test_without_a_rule_it_is_lost(rule: str) -> None:
    _, way, _ = search(replace(Rules(), **{rule: False}), epochs=3)
    assert way is not None, f"nothing is lost without {rule}: is it needed?"
