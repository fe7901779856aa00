# SPDX-License-Identifier: Apache-2.0
"""Backups that read nothing before a test lets them, so that its writers may be as slow as the machine is."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from blocksnap.controller.pacing import Pace, Wait


def hold_reading(monkeypatch: pytest.MonkeyPatch, configuration: Path, until: Callable[[], bool]) -> None:
    """Have backups of this process, with their snapshots taken, read when ``until`` returns true.

    It is asked again and again from then on, by another thread. ``configuration`` is written: only a backup
    that has a pace asks before it reads.
    """

    def before_read(_pace: Pace, _length: int, wait: Wait) -> None:
        while not until() and not wait(0.02):
            pass

    configuration.write_text('[defaults.pace]\npolicy = "fixed"\nread_rate = "1G"\n')
    monkeypatch.setattr(Pace, "before_read", before_read)
