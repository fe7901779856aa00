# SPDX-License-Identifier: Apache-2.0
"""The judge accepts every outcome that the promises allow, and no other."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st
from judge import Change, State, Transaction, Verdict, judge

BEFORE, AFTER = 10.0, 11.0


def transaction(sent: float, done: float | None, *changes: Change, client: int = 0) -> Transaction:
    return Transaction(client=client, sent=sent, done=done, changes=changes)


def outcome(transactions: Sequence[Transaction]) -> State:
    state: dict[int, str | None] = dict(itertools.chain.from_iterable(each.changes for each in transactions))
    return {key: value for key, value in state.items() if value is not None}


HISTORY = (
    transaction(1, 2, (1, "a"), (2, "b"), (3, "c")),
    transaction(3, 4, (1, "a2"), (3, None)),
    transaction(9.9, 10.5, (1, "a3"), (2, None)),
    transaction(12, 13, (1, "a4"), (4, "d")),
    transaction(14, None, (5, "e")),
)


def verdict_on(rows: State, history: Sequence[Transaction] = HISTORY) -> Verdict:
    return judge(history, rows, before=BEFORE, after=AFTER)


def kinds(rows: State, history: Sequence[Transaction] = HISTORY) -> list[str]:
    return [finding.kind for finding in verdict_on(rows, history).findings]


@pytest.mark.parametrize(("transactions", "kept"), [(2, 0), (3, 1)])
def test_transaction_under_way_may_be_there_or_not(transactions: int, kept: int) -> None:
    verdict = verdict_on(outcome(HISTORY[:transactions]))
    assert verdict.kept
    assert (verdict.acknowledged, verdict.under_way, verdict.under_way_kept, verdict.later) == (2, 1, kept, 2)


def test_counts_rows_and_deleted_rows() -> None:
    verdict = verdict_on({1: "a2", 2: "b"})
    assert (verdict.rows, verdict.deleted_rows) == (2, 1)


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ({2: "b"}, "missing"),
        ({1: "a2"}, "in part"),
        ({1: "a", 2: "b"}, "stale"),
        ({1: "a2", 2: "b", 3: "c"}, "back again"),
        ({1: "a4", 2: "b"}, "from later"),
        ({1: "a2", 2: "b", 4: "d"}, "from later"),
        ({1: "a2", 2: "b", 5: "e"}, "from later"),
        ({1: "rot", 2: "b"}, "never written"),
        ({1: "a2", 2: "b", 77: "x"}, "never written"),
        ({1: "a3", 2: "b"}, "in part"),
    ],
)
def test_broken_promise_is_named(rows: State, expected: str) -> None:
    assert kinds(rows) == [expected]


def test_empty_restore_misses_everything() -> None:
    # Row 2 may have been deleted by the transaction under way.
    assert kinds({}) == ["missing"]


def test_unacknowledged_transaction_before_the_snapshot_may_go_either_way() -> None:
    history = [transaction(1, 2, (1, "a")), transaction(3, None, (1, "b"))]
    assert kinds({1: "a"}, history) == kinds({1: "b"}, history) == []
    assert kinds({1: "c"}, history) == ["never written"]


def test_clients_are_judged_apart() -> None:
    other = [
        transaction(1.5, 2.5, (100, "x"), client=1),
        transaction(9.8, 10.2, (100, None), client=1),
    ]
    history = [*HISTORY, *other]
    for mine, its in itertools.product((2, 3), (1, 2)):
        rows = outcome(HISTORY[:mine]) | outcome(other[:its])
        assert kinds(rows, history) == []
    assert kinds(outcome(HISTORY[:1]) | {100: "x"}, history) != []


def test_acknowledged_at_the_very_instant_is_certain_and_sent_at_it_is_not() -> None:
    history = [transaction(1, BEFORE, (1, "a")), transaction(AFTER, 12, (1, "b"))]
    assert kinds({1: "a"}, history) == []
    assert kinds({}, history) == ["missing"]
    assert kinds({1: "b"}, history) == ["from later"]


def test_row_of_two_clients_cannot_be_judged() -> None:
    with pytest.raises(ValueError, match="two clients"):
        verdict_on({}, [transaction(1, 2, (1, "a")), transaction(3, 4, (1, "b"), client=1)])


_KEYS = st.integers(0, 5)


@st.composite
def histories(draw: st.DrawFn) -> list[Transaction]:
    """One client's transactions, a second apart; values never repeat."""
    history = []
    for number in range(draw(st.integers(1, 24))):
        keys = draw(st.sets(_KEYS, min_size=1, max_size=3))
        changes = [(key, draw(st.sampled_from([f"{number}.{key}", None]))) for key in sorted(keys)]
        history.append(transaction(number, number + 0.5, *changes))
    return history


@given(histories(), st.data())
def test_exactly_the_permitted_prefixes_are_accepted(history: list[Transaction], data: st.DataObject) -> None:
    certain = data.draw(st.integers(0, len(history)))
    until = data.draw(st.integers(certain, len(history)))
    permitted = [outcome(history[:count]) for count in range(certain, until + 1)]
    for count in range(len(history) + 1):
        rows = outcome(history[:count])
        verdict = judge(history, rows, before=certain - 0.5, after=until - 0.25)
        assert verdict.kept == (rows in permitted)


@given(histories(), _KEYS, st.sampled_from(["rot", None]))
def test_any_other_row_is_found(history: list[Transaction], key: int, value: str | None) -> None:
    rows = outcome(history)
    if value is None and key not in rows:
        return
    changed = {**rows, key: value or ""} if value else {k: v for k, v in rows.items() if k != key}
    assert not judge(history, changed, before=1e9, after=2e9).kept
