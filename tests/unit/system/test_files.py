"""Who writes to a file, while processes end."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from blocksnap.system import cgroup, files
from blocksnap.system.files import who_writes

ENDED, FROZEN, RUNNING = 101, 102, 103


@pytest.mark.parametrize(
    ("leases", "found", "said"),
    [
        ([True, False], [[ENDED]], "none"),
        # Nobody that /proc tells of, and by then nobody at all.
        ([True, False], [[]], "none"),
        # The kernel, for a loop device.
        ([True, True], [[]], "running"),
        ([True, True, True], [[ENDED, FROZEN], [FROZEN]], "frozen"),
        ([True, True, True], [[ENDED], [RUNNING]], "running"),
        ([True, True], [[FROZEN, RUNNING]], "running"),
        ([True] * 4, [[ENDED]] * 3, "running"),
    ],
)
def test_a_process_that_ends_while_it_is_looked_for_does_not_write(
    monkeypatch: pytest.MonkeyPatch, leases: list[bool], found: list[list[int]], said: str
) -> None:
    refused: Iterator[bool] = iter(leases)
    writers: Iterator[list[int]] = iter(found)
    monkeypatch.setattr(files, "is_open_for_writing", lambda _fd: next(refused))
    monkeypatch.setattr(files, "file_writers", lambda _status: next(writers))
    monkeypatch.setattr(cgroup, "stands_still", lambda pid: pid == FROZEN)
    monkeypatch.setattr(files, "process_start", lambda pid: None if pid == ENDED else 1)
    assert who_writes(0) == said
