# SPDX-License-Identifier: Apache-2.0
"""What the program did, written where the backup does not reach: the truth that a restore is measured by.

Two lines for each transaction, one before it is sent and one after the database has acknowledged its commit,
each with the time. A transaction without the second line may or may not have happened.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from judge import Change, Transaction


class Journal:
    """Appends; may be shared by threads, as every line is one write to the end of the file."""

    def __init__(self, path: Path) -> None:
        self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._fd)

    def sent(self, client: int, number: int, changes: Sequence[Change]) -> None:
        """Note that a client's transaction is about to be sent."""
        self._append(["sent", client, number, time.time(), changes])

    def done(self, client: int, number: int) -> None:
        """Note that its commit was acknowledged."""
        self._append(["done", client, number, time.time()])

    def _append(self, record: list[object]) -> None:
        os.write(self._fd, json.dumps(record, separators=(",", ":")).encode() + b"\n")


def read_journal(path: Path) -> list[Transaction]:
    """Return all transactions in the order in which they were sent."""
    sent: dict[tuple[int, int], tuple[float, tuple[Change, ...]]] = {}
    done: dict[tuple[int, int], float] = {}
    with path.open() as file:
        for line in file:
            what, client, number, at, *rest = json.loads(line)
            if what == "sent":
                sent[client, number] = at, tuple((key, seed) for key, seed in rest[0])
            else:
                done[client, number] = at
    return [
        Transaction(client=which[0], sent=at, done=done.get(which), changes=changes)
        for which, (at, changes) in sent.items()
    ]


@dataclass(frozen=True, slots=True)
class Pace:
    """How the program got on in a stretch of time."""

    longest_stall_ms: float
    stalled_at: float
    per_second: float


def pace(transactions: Sequence[Transaction], began: float, ended: float) -> Pace:
    """Return how long the slowest transaction that touches the stretch took, its start, and the rate."""
    answered = [(each.sent, each.done) for each in transactions if each.done is not None]
    stalls = [(done - sent, sent) for sent, done in answered if sent < ended and done > began]
    longest, at = max(stalls, default=(0.0, began))
    committed = sum(began <= done < ended for _, done in answered)
    return Pace(1000 * longest, at, committed / (ended - began))
