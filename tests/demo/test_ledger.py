# SPDX-License-Identifier: Apache-2.0
"""The SQL does what the journal says, and no damaged row passes for a written one."""

from __future__ import annotations

import os
import sqlite3
from pathlib import Path

import journal
import ledger
import pytest
from judge import Transaction


def test_statements_and_journal_agree(tmp_path: Path) -> None:
    connection = sqlite3.connect(":memory:")
    path = tmp_path / "journal"
    transactions: list[list[ledger.Operation]] = [
        [ledger.Insert(key, f"0.{key}") for key in range(1200)],
        [ledger.Update(1, "1.1"), ledger.Insert(2000, "1.2000"), ledger.Delete(2)],
    ]
    for statement in ledger.CREATE:
        connection.execute(statement)
    with journal.Journal(path) as written:
        for number, operations in enumerate(transactions):
            written.sent(0, number, [ledger.change(each) for each in operations])
            for statement in ledger.statements(operations, number):
                connection.execute(statement)
            written.done(0, number)
    expected: dict[int, str | None] = {}
    for transaction in journal.read_journal(path):
        assert transaction.done is not None
        assert transaction.done >= transaction.sent
        expected |= dict(transaction.changes)
    rows = ledger.seeds_of(dict(connection.execute(ledger.ALL_ROWS)))
    connection.close()
    assert rows == {key: seed for key, seed in expected.items() if seed is not None}
    assert (len(rows), rows[1], rows[2000]) == (1200, "1.1", "1.2000")


@pytest.mark.parametrize("position", [0, 3, -1])
def test_damaged_body_has_no_seed(position: int) -> None:
    body = list(ledger.body_of("1.2.3"))
    body[position] = "x"
    assert ledger.seed_of(ledger.body_of("1.2.3")) == "1.2.3"
    assert ledger.seed_of("".join(body)) is None
    assert ledger.seeds_of({7: "".join(body)})[7].startswith("damaged")


def test_transaction_without_acknowledgement_is_read_as_such(tmp_path: Path) -> None:
    with journal.Journal(tmp_path / "journal") as written:
        written.sent(1, 0, [(5, None)])
    (found,) = journal.read_journal(tmp_path / "journal")
    assert (found.client, found.done, found.changes) == (1, None, ((5, None),))
    assert os.stat(tmp_path / "journal").st_mode & 0o777 == 0o600


def test_pace_finds_the_longest_stall_of_a_stretch() -> None:
    def at(sent: float, done: float | None) -> Transaction:
        return Transaction(client=0, sent=sent, done=done, changes=())

    transactions = [at(0, 5), at(5, 5.1), at(5.75, 6.25), at(8, 9.9), at(20, 30), at(30, None)]
    assert journal.pace(transactions, 4, 8) == journal.Pace(5000, 0, 0.75)
    assert journal.pace(transactions, 6, 7) == journal.Pace(500, 5.75, 1)
    assert journal.pace(transactions, 12, 13) == journal.Pace(0, 12, 0)
