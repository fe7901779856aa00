"""A model of a repair beside a collection (docs/design.md, 3.14), small enough to try every order of events.

One live backup needs the blobs a and b. Pack P is listed with both, but its copy of a is harmed, which only
the repair finds out; Q has a good copy of a, and something dead, so it is always worth collecting. The
collector believes rows and marks whichever copy it likes. Both may stop for ever before any step; the
collector may begin anew, and may shut the repair out at any time.

``Rules`` has the parts of the protocol that can be left out; each is needed, as the tests show.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from typing import NamedTuple

Ids = frozenset[str]
NEEDED = "ab"
GOOD: dict[str, Ids] = {"P": frozenset("b")}
"""What is unharmed in a pack: a in Q and the collector's copies; R, the repair's, has what it was given."""


@dataclass(frozen=True)
class Rules:
    """What the protocol demands; False breaks it on purpose."""

    announce: bool = True
    """A repair is a writer: collectors leave its packs alone and wait for it."""
    heed_condemned: bool = True
    """A repair relies on nothing that is condemned."""
    heed_repairs: bool = True
    """A collector that finds a repair it did not know of keeps what is condemned."""
    last_resort: bool = True
    """A collector marks a pack that was set aside only for what no other has."""
    aside_before_settled: bool = True
    """The repair is settled only when the record exists."""
    own_fence: bool = True
    """A repair that somebody has shut out is not reported done."""


class State(NamedTuple):
    """What is stored, and where both processes are."""

    packs: Ids = frozenset("PQ")
    rows: frozenset[tuple[str, str]] = frozenset({("a", "P"), ("b", "P"), ("a", "Q")})
    aside: bool = False
    announced: bool = False
    fence: str = ""
    saw: int = -1
    epoch: int = -1
    condemned: Ids = frozenset()
    knew: bool = False
    sweep: Ids | None = None
    done: bool = True
    collector: str = "start"
    kept: tuple[Ids, bool] = (frozenset(), False)
    copies: bool = False
    lives: int = 0
    made: int = 0
    repair: str = "start"
    dropped: Ids = frozenset()
    found: Ids = frozenset()
    rescued: Ids = frozenset()


def good_in(state: State, pack: str) -> Ids:
    return state.rescued if pack == "R" else GOOD.get(pack, frozenset("a"))


def unharmed(state: State) -> Ids:
    """Return what some pack has unharmed, that of the repair itself left out."""
    return frozenset(id_ for pack in state.packs - {"R"} for id_ in good_in(state, pack))


def lost(state: State) -> Ids:
    """Return what a repair has reported to be there, and is not: nothing, ever."""
    if state.repair != "reported":
        return frozenset()
    there = {id_ for id_, pack in state.rows if pack in state.packs and id_ in good_in(state, pack)}
    return state.found - there


def events(state: State, rules: Rules, epochs: int) -> Iterator[tuple[str, State]]:
    """Yield everything that can happen next."""
    yield from _repair(state, rules)
    yield from _collect(state, rules, epochs)
    if state.collector != "start" and state.lives < 1:
        yield "collector begins anew", state._replace(collector="start", lives=1, kept=(frozenset(), False))


def _repair(state: State, rules: Rules) -> Iterator[tuple[str, State]]:
    step = state.repair
    if step == "start":
        yield "repair announces itself", state._replace(repair="announced", announced=rules.announce)
    elif step == "announced":
        condemned = frozenset() if state.done or not rules.heed_condemned else state.condemned
        saw = state.saw if state.done or not rules.announce else state.epoch
        yield "repair reads gc/", state._replace(repair="read", dropped=condemned, saw=saw)
    elif step == "read":
        yield "repair looks", _look(state)
    elif step == "looked" and not state.rescued:
        yield "repair has nothing to copy", state._replace(repair="indexed")
    elif step == "looked" and state.rescued <= unharmed(state):
        yield "repair copies", state._replace(repair="copied", packs=state.packs | {"R"})
    elif step == "looked":
        yield "repair finds it gone", state._replace(repair="read", rescued=frozenset())
    elif step == "copied":
        rows = state.rows | {(id_, "R") for id_ in state.rescued}
        yield "repair indexes", state._replace(repair="indexed", rows=rows)
    else:
        yield from _end_repair(state, rules)


def _end_repair(state: State, rules: Rules) -> Iterator[tuple[str, State]]:
    step = state.repair
    if step == "indexed" and rules.aside_before_settled:
        yield "repair sets P aside", state._replace(repair="set aside", aside=True)
    elif step in ("indexed", "set aside") and state.fence == "other" and rules.own_fence:
        yield "repair was shut out", state._replace(repair="shut out")
    elif step in ("indexed", "set aside"):
        yield "repair is done", state._replace(repair="reported", fence=state.fence or "own")
    elif step == "reported" and not state.aside:
        yield "repair sets P aside, late", state._replace(aside=True)


def _look(state: State) -> State:
    trusted = state.packs - state.dropped - {"P"}
    rows = {id_: {pack for row, pack in state.rows if row == id_} for id_ in NEEDED}
    safe = {id_ for id_ in NEEDED if any(id_ in good_in(state, pack) for pack in rows[id_] & trusted)}
    rescued = (frozenset(NEEDED) - safe) & unharmed(state)
    return state._replace(repair="looked", found=rescued | safe, rescued=rescued)


def _collect(state: State, rules: Rules, epochs: int) -> Iterator[tuple[str, State]]:
    step = state.collector
    if step == "start" and not state.done:
        yield "collector takes the epoch up", state._replace(collector="condemned")
    elif step == "start" and state.epoch + 1 < epochs:
        yield from _mark(state, rules)
    elif step == "marked":
        after = state._replace(collector="ready")
        if state.copies:
            copy = f"C{state.made}"
            rows = state.rows | {("a", copy)}
            after = after._replace(packs=state.packs | {copy}, rows=rows, made=state.made + 1)
        yield "collector copies", after
    elif step == "ready":
        victims, knew = state.kept
        yield (
            "collector condemns",
            state._replace(
                collector="condemned",
                epoch=state.epoch + 1,
                condemned=victims,
                knew=knew,
                sweep=None,
                done=False,
            ),
        )
    else:
        yield from _sweep(state, rules)


def _mark(state: State, rules: Rules) -> Iterator[tuple[str, State]]:
    """Choose a home for each blob; what holds none, or something dead, is to go."""
    homes = []
    for id_ in NEEDED:
        listed = sorted(pack for row, pack in state.rows if row == id_ and pack in state.packs)
        trusted = [pack for pack in listed if not (state.aside and rules.last_resort and pack == "P")]
        homes.append(trusted or listed)
    if not all(homes):
        # Something that is needed is in no pack: nothing is collected.
        return
    for chosen in product(*homes):
        left_alone = {"R"} if state.announced and not state.fence else set()
        victims = frozenset(state.packs - set(chosen) - left_alone)
        copies = "Q" in chosen
        kept = (victims | {"Q"} if copies and "Q" in state.packs else victims, state.aside)
        yield f"collector marks in {chosen}", state._replace(collector="marked", kept=kept, copies=copies)


def _sweep(state: State, rules: Rules) -> Iterator[tuple[str, State]]:
    step = state.collector
    if step == "condemned" and state.sweep is None:
        settled = not state.announced or state.fence or state.saw == state.epoch
        if settled:
            yield "collector has waited", state._replace(collector="settled")
        else:
            yield "collector shuts the repair out", state._replace(fence="other")
    elif step == "condemned":
        yield "collector finds a sweep", state._replace(collector="deciding")
    elif step == "settled":
        unknown = state.aside and not state.knew and rules.heed_repairs
        sweep = frozenset() if unknown else state.condemned
        yield "collector decides", state._replace(collector="deciding", sweep=sweep)
    elif step == "deciding" and state.sweep is not None:
        rows = frozenset(row for row in state.rows if row[1] not in state.sweep)
        yield "collector replaces segments", state._replace(collector="unlisted", rows=rows)
    elif step == "unlisted" and state.sweep is not None:
        yield "collector deletes", state._replace(collector="swept", packs=state.packs - state.sweep)
    elif step == "swept":
        yield "collector is done", state._replace(collector="start", done=True, lives=0)


def search(rules: Rules, epochs: int = 2) -> tuple[int, list[str] | None, set[str]]:
    """Try every order; return how many states there are, the way to a loss if any, and all that happened."""
    first = State()
    came_from: dict[State, tuple[State, str] | None] = {first: None}
    waiting, happened = [first], set[str]()
    while waiting:
        state = waiting.pop()
        for event, after in events(state, rules, epochs):
            happened.add(event)
            if after in came_from:
                continue
            came_from[after] = (state, event)
            if lost(after):
                return len(came_from), _way_to(after, came_from), happened
            waiting.append(after)
    return len(came_from), None, happened


def _way_to(state: State, came_from: dict[State, tuple[State, str] | None]) -> list[str]:
    way = []
    while (step := came_from[state]) is not None:
        state, event = step
        way.append(event)
    return way[::-1]
