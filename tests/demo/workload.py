# SPDX-License-Identifier: Apache-2.0
"""A program that inserts, updates and deletes rows without a pause, and keeps a journal of it.

Prints `ready` when every client has stored its first rows, and runs until SIGTERM, after which each client
finishes its transaction. Ends with 1 when the database refused one.
"""

from __future__ import annotations

import argparse
import random
import signal
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

import ledger
from commands import DemoError
from databases import Session, open_database
from journal import Journal

FIRST_ROWS = 4000
# The demo's kernel has one CPU. A client that thinks between transactions leaves some of it to the backup.
THINK_SECONDS = 0.015


class Client:
    """One of several clients. Each has rows of its own, so that its history alone tells what they hold."""

    def __init__(self, number: int, clients: int, session: Session, journal: Journal) -> None:
        self._number, self._clients = number, clients
        self._session, self._journal = session, journal
        self._random = random.Random(number)
        self._rows: list[int] = []
        self._next_row = self._revision = 0

    def store_first_rows(self) -> None:
        """Fill the table in one transaction."""
        self._transact([self._insert() for _ in range(FIRST_ROWS)])

    def work(self, stop: threading.Event) -> None:
        """Commit one small transaction after the other."""
        while not stop.wait(THINK_SECONDS):
            operations: dict[int, ledger.Operation] = {}
            for _ in range(self._random.randint(1, 4)):
                operation = self._choose()
                # A second operation on a row would depend on the order of statements.
                if operation.key not in operations:
                    operations[operation.key] = operation
            self._transact(list(operations.values()))

    def _insert(self) -> ledger.Insert:
        key = self._next_row * self._clients + self._number
        self._next_row += 1
        return ledger.Insert(key, self._seed(key))

    def _choose(self) -> ledger.Operation:
        chance = self._random.random()
        if chance < 0.3:
            return self._insert()
        key = self._random.choice(self._rows)
        return ledger.Delete(key) if chance < 0.5 else ledger.Update(key, self._seed(key))

    def _seed(self, key: int) -> str:
        return f"{self._number}.{self._revision}.{key}"

    def _transact(self, operations: Sequence[ledger.Operation]) -> None:
        self._journal.sent(self._number, self._revision, [ledger.change(each) for each in operations])
        self._session.commit(ledger.statements(operations, self._revision))
        self._journal.done(self._number, self._revision)
        self._revision += 1
        self._remember(operations)

    def _remember(self, operations: Sequence[ledger.Operation]) -> None:
        for operation in operations:
            if isinstance(operation, ledger.Insert):
                self._rows.append(operation.key)
            elif isinstance(operation, ledger.Delete):
                self._rows.remove(operation.key)


def serve(client: Client, started: threading.Barrier, stop: threading.Event, failures: list[str]) -> None:
    """Be one client, in a thread of its own."""
    try:
        client.store_first_rows()
        started.wait()
        client.work(stop)
    except (DemoError, OSError, threading.BrokenBarrierError) as err:
        failures.append(str(err))
        started.abort()
        stop.set()


def main() -> int:
    """Run the clients until SIGTERM; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("directory", "run_directory", "journal"):
        parser.add_argument(name, type=Path)
    parser.add_argument("--sqlite", action="store_true")
    arguments = parser.parse_args()
    database = open_database(arguments.directory, arguments.run_directory, sqlite=arguments.sqlite)
    stop, failures = threading.Event(), list[str]()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    started = threading.Barrier(database.clients, action=lambda: print("ready", flush=True))

    def begin(number: int, journal: Journal) -> None:
        # SQLite wants a connection to be used by the thread that opened it.
        session = database.connect()
        try:
            serve(Client(number, database.clients, session, journal), started, stop, failures)
        finally:
            session.close()

    with Journal(arguments.journal) as journal:
        threads = [
            threading.Thread(target=begin, args=(number, journal)) for number in range(database.clients)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for failure in failures:
        print(failure, file=sys.stderr)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
