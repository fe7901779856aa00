"""No order of events loses a backup; and each rule of the protocol is needed."""

from __future__ import annotations

import os
import sys
from dataclasses import fields, replace
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from protocol import Bounds, Collector, Epoch, Rules, Storage, Writer, first_storage, repaired_storage
from search import Scene, search

SMALL = [
    Bounds(writers=1, collectors=1, epochs=2, forgets=2, restarts=1),
    Bounds(writers=2, collectors=1, epochs=1, forgets=1, restarts=0),
    Bounds(writers=1, collectors=2, epochs=1, forgets=1, restarts=0),
]
LARGE = [
    Bounds(writers=2, collectors=1, epochs=2, forgets=1, restarts=1),
    Bounds(writers=1, collectors=2, epochs=2, forgets=1, restarts=1),
    Bounds(writers=2, collectors=2, epochs=1, forgets=1, restarts=0),
]

LATE = Scene(
    # The epoch's one pack is needed by w1, which both collectors have waited for, and by w2, which began
    # later, has w1 for a parent, and is about to commit. The first collector has listed w2's place already.
    storage=Storage(
        packs=frozenset({("P", frozenset("az")), ("c1.0", frozenset("a"))}),
        rows=frozenset({("a", "P"), ("z", "P"), ("a", "c1.0")}),
        manifests=frozenset({("m1", frozenset("a")), ("w1", frozenset("z"))}),
        forgotten=frozenset(),
        announced=frozenset({"w1", "w2"}),
        seen=frozenset({("w2", 0)}),
        epochs=(Epoch(frozenset({"P"}), frozenset({"m1"}), frozenset(), sweep=None, done=False),),
    ),
    writers=(Writer(step="ended"), Writer(step="stored", refs=frozenset("z"))),
    collectors=(Collector(step="half listed"), Collector(step="settled")),
)


# Nobody needs z any more, and its one copy is the harmed one.
ONLY_HARMED = repaired_storage()._replace(
    packs=frozenset({("P", frozenset("a")), ("H", frozenset("az"))}),
    rows=frozenset({("a", "P"), ("a", "H"), ("z", "H")}),
    manifests=frozenset({("m1", frozenset("a")), ("m2", frozenset("a"))}),
)
BEGINNINGS = {"first": first_storage(), "repaired": repaired_storage(), "only harmed": ONLY_HARMED}


def bounds_id(bounds: Bounds) -> str:
    return f"{bounds.writers}w-{bounds.collectors}c-{bounds.epochs}e-{bounds.forgets}f-{bounds.restarts}r"


SOAK = "BLOCKSNAP_SOAK" in os.environ
CASES = {
    f"{bounds_id(bounds)}-{name}": (bounds, beginning)
    for name, beginning in BEGINNINGS.items()
    # Two collectors and two writers beside what a repair has left would be twenty million states.
    for bounds in ((LARGE if SOAK else SMALL) if name == "first" else LARGE[:2] if SOAK else SMALL[::2])
}


@pytest.mark.timeout(0)
@pytest.mark.parametrize("case", CASES)
def test_nothing_is_lost(case: str) -> None:
    bounds, beginning = CASES[case]
    found = search(Rules(), bounds, Scene(beginning))
    print(case, found.states)
    assert found.loss is None
    assert found.states > 10_000


def test_the_model_is_not_empty() -> None:
    """Everything that the protocol provides for does happen."""
    events = {event for bounds in SMALL for event in search(Rules(), bounds).events}
    for expected in (
        "commits",
        "finds a fence",
        "says what it saw",
        "takes parent w1",
        "finds z",
        "stores z",
        "copies",
        "condemns",
        "takes an epoch up",
        "fences w1",
        "has waited",
        "marks again, and keeps a pack",
        "finds a sweep",
        "deletes packs",
        "is done",
        "begins anew",
    ):
        assert expected in events


def test_a_late_collector_changes_nothing() -> None:
    assert search(Rules(), *WHERE_IT_SHOWS["one_sweep"]).loss is None


SMALL_BOUNDS = Bounds(writers=1, collectors=1, epochs=1, forgets=1, restarts=0)
WHERE_IT_SHOWS: dict[str, tuple[Bounds, Scene | None]] = {
    "freeze_forgotten": (Bounds(writers=2, collectors=1, epochs=2, forgets=2, restarts=1), None),
    "one_sweep": (Bounds(writers=2, collectors=2, epochs=2, forgets=1, restarts=1), LATE),
    "find_nothing_aside": (SMALL_BOUNDS, Scene(ONLY_HARMED)),
    "copy_past_aside": (SMALL_BOUNDS, Scene(repaired_storage())),
    "keep_past_aside": (SMALL_BOUNDS, Scene(repaired_storage())),
    "keep_given_up": (SMALL_BOUNDS, Scene(repaired_storage())),
}


@pytest.mark.parametrize("rule", [each.name for each in fields(Rules)])
def test_without_a_rule_a_backup_is_lost(rule: str) -> None:
    bounds, scene = WHERE_IT_SHOWS.get(rule, (SMALL_BOUNDS, None))
    broken = search(replace(Rules(), **{rule: False}), bounds, scene)
    assert broken.loss is not None, f"nothing is lost without {rule}: is it needed?"
