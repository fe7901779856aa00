"""Who has a device open for writing, while processes end."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from blocksnap.system import blockdev, cgroup
from blocksnap.volumes import device

ENDED, FROZEN, RUNNING = 101, 102, 103


@pytest.mark.parametrize(
    ("found", "said", "running"),
    [
        ([[ENDED], []], "none", []),
        ([[ENDED, FROZEN], [FROZEN]], "frozen", []),
        # One that was left open to a child is in use.
        ([[ENDED], [RUNNING]], "running", [RUNNING]),
        ([[RUNNING, FROZEN]], "running", [RUNNING]),
        ([[FROZEN]], "frozen", []),
        ([[]], "none", []),
        ([[ENDED]] * 3, "running", [ENDED]),
    ],
)
def test_a_process_that_ends_while_it_is_looked_for_does_not_write(
    monkeypatch: pytest.MonkeyPatch, found: list[list[int]], said: str, running: list[int]
) -> None:
    looks: Iterator[list[int]] = iter(found)
    monkeypatch.setattr(
        blockdev, "lasting_writers", lambda _number: {pid: f"by {pid}" for pid in next(looks)}
    )
    monkeypatch.setattr(cgroup, "stands_still", lambda pid: pid == FROZEN)
    monkeypatch.setattr(device, "process_start", lambda pid: None if pid == ENDED else 1)
    assert device._who_writes(7) == (said, [f"by {pid}" for pid in running])
    assert list(looks) == []
