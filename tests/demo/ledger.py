# SPDX-License-Identifier: Apache-2.0
"""The table that the demo keeps writing to, in the SQL that PostgreSQL and SQLite have in common.

A row's content follows from its seed, which no other version of any row ever has. So a journal of seeds is
enough to tell what a row must hold, and a row that was damaged or mixed from two others has no seed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from judge import Change

CREATE = (
    "CREATE TABLE ledger (id integer PRIMARY KEY, revision integer NOT NULL, body text NOT NULL)",
    "CREATE INDEX ledger_revision ON ledger (revision)",
)
ALL_ROWS = "SELECT id, body FROM ledger"
COUNTS = {
    "the table": "SELECT count(*) FROM ledger",
    "its primary key": "SELECT count(id) FROM ledger WHERE id >= 0",
    "its second index": "SELECT count(revision) FROM ledger WHERE revision >= 0",
}
_INSERT, _UPDATE, _DELETE = "INSERT INTO ledger", "UPDATE ledger SET", "DELETE FROM ledger"
_DIGESTS_IN_BODY = 6
_ROWS_IN_STATEMENT = 500


@dataclass(frozen=True, slots=True)
class Insert:
    """A new row."""

    key: int
    seed: str


@dataclass(frozen=True, slots=True)
class Update:
    """New content for a row."""

    key: int
    seed: str


@dataclass(frozen=True, slots=True)
class Delete:
    """The end of a row."""

    key: int


Operation = Insert | Update | Delete


def body_of(seed: str) -> str:
    """Return the content of the row that was written with a seed."""
    digests = (hashlib.sha256(f"{seed}/{n}".encode()).hexdigest() for n in range(_DIGESTS_IN_BODY))
    return f"{seed}:{''.join(digests)}"


def seed_of(body: str) -> str | None:
    """Return the seed of an intact row, None for content that nobody ever wrote."""
    seed = body.partition(":")[0]
    return seed if body == body_of(seed) else None


def seeds_of(bodies: Mapping[int, str]) -> dict[int, str]:
    """Return each row's seed; damaged content stands for itself and equals no seed."""
    return {key: seed_of(body) or f"damaged: {body[:40]!r}" for key, body in bodies.items()}


def change(operation: Operation) -> Change:
    """Return what an operation does to its row, as the journal has it."""
    return operation.key, None if isinstance(operation, Delete) else operation.seed


def statements(operations: Sequence[Operation], revision: int) -> list[str]:
    """Return the SQL of one transaction's operations, each on another row; inserts share statements."""
    written: list[str] = []
    inserted: list[str] = []
    for operation in operations:
        match operation:
            case Insert(key, seed):
                inserted.append(f"({key}, {revision}, '{body_of(seed)}')")
            case Update(key, seed):
                written.append(f"{_UPDATE} revision = {revision}, body = '{body_of(seed)}' WHERE id = {key}")
            case Delete(key):
                written.append(f"{_DELETE} WHERE id = {key}")
    batches = range(0, len(inserted), _ROWS_IN_STATEMENT)
    return written + [
        f"{_INSERT} VALUES {', '.join(inserted[first : first + _ROWS_IN_STATEMENT])}" for first in batches
    ]
