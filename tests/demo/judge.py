# SPDX-License-Identifier: Apache-2.0
"""Compare what a restored database holds with what its clients were promised.

Of each client, the restored rows must be the outcome of its first transactions, one after the other and none
in part: of all that were acknowledged before the snapshot, and of none that were sent after it. Only those
under way at that instant may be there or not.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

Change = tuple[int, str | None]
"""A row's key, and its value after the transaction; None when it was deleted."""
State = dict[int, str]


@dataclass(frozen=True, slots=True)
class Transaction:
    """One transaction of one client, which sends the next only after this one was acknowledged.

    ``done`` is None when no acknowledgement came.
    """

    client: int
    sent: float
    done: float | None
    changes: tuple[Change, ...]


FindingKind = Literal["missing", "stale", "back again", "from later", "never written", "in part"]


@dataclass(frozen=True, slots=True)
class Finding:
    """One way in which the restored rows are not what they must be."""

    kind: FindingKind
    client: int | None
    key: int | None
    expected: str | None
    found: str | None

    def __str__(self) -> str:
        if self.key is None:
            return f"client {self.client}: its transactions under way at the snapshot are there {self.kind}"
        return f"row {self.key} is {self.kind}: expected {self.expected}, found {self.found}"


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the comparison found; ``findings`` is empty when every promise was kept."""

    acknowledged: int
    under_way: int
    under_way_kept: int
    later: int
    rows: int
    deleted_rows: int
    findings: tuple[Finding, ...]

    @property
    def kept(self) -> bool:
        """Tell whether all promises were kept."""
        return not self.findings


def judge(
    transactions: Iterable[Transaction], rows: Mapping[int, str], *, before: float, after: float
) -> Verdict:
    """Return the verdict on restored ``rows``, for a snapshot taken between two instants.

    What was acknowledged until ``before`` must be there, what was sent from ``after`` on must not.
    """
    histories: dict[int, _History] = defaultdict(_History)
    owner: dict[int, int] = {}
    for transaction in sorted(transactions, key=lambda each: each.sent):
        histories[transaction.client].add(transaction, before=before, after=after)
        for key, _ in transaction.changes:
            if owner.setdefault(key, transaction.client) != transaction.client:
                raise ValueError(f"row {key} was written by two clients")
    held: dict[int, State] = defaultdict(dict)
    findings = []
    for key, value in rows.items():
        if key in owner:
            held[owner[key]][key] = value
        else:
            findings.append(Finding("never written", None, key, None, value))
    outcomes = {
        client: _compare(client, history, held[client]) for client, history in sorted(histories.items())
    }
    for outcome in outcomes.values():
        findings += outcome.findings
    return Verdict(
        acknowledged=sum(len(history.certain) for history in histories.values()),
        under_way=sum(len(history.open) for history in histories.values()),
        under_way_kept=sum(outcome.kept for outcome in outcomes.values()),
        later=sum(len(history.later) for history in histories.values()),
        rows=len(rows),
        deleted_rows=sum(outcome.deleted for outcome in outcomes.values()),
        findings=tuple(findings),
    )


@dataclass(slots=True)
class _History:
    """One client's transactions, in order: there for certain, either way, and certainly not."""

    certain: list[Transaction] = field(default_factory=list)
    open: list[Transaction] = field(default_factory=list)
    later: list[Transaction] = field(default_factory=list)

    def add(self, transaction: Transaction, *, before: float, after: float) -> None:
        if transaction.sent >= after:
            self.later.append(transaction)
        elif transaction.done is not None and transaction.done <= before:
            self.certain.append(transaction)
        else:
            self.open.append(transaction)


@dataclass(frozen=True, slots=True)
class _Outcome:
    """Of one client: how many open transactions its rows show, and what is wrong with them."""

    kept: int
    deleted: int
    findings: tuple[Finding, ...]


def _compare(client: int, history: _History, held: State) -> _Outcome:
    state: State = {}
    for transaction in history.certain:
        _apply(transaction.changes, state)
    deleted = len({key for each in history.certain for key, _ in each.changes} - state.keys())
    certain = dict(state)
    differing = {key for key in state.keys() | held.keys() if state.get(key) != held.get(key)}
    for kept in range(len(history.open) + 1):
        if not differing:
            return _Outcome(kept, deleted, ())
        if kept == len(history.open):
            break
        changes = history.open[kept].changes
        _apply(changes, state)
        for key, _ in changes:
            if state.get(key) != held.get(key):
                differing.add(key)
            else:
                differing.discard(key)
    return _Outcome(0, deleted, tuple(_explain(client, history, certain, held)))


def _apply(changes: Sequence[Change], state: State) -> None:
    for key, value in changes:
        if value is None:
            state.pop(key, None)
        else:
            state[key] = value


def _explain(client: int, history: _History, certain: State, held: State) -> list[Finding]:
    """Say of each row that no permitted transaction explains what is wrong with it."""
    permitted: dict[int, set[str | None]] = {key: {value} for key, value in certain.items()}
    for key, value in _changes(history.open):
        permitted.setdefault(key, {None}).add(value)
    earlier = set(_changes(history.certain))
    later = set(_changes(history.later))
    findings = []
    for key in sorted(certain.keys() | held.keys() | permitted.keys()):
        expected, found = certain.get(key), held.get(key)
        if found in permitted.get(key, {None}):
            continue
        kind: FindingKind = "never written"
        if found is None:
            kind = "missing"
        elif (key, found) in earlier:
            kind = "stale" if expected is not None else "back again"
        elif (key, found) in later:
            kind = "from later"
        findings.append(Finding(kind, client, key, expected, found))
    return findings or [Finding("in part", client, None, None, None)]


def _changes(transactions: Iterable[Transaction]) -> Iterable[Change]:
    return (change for transaction in transactions for change in transaction.changes)
